# SPDX-License-Identifier: LGPL-2.1-or-later
"""What all generations have in common: the image slot, the jump, and the identity of this boot."""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from khod.abi.calls import KMSG, Calls
from khod.abi.kexec_file_load import KEXEC_FILE_NO_INITRAMFS, KEXEC_FILE_UNLOAD
from khod.abi.proc import read_boot_id, read_cmdline
from khod.deferred import defer_module

if TYPE_CHECKING:
    from khod.kernel import log as kernel_log
else:
    kernel_log = defer_module("khod.kernel.log")

# The first path since 6.19, the second before and since.
LOADED = ("/sys/kernel/kexec/loaded", "/sys/kernel/kexec_loaded")
UPTIME = "/proc/uptime"
VERSION = "/proc/version"
LOAD_DISABLED = "/proc/sys/kernel/kexec_load_disabled"
LOAD_LIMIT = "/proc/sys/kernel/kexec_load_limit_reboot"


class Kexec:
    """The running kernel's kexec side. Calls raise OSError with the call's name and path."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls

    def boot_id(self) -> str:
        """Return the UUID of this boot, which changes with every boot, also by kexec."""
        return read_boot_id(self.calls)

    def kernel_release(self) -> str:
        """Return the running kernel's version as in uname -r."""
        return self._read_text("/proc/sys/kernel/osrelease")

    def banner(self) -> str:
        """Return the running kernel's build banner, which its image has too (init/version-timestamp.c); "" without."""
        return self._read_text(VERSION) if self.calls.path_exists(VERSION) else ""

    def uptime(self) -> float | None:
        """Return the seconds since boot (CLOCK_BOOTTIME); None if the kernel does not say."""
        if self.calls.path_exists(UPTIME):
            with contextlib.suppress(ValueError, IndexError):
                return float(self.calls.read_file(UPTIME).split()[0])
        return None

    def cmdline(self) -> str:
        """Return the running kernel's command line; bytes that are not UTF-8 become surrogates."""
        return read_cmdline(self.calls)

    def is_loaded(self) -> bool:
        """Whether an image is loaded for the next kexec; the crash kernel's slot is not considered."""
        for path in LOADED:
            if self.calls.path_exists(path):
                return self._read_text(path) == "1"
        return False

    def load_disabled(self) -> bool:
        """Whether the sysctl kexec_load_disabled is set; it stays set until a reboot."""
        return self.calls.path_exists(LOAD_DISABLED) and self._read_text(LOAD_DISABLED) != "0"

    def load_limit(self) -> int | None:
        """Return how many more calls kexec_load_limit_reboot allows, None for no limit.

        An unload counts as a call (kexec_load_permitted() runs before the flags are checked), so a load that can be
        undone needs two.
        """
        if not self.calls.path_exists(LOAD_LIMIT):
            return None
        left = int(self._read_text(LOAD_LIMIT))
        return None if left < 0 else left

    def load_image(self, kernel_fd: int, initrd_fd: int | None, cmdline: str) -> None:
        """Load an image; the state tree of this moment goes with it."""
        flags = KEXEC_FILE_NO_INITRAMFS if initrd_fd is None else 0
        fd = -1 if initrd_fd is None else initrd_fd
        self.calls.kexec_file_load(kernel_fd, fd, cmdline.encode() + b"\0", flags)

    def unload_image(self) -> None:
        """Unload the image; does nothing if none is loaded."""
        self.calls.kexec_file_load(-1, -1, b"", KEXEC_FILE_UNLOAD)

    def write_kmsg(self, text: str) -> None:
        """Write a line to the kernel log; on a console it outlives this kernel, and the journal may not."""
        with contextlib.suppress(OSError):  # a container without /dev/kmsg works all the same
            self.calls.write_file(KMSG, f"<5>khod: {text}\n".encode())

    @contextlib.contextmanager
    def listen_to_log(self) -> Iterator[Callable[[re.Pattern[str]], str]]:
        """Open the kernel log, and yield a function that returns the kernel's own lines since then about a call."""
        try:
            log = self.calls.open_log()
        except OSError:  # a container without /dev/kmsg
            yield lambda _about: ""
            return

        def said(about: re.Pattern[str]) -> str:
            # v3's line about a failed activation has no newline, and is shown only when another record follows.
            self.write_kmsg("a call to the kernel failed")
            with contextlib.suppress(OSError):
                return kernel_log.relevant_lines(kernel_log.records_since(log), about)
            return ""

        with contextlib.closing(log):
            yield said

    def sync_disks(self) -> None:
        """Write back the dirty pages of every file system."""
        self.calls.sync_disks()

    def jump(self) -> None:
        """Jump: the point of no return, unless the kernel returns an OSError, after which a rollback follows."""
        self.calls.reboot_kexec()

    def _read_text(self, path: str) -> str:
        return self.calls.read_file(path).decode(errors="replace").strip()
