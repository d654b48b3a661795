# SPDX-License-Identifier: LGPL-2.1-or-later
"""Virtual time for coroutine tests: nothing is waited for, and what hangs hangs for as long as it would.

The clock stands still while anything can run and jumps to the next timer when nothing can. Calls to the host are made
in the event loop, so a test is alone in it: no thread, no process, no socket. A wait that nothing would ever end is
an error at once.
"""

import asyncio
import functools
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import pytest

from khod.concurrency.worker import Worker
from khod.kernel.thread import Workers
from khod.simulated.kernel import Rebooted
from tests.unit.harness import Host

P = ParamSpec("P")
T = TypeVar("T")


class HangsError(BaseException):
    """Raised in place of a call that does not come back."""


def never(*_arguments: object, **_more: object) -> Any:
    """Stand for a call that does not come back."""
    raise HangsError


class InlineWorker(Worker):
    """A worker without threads. A call that hangs is not come back from, nor from those behind it."""

    def __init__(self, name: str, subject: str) -> None:
        super().__init__(name, subject, threads=0)
        self._behind: list[Callable[[], None]] = []

    def come_back(self) -> None:
        """Let the call that hangs be made, and those behind it: what it raises HangsError in was mended."""
        behind, self._behind = self._behind, []
        for job in behind:
            self._run(job)

    def call_later(self, function: Callable[[], object]) -> None:
        def job() -> None:
            with suppress(Exception):
                function()

        self._run(job)

    def _submit(self, function: Callable[[], T]) -> "asyncio.Future[T]":
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def job() -> None:
            try:
                result = function()
            except Exception as error:  # noqa: BLE001 - it is the caller's
                if not future.done():
                    future.set_exception(error)
            else:
                if not future.done():
                    future.set_result(result)

        self._run(job)
        return future

    def _run(self, job: Callable[[], None]) -> None:
        if self._behind:
            self._behind.append(job)
            return
        try:
            job()
        except HangsError:
            self._behind.append(job)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes only where it would have to wait."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__()
        self._selector = vars(self)["_selector"]
        select = self._selector.select

        def skip(timeout: float | None = None) -> Any:
            ready = select(0)
            if not ready and timeout is None:
                raise AssertionError("everything waits, and nothing will ever happen")
            if not ready and timeout:
                self._now += timeout
            return ready

        self._selector.select = skip

    def time(self) -> float:
        return self._now


def in_virtual_time(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Make a test of a coroutine, run in virtual time."""

    @functools.wraps(test)
    def run(*arguments: P.args, **named: P.kwargs) -> None:
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            runner.run(test(*arguments, **named))

    return run


def now() -> float:
    """The event loop's time, in seconds."""
    return asyncio.get_running_loop().time()


class VirtualHost(Host):
    """A host without threads: what a test lets hang hangs in the worker that would hang."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.workers: Workers = Workers(
            *(InlineWorker(name, f"The {name} worker") for name in Workers.__dataclass_fields__)
        )

    async def jump(self) -> None:
        """Take the host to its next kernel, with a khod that is gone then."""
        engine = await self.started()
        with pytest.raises(Rebooted):
            await self.kexec(engine)
