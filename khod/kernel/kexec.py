# SPDX-License-Identifier: LGPL-2.1-or-later
"""What no generation changes: the image slot, the jump, and who this boot is."""

import contextlib
import re
from collections.abc import Callable, Iterator

from khod.abi.calls import KMSG, Calls
from khod.abi.kexec_file_load import KEXEC_FILE_NO_INITRAMFS, KEXEC_FILE_UNLOAD
from khod.kernel.log import records_since, relevant_lines

# The first from 6.19, the second before and after it.
LOADED = ("/sys/kernel/kexec/loaded", "/sys/kernel/kexec_loaded")
BOOT_ID = "/proc/sys/kernel/random/boot_id"
UPTIME = "/proc/uptime"
LOAD_DISABLED = "/proc/sys/kernel/kexec_load_disabled"
LOAD_LIMIT = "/proc/sys/kernel/kexec_load_limit_reboot"


class Kexec:
    """The running kernel's kexec side. Calls raise OSError with the call's name and path."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls

    def boot_id(self) -> str:
        """This boot's UUID: another one after every boot, a kexec included."""
        return self._read_text(BOOT_ID)

    def kernel_release(self) -> str:
        """The running kernel's version as uname -r says it."""
        return self._read_text("/proc/sys/kernel/osrelease")

    def uptime(self) -> float | None:
        """Seconds since boot by CLOCK_BOOTTIME; None where the kernel does not say."""
        if self.calls.path_exists(UPTIME):
            with contextlib.suppress(ValueError, IndexError):
                return float(self.calls.read_file(UPTIME).split()[0])
        return None

    def cmdline(self) -> str:
        """The running kernel's command line; bytes that are no UTF-8 stand as surrogates."""
        return self.calls.read_file("/proc/cmdline").removesuffix(b"\n").decode(errors="surrogateescape")

    def is_loaded(self) -> bool:
        """Tell whether an image waits for the next kexec; the crash slot is another matter and left alone."""
        for path in LOADED:
            if self.calls.path_exists(path):
                return self._read_text(path) == "1"
        return False

    def load_disabled(self) -> bool:
        """Tell whether the sysctl kexec_load_disabled is set: it stays so until a reboot."""
        return self.calls.path_exists(LOAD_DISABLED) and self._read_text(LOAD_DISABLED) != "0"

    def load_limit(self) -> int | None:
        """How many more calls kexec_load_limit_reboot allows, None for no limit.

        An unload counts as a call (kexec_load_permitted() runs before the flags are looked at), so
        a load that can be undone needs two.
        """
        if not self.calls.path_exists(LOAD_LIMIT):
            return None
        left = int(self._read_text(LOAD_LIMIT))
        return None if left < 0 else left

    def load_image(self, kernel_fd: int, initrd_fd: int | None, cmdline: str) -> None:
        """Load an image; what is in the state tree at this moment goes with it."""
        flags = KEXEC_FILE_NO_INITRAMFS if initrd_fd is None else 0
        fd = -1 if initrd_fd is None else initrd_fd
        self.calls.kexec_file_load(kernel_fd, fd, cmdline.encode() + b"\0", flags)

    def unload_image(self) -> None:
        """Drop the loaded image; nothing happens where there is none."""
        self.calls.kexec_file_load(-1, -1, b"", KEXEC_FILE_UNLOAD)

    def write_kmsg(self, text: str) -> None:
        """Leave a line in the kernel log: on a console it outlives this kernel, when the journal may not."""
        with contextlib.suppress(OSError):  # a container without /dev/kmsg goes on all the same
            self.calls.write_file(KMSG, f"<5>khod: {text}\n".encode())

    @contextlib.contextmanager
    def listen_to_log(self) -> Iterator[Callable[[re.Pattern[str]], str]]:
        """Listen to the kernel log; what is given quotes the kernel's own lines since, those that are about a call."""
        try:
            log = self.calls.open_log()
        except OSError:  # a container without /dev/kmsg
            yield lambda _about: ""
            return

        def said(about: re.Pattern[str]) -> str:
            # v3's line on a failed activation ends without a newline, and shows only when another follows it.
            self.write_kmsg("a call to the kernel failed")
            with contextlib.suppress(OSError):
                return relevant_lines(records_since(log), about)
            return ""

        with contextlib.closing(log):
            yield said

    def sync_disks(self) -> None:
        """Write back every file system's dirty pages."""
        self.calls.sync_disks()

    def jump(self) -> None:
        """Go: the point of no return, unless the kernel comes back with an OSError, which a rollback follows."""
        self.calls.reboot_kexec()

    def _read_text(self, path: str) -> str:
        return self.calls.read_file(path).decode(errors="replace").strip()
