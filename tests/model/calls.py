# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel as one khod calls it: here a call can fail, hang, or be the last one."""

import errno
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from khod.abi.calls import KMSG, Session
from khod.abi.kexec_file_load import KEXEC_FILE_UNLOAD
from tests.model.kernel import MemoryKernel
from tests.model.luo import refuse
from tests.model.process import Process


class _Log:
    """The kernel log from its end on, as /dev/kmsg gives it."""

    def __init__(self, log: list[str]) -> None:
        self._log, self._at = log, len(log)

    def read(self, _size: int, /) -> bytes:
        if self._at >= len(self._log):
            return b""
        self._at += 1
        return b"3,0,0,-;" + self._log[self._at - 1].encode()

    def close(self) -> None:
        """Nothing to close."""


@dataclass(frozen=True)
class KernelCalls:
    """The kernel as one process calls it (`khod.abi.calls.Calls`); `point` is called before and after each call."""

    kernel: MemoryKernel
    process: Process
    point: Callable[[str, str], None]
    jump: Callable[[], None]
    synced: Callable[[], None]
    finished: Callable[[str], None]
    """Called with the name of a session that was finished."""

    @contextmanager
    def _at(self, site: str) -> Iterator[None]:
        self.point(site, "before")
        yield
        self.point(site, "after")

    def read_file(self, path: str) -> bytes:
        self.point("kernel.read", "before")
        return self.kernel.read(path)

    def write_file(self, path: str, data: bytes) -> None:
        if path == KMSG:
            self.kernel.write(path, data)
            return
        with self._at("kernel.write"):
            self.kernel.write(path, data, by="khod")

    def is_file(self, path: str) -> bool:
        return self.path_exists(path)

    def read_link(self, path: str) -> str:
        raise refuse(errno.ENOENT, f"readlink {path}")

    def path_exists(self, path: str) -> bool:
        return self.kernel.exists(path)

    def list_directory(self, path: str) -> list[str]:
        return self.kernel.listdir(path)

    def temporary_directory(self, path: str) -> AbstractContextManager[None]:
        raise refuse(errno.ENOENT, f"mkdir {path}")

    def modified_at(self, path: str) -> float:
        raise refuse(errno.ENOENT, f"stat {path}")

    def open_log(self, *, whole: bool = False) -> _Log:
        return _Log([] if whole else self.kernel.log)  # a log that is not complete is no evidence

    def kexec_file_load(self, kernel_fd: int, initrd_fd: int, cmdline: bytes, flags: int) -> None:
        with self._at("kernel.unload" if flags & KEXEC_FILE_UNLOAD else "kernel.load"):
            self.kernel.load(kernel_fd, initrd_fd, cmdline, flags, by="khod")

    def reboot_kexec(self) -> None:
        with self._at("kernel.reboot"):
            if not self.kernel.loaded:
                raise refuse(errno.EINVAL, "reboot(LINUX_REBOOT_CMD_KEXEC)")
            self.jump()

    def sync_disks(self) -> None:
        with self._at("kernel.sync"):
            self.synced()

    def freeze_filesystem(self, path: str) -> None:
        """Never called: this kernel lists no mounts."""

    def thaw_filesystem(self, path: str) -> None:
        """As above."""

    def create_session(self, name: str) -> int:
        with self._at("luo.create"):
            return self.kernel.luo.create(self.process, name)

    def retrieve_session(self, name: str) -> int:
        self.point("luo.retrieve", "before")
        return self.kernel.luo.retrieve(self.process, name)

    def preserve_fd(self, session: int, fd: int, token: int) -> None:
        with self._at("luo.preserve"):
            self.kernel.luo.preserve(session, fd, token)

    def retrieve_fd(self, session: int, token: int) -> int:
        with self._at("luo.retrieve_fd"):
            return self.kernel.luo.retrieve_fd(self.process, session, token)

    def finish_session(self, session: int) -> None:
        with self._at("luo.finish"):
            self.finished(self.kernel.luo.finish(session))

    def describe_session(self, pid: int, fd: int) -> Session | None:
        raise refuse(errno.ESRCH, f"pidfd_getfd({pid}, {fd})")
