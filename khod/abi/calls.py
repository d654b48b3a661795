# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel as a process sees it, in one interface: files below a root, and the calls that are not files.

`HostCalls` asks the running kernel. The simulated kernel (`khod.simulated.kernel`) implements the same calls, so
everything above this module runs on it unchanged.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Protocol

from khod.abi import fsfreeze, kexec_file_load, liveupdate, reboot
from khod.abi.named import os_error_context
from khod.abi.pidfd import pidfd_getfd
from khod.abi.statx import statx
from khod.dataclass import dataclass

KMSG = "/dev/kmsg"


@dataclass(frozen=True)
class Session:
    """A session as its descriptor shows it: `name` is "" and `incoming` None if this kernel does not tell (6.19)."""

    name: str
    incoming: bool | None


class Log(Protocol):
    """The kernel log from some moment on, such as /dev/kmsg opened unbuffered and O_NONBLOCK."""

    def read(self, size: int, /) -> bytes | None:
        """Return the next record, None or b"" at the end; OSError EPIPE if records before it were overwritten."""

    def close(self) -> None:
        """Close the log."""


class Calls(Protocol):
    """The kernel as seen from a process. Paths are absolute, below the implementation's root."""

    def read_file(self, path: str) -> bytes:
        """Read to end of file: debugfs files report size 0 to stat(2)."""

    def write_file(self, path: str, data: bytes) -> None:
        """Write `data` in one system call, as sysfs requires."""

    def path_exists(self, path: str) -> bool:
        """Whether the path exists and may be looked up."""

    def is_file(self, path: str) -> bool:
        """Whether the path is a regular file, or a link to one, which can be read without blocking."""

    def read_link(self, path: str) -> str:
        """Return the target of a symbolic link; a link in /proc/PID/ns names the namespace itself."""

    def list_directory(self, path: str) -> list[str]:
        """Return the names in a directory, sorted; an empty list if there is no such directory."""

    def temporary_directory(self, path: str) -> AbstractContextManager[None]:
        """Make a directory, and remove it at the end; in tracefs it is an instance, and not empty."""

    def modified_at(self, path: str) -> float:
        """Return when a file was last written, in seconds since the epoch."""

    def open_log(self, *, whole: bool = False) -> Log:
        """Open the kernel log after its last record, so that only later records are read.

        With `whole` it is opened at the first record that is left of this boot.
        """

    def kexec_file_load(self, kernel_fd: int, initrd_fd: int, cmdline: bytes, flags: int) -> None:
        """Load an image: `cmdline` ends in NUL; `initrd_fd` is -1 with KEXEC_FILE_NO_INITRAMFS."""

    def reboot_kexec(self) -> None:
        """Jump into the loaded image; returns only by raising OSError."""

    def sync_disks(self) -> None:
        """Write back all dirty pages of all file systems."""

    def freeze_filesystem(self, path: str) -> None:
        """Freeze the file system that is mounted there (FIFREEZE); EBUSY if it is frozen already."""

    def thaw_filesystem(self, path: str) -> None:
        """Thaw it again (FITHAW); EINVAL if it is not frozen."""

    def create_session(self, name: str) -> int:
        """Create an outgoing LUO session and return its descriptor; closing the last copy of it undoes the call."""

    def retrieve_session(self, name: str) -> int:
        """Return the descriptor of a session that the previous kernel handed over; possible once in a boot."""

    def preserve_fd(self, session: int, fd: int, token: int) -> None:
        """Preserve what `fd` refers to, under a token the session does not have yet."""

    def retrieve_fd(self, session: int, token: int) -> int:
        """Return a new descriptor for a file of a retrieved session."""

    def finish_session(self, session: int) -> None:
        """End a retrieved session; files that were not retrieved are freed."""

    def describe_session(self, pid: int, fd: int) -> Session | None:
        """Describe the LUO session that a process has open; None if the descriptor is another kind of file."""


class HostCalls:
    """The running kernel, with its files below `root` (`/`, or a directory in tests).

    One class of this size: it has a method for each call of the protocol.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root

    def host_path(self, path: str) -> Path:
        """Return the path below the root for an absolute kernel path."""
        return self.root / path.lstrip("/")

    def read_file(self, path: str) -> bytes:
        with os_error_context(f"read {path}"), open(self.host_path(path), "rb", buffering=0) as file:
            return file.readall()  # v3's dt comes one page a call, into one buffer of the size that sysfs reports

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

    @contextmanager
    def temporary_directory(self, path: str) -> Iterator[None]:
        with os_error_context(f"mkdir {path}"), suppress(FileExistsError):  # of a khod that was killed meanwhile
            os.mkdir(self.host_path(path), 0o700)
        try:
            yield
        finally:
            with os_error_context(f"rmdir {path}"):
                os.rmdir(self.host_path(path))

    def modified_at(self, path: str) -> float:
        with os_error_context(f"stat {path}"):
            return self.host_path(path).stat().st_mtime

    def open_log(self, *, whole: bool = False) -> Log:
        with os_error_context(f"open {KMSG}"):
            fd = os.open(self.host_path(KMSG), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(fd, 0, os.SEEK_SET if whole else os.SEEK_END)
            return os.fdopen(fd, "rb", buffering=0)

    def kexec_file_load(self, kernel_fd: int, initrd_fd: int, cmdline: bytes, flags: int) -> None:
        kexec_file_load.kexec_file_load(kernel_fd, initrd_fd, cmdline, flags)

    def reboot_kexec(self) -> None:
        reboot.reboot(reboot.LINUX_REBOOT_CMD_KEXEC)

    def sync_disks(self) -> None:
        os.sync()

    def freeze_filesystem(self, path: str) -> None:
        with self._open_mount(path) as mount:
            fsfreeze.freeze_filesystem(mount)

    def thaw_filesystem(self, path: str) -> None:
        with self._open_mount(path) as mount:
            fsfreeze.thaw_filesystem(mount)

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

    def describe_session(self, pid: int, fd: int) -> Session | None:
        copy = pidfd_getfd(pid, fd)
        try:
            if stat.S_IFMT(statx(copy).mode):  # an anonymous inode has no type; an ioctl on a real file might hang
                return None
            return Session(liveupdate.get_name(copy), liveupdate.is_incoming(copy))
        except OSError as error:
            if error.errno == errno.ENOTTY:
                return None
            if error.errno == errno.EINVAL:  # 6.19
                return Session("", None)
            raise
        finally:
            os.close(copy)  # at once: closing the last copy ends the session

    @contextmanager
    def _open_mount(self, path: str) -> Iterator[int]:
        with os_error_context(f"open {path}"):
            mount = os.open(self.host_path(path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            with os_error_context(path):
                yield mount
        finally:
            os.close(mount)

    @contextmanager
    def _open_liveupdate(self) -> Iterator[int]:
        """Open the device and close it again: only one process may have it open, and PID 1 needs it too."""
        device = liveupdate.open_device(self.host_path(liveupdate.LIVEUPDATE))
        try:
            yield device
        finally:
            os.close(device)
