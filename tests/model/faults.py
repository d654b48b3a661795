# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where something can go wrong: every call of a collaborator is a point, before it and after it."""

import asyncio
import errno
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from khod.errors import ConfigError, Failed, KhoError, NotRolledBack, RecordError, Refused, Unsupported
from khod.producers.barrier import ParticipantVeto

FOREVER = float("inf")

SYNC_SITES = (
    "kernel.read",
    "kernel.write",
    "kernel.load",
    "kernel.unload",
    "kernel.reboot",
    "kernel.sync",
    "luo.create",
    "luo.retrieve",
    "luo.preserve",
    "luo.retrieve_fd",
    "luo.finish",
    "disk.read",
    "disk.open",
    "disk.fsync",
    "disk.rename",
    "disk.mkdir",
    "disk.space",
    "files.take",
    "prober",
)
"""Calls that block: they are made in threads, can hang there, and come back when they do."""

LOOP_SITES = (
    "tell",
    "guard.start",
    "guard.stop",
    "guard.look",
    "fdstore.put",
    "fdstore.remove",
    "producers",
    "registrations",
)
"""Calls made from the event loop: they raise or they are done."""

ASYNC_SITES = (
    "producer.tell",
    "producer.returned",
    "producer.leave",
    "fdstore.settle",
    "systemctl",
    "systemd.asked",
    "inhibitors",
)
"""Coroutines."""

SITES = (*SYNC_SITES, *LOOP_SITES, *ASYNC_SITES)


class Killed(BaseException):
    """SIGKILL, or the kernel it ran on is gone: unwinds what was running; nothing it does any more has an effect."""


class Odd(Exception):
    """An exception of no class that anybody expects."""


def _os_error(number: int) -> Callable[[str], BaseException]:
    return lambda site: OSError(number, os.strerror(number), site)


def _unicode(_site: str) -> BaseException:
    return UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")


EXCEPTIONS: dict[str, Callable[[str], BaseException]] = {
    "EIO": _os_error(errno.EIO),
    "EBUSY": _os_error(errno.EBUSY),
    "EINVAL": _os_error(errno.EINVAL),
    "ENOMEM": _os_error(errno.ENOMEM),
    "ENOENT": _os_error(errno.ENOENT),
    "EPERM": _os_error(errno.EPERM),
    "EMFILE": _os_error(errno.EMFILE),
    "ENOSPC": _os_error(errno.ENOSPC),
    "EPIPE": _os_error(errno.EPIPE),
    "ValueError": lambda site: ValueError(f"embedded null byte at {site}"),
    "RuntimeError": lambda site: RuntimeError(f"can't start new thread at {site}"),
    "MemoryError": lambda _site: MemoryError(),
    "KeyError": KeyError,
    "AssertionError": AssertionError,
    "UnicodeDecodeError": _unicode,
    "TimeoutError": lambda _site: TimeoutError(),
    "CancelledError": lambda _site: asyncio.CancelledError(),
    "Odd": Odd,
    "KhoError": lambda site: KhoError("something", where=site),
    "Failed": lambda site: Failed("failed", where=site),
    "Refused": lambda site: Refused("refused", where=site),
    "Unsupported": lambda site: Unsupported("unsupported", where=site),
    "RecordError": lambda site: RecordError("The record cannot be read: no room", where=site),
    "ConfigError": lambda site: ConfigError("wrong", where=site),
    "NotRolledBack": lambda site: NotRolledBack("held", where=site),
    "Veto": lambda site: ParticipantVeto(f"no at {site}"),
}
"""What a collaborator raises, by name; KeyboardInterrupt and SystemExit end a process and are not among them."""


@dataclass
class Fault:
    """One thing that goes wrong at the nth call of a site: an exception by name, or a hang (seconds)."""

    site: str
    when: str = "before"
    error: str = ""
    seconds: float = 0.0
    nth: int = 1


class Fiber:
    """A blocking call that may hang half-way: made in another thread, and only one thread runs at any time."""

    current: "Fiber | None" = None
    _idle: ClassVar[list["_Thread"]] = []

    def __init__(self, function: Callable[[], object]) -> None:
        self.function = function
        self.outcome: tuple[object, BaseException | None] = (None, None)
        self.abandoned = False
        self.over = False
        self._seconds: float | None = None
        self._thread = self._idle.pop() if self._idle else _Thread()
        self._thread.fiber = self

    def resume(self) -> float | None:
        """Let it run on; the seconds it then hangs for, None where it has come to its end."""
        before, Fiber.current = Fiber.current, self
        self._seconds = None
        self._thread.switch()
        Fiber.current = before
        if self.over:
            self._idle.append(self._thread)
        return self._seconds

    def stall(self, seconds: float) -> None:
        """Hang; called from within."""
        self._seconds = seconds
        self._thread.give_back()
        if self.abandoned:
            raise Killed

    def abandon(self) -> None:
        """End it where it hangs."""
        self.abandoned = True
        self.resume()


class _Thread:
    """A thread that makes one blocking call after the other, each when it is its turn."""

    def __init__(self) -> None:
        self.fiber: Fiber | None = None
        self._go, self._back = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._back.acquire()
        threading.Thread(target=self._run, daemon=True).start()

    def switch(self) -> None:
        """Have it run until it hangs or is done."""
        self._go.release()
        self._back.acquire()

    def give_back(self) -> None:
        """Stop here, until it is its turn again; called in the thread."""
        self._back.release()
        self._go.acquire()

    def _run(self) -> None:
        self._go.acquire()
        while True:
            fiber = self.fiber
            assert fiber is not None, "a thread is given its call before its turn"
            try:
                fiber.outcome = fiber.function(), None
            except BaseException as error:  # noqa: BLE001 - whatever it is, it is the call's outcome
                fiber.outcome = None, error
            fiber.over = True
            self.give_back()


class Faults:
    """What is to go wrong next, and when khod is to be killed."""

    def __init__(self) -> None:
        self.armed: list[Fault] = []
        self.kill: Fault | None = None
        self.killed_at = ("", "")
        """Where khod died last by a rule."""
        self.points = 0
        self.fired = 0

    @property
    def may_hang(self) -> bool:
        """Whether a blocking call could hang: then it needs a thread."""
        return any(fault.seconds and fault.site in SYNC_SITES for fault in self.armed)

    def clear(self) -> None:
        self.armed.clear()
        self.kill = None

    def at(self, site: str, when: str) -> Fault | None:
        """The fault that is due here, taken; counts the point."""
        self.points += 1
        for number, fault in enumerate(self.armed):
            if fault.site != site or fault.when != when:
                continue
            if fault.seconds and site in SYNC_SITES and Fiber.current is None:
                continue  # a call that is not made in a thread does not hang
            if fault.seconds and site in LOOP_SITES:
                continue
            fault.nth -= 1
            if fault.nth <= 0:
                del self.armed[number]
                self.fired += 1
                return fault
        return None

    def kills(self, site: str, when: str) -> bool:
        """Whether khod dies at this point."""
        if (kill := self.kill) is None or kill.when != when or kill.site not in ("", site):
            return False
        kill.nth -= 1
        if kill.nth > 0:
            return False
        self.kill, self.killed_at = None, (site, when)
        return True
