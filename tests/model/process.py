# SPDX-License-Identifier: LGPL-2.1-or-later
"""Processes of the modelled host: what each has open goes with it, and what a dead one does has no effect."""

import asyncio
import itertools
import stat
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

from khod.concurrency.worker import Worker, _set_outcome
from tests.model.clock import VirtualLoop
from tests.model.faults import FOREVER, Faults, Fiber, Killed

FIRST_FD = 1_000_000_000
"""Descriptors from here on are the model's; each number is used once, so that a late close hits nobody else's."""

_numbers = itertools.count(FIRST_FD)
_table: dict[int, tuple["Process", "File"]] = {}


class File:
    """What a descriptor refers to. `released` is called when the last one is closed, with the reason."""

    def __init__(self) -> None:
        self.refs = 0
        self.inode = next(_numbers)

    def released(self, cause: str) -> None:
        """Nothing refers to it any more."""


class Memory(File):
    """A memfd, with its content."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.content = content


class Process:
    """One process. `ended` are called once, when it ends."""

    def __init__(self, name: str, pid: int) -> None:
        self.name = name
        self.pid = pid
        self.alive = True
        self.fds: set[int] = set()
        self.on_end: list[Callable[[], None]] = []

    def open(self, file: File) -> int:
        fd = next(_numbers)
        _table[fd] = (self, file)
        self.fds.add(fd)
        file.refs += 1
        return fd

    def adopt(self, fd: int) -> int:
        """Own a descriptor that another process had made."""
        owner, file = _table[fd]
        owner.fds.discard(fd)
        self.fds.add(fd)
        _table[fd] = (self, file)
        return fd

    def close(self, fd: int, cause: str = "close") -> None:
        """Close; harmless where it is not open, as a dead process's code may come late."""
        if (found := _table.pop(fd, None)) is None:
            return
        owner, file = found
        owner.fds.discard(fd)
        file.refs -= 1
        if file.refs == 0:
            file.released(cause)

    def end(self) -> None:
        """SIGKILL."""
        if not self.alive:
            return
        self.alive = False
        for fd in list(self.fds):
            self.close(fd, f"death of {self.name}")
        for end in self.on_end:
            end()
        self.on_end.clear()


def file_of(fd: int) -> File:
    """What a descriptor of the model's refers to; OSError where it is closed."""
    if fd not in _table:
        raise OSError(9, "Bad file descriptor", f"fd {fd}")
    return _table[fd][1]


def status_of(fd: int) -> Any:
    """What fstat(2) says of it."""
    file = file_of(fd)
    size = len(file.content) if isinstance(file, Memory) else 0
    return SimpleNamespace(
        st_dev=77,
        st_ino=file.inode,
        st_size=size,
        st_mode=stat.S_IFREG | 0o600,
        st_blksize=4096,
        st_nlink=0,
        st_blocks=8,
    )


def close(fd: int) -> None:
    """Close a descriptor of the model's, whoever has it."""
    if (found := _table.get(fd)) is not None:
        found[0].close(fd)


def duplicate(fd: int) -> int:
    """dup(2)."""
    process, file = _table[fd][0], file_of(fd)
    return process.open(file)


def forget_all() -> None:
    """Close whatever an example left open, with nobody to hear of it."""
    _table.clear()


class PooledWorker(Worker):
    """A worker of khod's whose threads are the model's."""

    def __init__(self, pool: "Pool", subject: str, max_waiting: int) -> None:  # the parent's would start threads
        self._pool, self._subject, self._max_waiting = pool, subject, max_waiting
        self._jobs = cast("Any", pool.jobs)

    def call_later(self, function: Callable[[], object]) -> None:
        self._submit(function)

    def close(self) -> None:
        """Nothing: the calls that are queued are still made."""

    def _submit(self, function: Callable[[], Any]) -> "asyncio.Future[Any]":
        future = self._pool.run(function)
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        return future


class Jobs(deque[Any]):
    """Calls that are not begun yet."""

    def qsize(self) -> int:
        """How many there are, as a queue.SimpleQueue says it."""
        return len(self)


class Pool:
    """Threads of a khod, in virtual time: `width` calls side by side, the others wait behind them.

    Has what the standard library's executor has, and `run` for the event loop.
    """

    def __init__(self, process: Process, loop: VirtualLoop, faults: Faults, width: int | None) -> None:
        self._process, self._loop, self._faults = process, loop, faults
        self._width = width
        self._running = 0
        self.jobs = Jobs()
        self.hung: list[tuple[Fiber, Callable[[Any, BaseException | None], None]]] = []

    def run(self, function: Callable[[], Any]) -> "asyncio.Future[Any]":
        future = self._loop.create_future()

        self._enqueue(function, partial(_set_outcome, future))
        return future

    def submit(self, function: Callable[..., Any], *args: Any) -> "Future[Any]":
        future: Future[Any] = Future()

        def done(result: Any, error: BaseException | None) -> None:
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        if self._process.alive:
            self._enqueue(lambda: function(*args), done)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Nothing: the calls that are queued are still made."""

    def release(self) -> None:
        """Let every call that hangs for ever come back."""
        hung, self.hung = self.hung, []
        for fiber, done in hung:
            self._loop.call_soon(self._continue, fiber, done)

    def abandon(self, *, completes: bool) -> None:
        """The process was killed: a call that hangs in the kernel takes no effect, or still does."""
        hung, self.hung = self.hung, []
        self.jobs.clear()
        for fiber, _done in hung:
            if completes:
                fiber.resume()
            while not fiber.over:
                fiber.abandon()

    def _enqueue(self, function: Callable[[], Any], done: Callable[[Any, BaseException | None], None]) -> None:
        self.jobs.append((function, done))
        self._loop.call_soon(self._next)

    def _next(self) -> None:
        if not self.jobs or (self._width is not None and self._running >= self._width):
            return
        function, done = self.jobs.popleft()
        self._running += 1
        if self._faults.may_hang:
            self._continue(Fiber(function), done)
            return
        try:
            result, error = function(), None
        except BaseException as raised:  # noqa: BLE001 - as an executor's thread does
            result, error = None, raised
        self._end(result, error, done)

    def _continue(self, fiber: Fiber, done: Callable[[Any, BaseException | None], None]) -> None:
        entry = (fiber, done)
        if entry in self.hung:
            self.hung.remove(entry)
        seconds = fiber.resume()
        if seconds is None:
            result, error = fiber.outcome
            self._end(result, error, done)
            return
        self.hung.append(entry)
        if seconds != FOREVER:
            self._loop.call_later(seconds, self._come_back, entry)

    def _come_back(self, entry: tuple[Fiber, Callable[[Any, BaseException | None], None]]) -> None:
        if entry in self.hung:
            self._continue(*entry)

    def _end(self, result: Any, error: BaseException | None, done: Callable[[Any, BaseException | None], None]) -> None:
        self._running -= 1
        if isinstance(error, Killed):
            return
        done(result, error)
        if self.jobs:
            self._loop.call_soon(self._next)
