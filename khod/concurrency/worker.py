# SPDX-License-Identifier: LGPL-2.1-or-later
"""Threads for calls that may hang; each kind of call has its own, so that a hanging call delays no other kind.

The threads are started with the worker, because a rollback must not depend on whether a new thread is available
(TasksMax=). They are daemon threads, because a call that never returns must not keep khod from ending.
"""

import asyncio
import queue
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from khod.errors import Failed

T = TypeVar("T")
Job = Callable[[], None]


class Worker:
    """Runs calls in order, `threads` at a time; a deadline ends the caller's wait, never the call.

    `subject` is the subject of the sentence that a missed deadline becomes. While `max_waiting` calls wait to begin,
    the next one is refused at once.
    """

    def __init__(self, name: str, subject: str, *, threads: int = 1, max_waiting: int = 1 << 16) -> None:
        self._subject = subject
        self._max_waiting = max_waiting
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._threads = threads
        for number in range(threads):
            threading.Thread(target=_run_jobs, args=(self._jobs,), name=f"{name}-{number}", daemon=True).start()
        self._end = weakref.finalize(self, _end_threads, self._jobs, threads)

    async def call_within(
        self,
        function: Callable[[], T],
        what: str,
        deadline: float | None,
        late: Callable[[T], object] | None = None,
    ) -> T:
        """Return or raise what `function` does; Failed after `deadline` seconds, while the call continues.

        With None the wait has no limit: the caller must be one that can be cancelled. A result that comes when the
        caller no longer waits is given to `late`, in the event loop: a descriptor must be closed, or kept.
        """
        if self._jobs.qsize() >= self._max_waiting:
            raise Failed(f"{self._subject} does not keep up: {self._jobs.qsize()} calls wait", where=what)
        future = self._submit(function)
        try:
            await asyncio.wait({future}, timeout=deadline)
            if future.done():
                late = None
                return future.result()
        finally:
            if late is not None:
                future.add_done_callback(partial(_hand_over, late))
        raise Failed(
            f"{self._subject} did not come back from {what} within {deadline:g} s",
            where=what,
            remedy="The call cannot be interrupted; khoctl status shows when it has ended.",
        )

    def call_later(self, function: Callable[[], object]) -> None:
        """Queue a call and return at once; what it raises is lost. While `max_waiting` calls wait, it is dropped."""
        if self._jobs.qsize() >= self._max_waiting:
            return

        def run() -> None:
            with suppress(Exception):  # nobody waits for it
                function()

        self._jobs.put(run)

    def close(self) -> None:
        """End the threads after their last call."""
        self._end()

    def _submit(self, function: Callable[[], T]) -> "asyncio.Future[T]":
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        future.add_done_callback(_retrieve_exception)

        def run() -> None:
            result, error = None, None
            try:
                result = function()
            except BaseException as raised:  # noqa: BLE001 - every exception is passed to the caller
                error = raised
            try:
                loop.call_soon_threadsafe(_set_outcome, future, result, error)
            except RuntimeError:  # the loop has ended, and its callers with it
                return

        self._jobs.put(run)
        return future


def _run_jobs(jobs: "queue.SimpleQueue[Job | None]") -> None:
    while (job := jobs.get()) is not None:
        job()
        del job  # otherwise its objects are kept until the next job


def _end_threads(jobs: "queue.SimpleQueue[Job | None]", threads: int) -> None:
    for _ in range(threads):
        jobs.put(None)


def _set_outcome(future: "asyncio.Future[Any]", result: object, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    elif isinstance(error, (StopIteration, asyncio.CancelledError)):  # a waiting task would misread them
        future.set_exception(RuntimeError(repr(error)))
    else:
        future.set_exception(error)


def _hand_over(late: Callable[[T], object], future: "asyncio.Future[T]") -> None:
    if not future.cancelled() and future.exception() is None:
        late(future.result())


def _retrieve_exception(future: "asyncio.Future[Any]") -> None:
    """Mark an error as retrieved: the caller may have stopped waiting."""
    if not future.cancelled():
        future.exception()
