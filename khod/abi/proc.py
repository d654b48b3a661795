# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the kernel tells below /proc of the boot that it is."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    class Files(Protocol):
        """The part of `khod.abi.calls.Calls` that reads a file."""

        def read_file(self, path: str) -> bytes: ...


BOOT_ID = "/proc/sys/kernel/random/boot_id"
CMDLINE = "/proc/cmdline"


def read_boot_id(kernel: "Files") -> str:
    """Return the boot's UUID."""
    return kernel.read_file(BOOT_ID).decode(errors="replace").strip()


def read_cmdline(kernel: "Files") -> str:
    """Return the kernel's command line; bytes that are not UTF-8 become surrogates."""
    return kernel.read_file(CMDLINE).removesuffix(b"\n").decode(errors="surrogateescape")
