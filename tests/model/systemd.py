# SPDX-License-Identifier: LGPL-2.1-or-later
"""The service manager: khod's descriptors that outlive it, and the shutdown that ends in a kexec."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tests.model.luo import MemoryLuo
from tests.model.process import Process, duplicate


@dataclass
class Job:
    """A shutdown that is under way: `kexec` is systemctl kexec's, else a plain reboot; `by` who asked for it."""

    kexec: bool
    by: str
    run: str = ""
    called_back: bool = False
    """Whether khod has said since that everything was put back."""
    forced: bool = False
    """Whether it was put back by force while systemd did not answer: somebody knew more than khod."""


class ServiceManager:
    """PID 1, whose descriptors go only with its kernel."""

    def __init__(self) -> None:
        self.process = Process("systemd", 1)
        self.kept: dict[str, int] = {}
        self.carries = True
        """Whether it brings LUO sessions over its own shutdown (systemd 261)."""
        self.answers = True
        """Whether it says what it is about."""
        self.job: Job | None = None

    def put(self, name: str, fd: int) -> None:
        copy = duplicate(fd)
        self.kept[name] = self.process.adopt(copy)

    def remove(self, name: str) -> None:
        if (fd := self.kept.pop(name, None)) is not None:
            self.process.close(fd)

    def pass_to(self, khod: Process) -> dict[str, int]:
        """What the next khod is started with."""
        return {name: khod.adopt(duplicate(fd)) for name, fd in self.kept.items()}

    def begin(self, *, kexec: bool, by: str, run: str = "") -> None:
        """Begin a shutdown, unless one is under way."""
        if self.job is None:
            self.job = Job(kexec, by, run)

    def boot(self, luo: MemoryLuo, *, orderly: bool) -> None:
        """Start in the next kernel; after an orderly kexec it has the sessions that it carried over."""
        names = list(self.kept)
        self.kept, self.job = {}, None
        self.process = Process("systemd", 1)
        if orderly and self.carries:
            for name in names:
                if name in luo.arrived:
                    self.kept[name] = luo.retrieve(self.process, name)


@dataclass(frozen=True)
class KhodsStore:
    """The store as one khod reaches it (`khod.systemd.fdstore.FdStore`)."""

    manager: ServiceManager
    point: Callable[[str, str], None]
    settled: Callable[[], Awaitable[None]]

    def store_fd(self, name: str, fd: int) -> None:
        self.point("fdstore.put", "before")
        self.manager.put(name, fd)
        self.point("fdstore.put", "after")

    def wait_sent(self) -> None:
        pass

    def remove_fd(self, name: str) -> None:
        self.point("fdstore.remove", "before")
        self.manager.remove(name)
        self.point("fdstore.remove", "after")

    async def wait_settled(self) -> None:
        await self.settled()
