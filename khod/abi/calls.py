# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a process can ask of the kernel, as one seam: files below a root, and the calls that are no files.

`HostCalls` asks the running kernel. The simulated kernel (`khod.simulated.kernel`) answers the same
calls, so everything above this line runs on it unchanged.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from khod.abi import kexec_file_load, liveupdate, reboot
from khod.abi.named import os_error_context
from khod.abi.pidfd import pidfd_getfd
from khod.abi.statx import statx

LIVEUPDATE = "/dev/liveupdate"
KMSG = "/dev/kmsg"


class Log(Protocol):
    """The kernel log from some moment on; /dev/kmsg, opened unbuffered and O_NONBLOCK, is one."""

    def read(self, size: int, /) -> bytes | None:
        """Give the next record, None or b"" where there is no more; EPIPE where records were overwritten before it."""

    def close(self) -> None:
        """Read no more."""


class Calls(Protocol):
    """The kernel as seen from a process. Paths are absolute, below the implementation's root."""

    def read_file(self, path: str) -> bytes:
        """Read to end of file: debugfs files report size 0 to stat(2)."""

    def write_file(self, path: str, data: bytes) -> None:
        """Hand `data` over in one system call, as sysfs wants it."""

    def path_exists(self, path: str) -> bool:
        """Tell whether the path is there and may be looked at."""

    def is_file(self, path: str) -> bool:
        """Tell whether the path is a regular file, or a link to one: what can be read without waiting for anybody."""

    def read_link(self, path: str) -> str:
        """Give what a symbolic link names; those of /proc/PID/ns name the namespace itself."""

    def list_directory(self, path: str) -> list[str]:
        """Names in a directory, sorted; empty where there is none."""

    def open_log(self) -> Log:
        """Open the kernel log behind its last record: what is read from there was logged since."""

    def kexec_file_load(self, kernel_fd: int, initrd_fd: int, cmdline: bytes, flags: int) -> None:
        """Load an image: `cmdline` ends in NUL, `initrd_fd` is -1 with KEXEC_FILE_NO_INITRAMFS."""

    def reboot_kexec(self) -> None:
        """Jump into the loaded image: it comes back only with an OSError."""

    def sync_disks(self) -> None:
        """Write back all dirty pages of all file systems."""

    def create_session(self, name: str) -> int:
        """Make an outgoing LUO session; its descriptor is the caller's, and closing the last one is its undo."""

    def retrieve_session(self, name: str) -> int:
        """Take a session the previous kernel handed over, once in a boot; its file descriptor."""

    def preserve_fd(self, session: int, fd: int, token: int) -> None:
        """Preserve what `fd` refers to, under a token the session does not have yet."""

    def retrieve_fd(self, session: int, token: int) -> int:
        """Give a file of a retrieved session, a new descriptor each time."""

    def finish_session(self, session: int) -> None:
        """Let go of a retrieved session: what was not retrieved is freed."""

    def describe_session(self, pid: int, fd: int) -> liveupdate.Session | None:
        """Describe the LUO session that a process has open; None where that is another kind of file."""


class HostCalls:
    """The running kernel, with its files below `root` (a test's directory, `/` otherwise)."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root

    def host_path(self, path: str) -> Path:
        """Place an absolute kernel path below the root."""
        return self.root / path.lstrip("/")

    def read_file(self, path: str) -> bytes:
        with os_error_context(f"read {path}"), open(self.host_path(path), "rb", buffering=0) as file:
            return file.readall()  # v3's dt, a page each call, into one buffer of the size that sysfs reports

    def write_file(self, path: str, data: bytes) -> None:
        with os_error_context(f"write {data.decode(errors='replace').strip()!r} to {path}"):
            fd = os.open(self.host_path(path), os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, data)
            finally:
                os.close(fd)

    def path_exists(self, path: str) -> bool:
        return self.host_path(path).exists()

    def is_file(self, path: str) -> bool:
        return self.host_path(path).is_file()

    def read_link(self, path: str) -> str:
        with os_error_context(f"readlink {path}"):
            return os.readlink(self.host_path(path))

    def list_directory(self, path: str) -> list[str]:
        try:
            return sorted(os.listdir(self.host_path(path)))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def open_log(self) -> Log:
        with os_error_context(f"open {KMSG}"):
            fd = os.open(self.host_path(KMSG), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(fd, 0, os.SEEK_END)
            return os.fdopen(fd, "rb", buffering=0)

    def kexec_file_load(self, kernel_fd: int, initrd_fd: int, cmdline: bytes, flags: int) -> None:
        kexec_file_load.kexec_file_load(kernel_fd, initrd_fd, cmdline, flags)

    def reboot_kexec(self) -> None:
        reboot.reboot(reboot.LINUX_REBOOT_CMD_KEXEC)

    def sync_disks(self) -> None:
        os.sync()

    def create_session(self, name: str) -> int:
        with self._open_liveupdate() as device:
            return liveupdate.create_session(device, name)

    def retrieve_session(self, name: str) -> int:
        with self._open_liveupdate() as device:
            return liveupdate.retrieve_session(device, name)

    def preserve_fd(self, session: int, fd: int, token: int) -> None:
        liveupdate.preserve_fd(session, fd, token)

    def retrieve_fd(self, session: int, token: int) -> int:
        return liveupdate.retrieve_fd(session, token)

    def finish_session(self, session: int) -> None:
        liveupdate.finish_session(session)

    def describe_session(self, pid: int, fd: int) -> liveupdate.Session | None:
        copy = pidfd_getfd(pid, fd)
        try:
            if stat.S_IFMT(statx(copy).mode):  # an anonymous inode has no type; a real file's ioctl might hang
                return None
            return liveupdate.Session(liveupdate.get_name(copy), liveupdate.is_incoming(copy))
        except OSError as error:
            if error.errno == errno.ENOTTY:
                return None
            if error.errno == errno.EINVAL:  # 6.19
                return liveupdate.Session("", None)
            raise
        finally:
            os.close(copy)  # at once: the last one to close a session ends it

    @contextmanager
    def _open_liveupdate(self) -> Iterator[int]:
        """Open the device and close it again: one process may have it at a time, and PID 1 wants it too."""
        device = liveupdate.open_device(self.host_path(LIVEUPDATE))
        try:
            yield device
        finally:
            os.close(device)
