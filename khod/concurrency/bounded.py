# SPDX-License-Identifier: LGPL-2.1-or-later
"""Waiting with a time limit that holds whatever the awaited task does, even if it ignores its cancellation."""

import asyncio
from collections.abc import Awaitable, Iterable
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")
ANYTHING = (Exception, asyncio.CancelledError)
"""What a collaborator may raise, whatever it promises."""
CUT_SECONDS = 2.0
"""Seconds a cancelled task has to end; then it is left running. All waits of a task after its cancellation add up to
less: this limit is for unexpected cases."""
Since: TypeAlias = "asyncio.Future[None] | None"
"""When a time limit begins, if that is not now."""

_left_alone: "set[asyncio.Future[Any]]" = set()
"""Cancelled tasks that have not ended: without this reference they could be garbage-collected before their end."""


class StillRuns(TimeoutError):
    """The task did not end in time and still runs."""


async def run_within(seconds: float, work: Awaitable[T], since: Since = None) -> T:
    """Return or raise what `work` does; TimeoutError after `seconds`, and at most CUT_SECONDS later.

    With `since` the seconds count from when that is done; `work` begins at once.

    `work` runs in a task of its own. It is cancelled once, at its deadline or when the caller is cancelled. If it does
    not end then, it is left running, and StillRuns is raised. A cancellation that came from neither becomes a
    RuntimeError, so that the caller does not take it for its own.
    """
    task = asyncio.ensure_future(work)
    overdue = False
    try:
        await wait_within(seconds, [task], since)
    finally:
        if not task.done():
            overdue = True
            _left_alone.add(task)
            task.add_done_callback(_let_go)
            task.cancel()
            await settle_task(task, CUT_SECONDS)
    if not task.done():
        raise StillRuns(f"it did not end within {seconds:g} s, and goes on")
    if overdue and task.cancelled():
        raise TimeoutError(f"it did not end within {seconds:g} s")
    if task.cancelled():
        raise RuntimeError("it was cancelled, and nobody asked for that")
    return task.result()


async def wait_within(seconds: float, tasks: "Iterable[asyncio.Future[Any]]", since: Since = None) -> None:
    """Wait until all tasks are done, at most `seconds`, which count from when `since` is done."""
    pending = {*tasks}
    while pending and since is not None and not since.done():
        done, _ = await asyncio.wait({since, *pending}, return_when=asyncio.FIRST_COMPLETED)
        pending -= done
    if pending:
        await asyncio.wait(pending, timeout=seconds)


async def settle_task(task: "asyncio.Future[Any]", seconds: float) -> bool:
    """Wait at most `seconds` for the end of a task, and return whether it has ended.

    A cancellation of the caller is raised after the wait.
    """
    loop = asyncio.get_running_loop()
    deadline, cancelled = loop.time() + seconds, None
    while not task.done() and (left := deadline - loop.time()) > 0:
        try:
            await asyncio.wait({task}, timeout=left)
        except asyncio.CancelledError as error:
            cancelled = error
    if task.done() and not task.cancelled():
        task.exception()  # marks the exception as retrieved
    if cancelled is not None:
        raise cancelled
    return task.done()


def _let_go(task: "asyncio.Future[Any]") -> None:
    _left_alone.discard(task)
    if not task.cancelled():
        task.exception()  # marks it as retrieved; otherwise the event loop logs it


def raise_if_cancelling(error: BaseException) -> None:
    """Raise `error` if this task is cancelled from outside: khod's event loop ends, and nothing may be undone."""
    task = asyncio.current_task()
    if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
        raise error
