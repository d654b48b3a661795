# SPDX-License-Identifier: LGPL-2.1-or-later
"""Waiting with a bound that holds whatever is waited for does, even about being cancelled."""

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

T = TypeVar("T")
ANYTHING = (Exception, asyncio.CancelledError)
"""What a collaborator may raise, whatever it promises."""
CUT_SECONDS = 2.0
"""Seconds that something called off has to end; then it is left to itself. Whatever is called off waits for less by
then, all in all: this is for what nobody expects."""

_left_alone: "set[asyncio.Future[Any]]" = set()
"""What was called off and has not ended: referred to from here, or it could be collected half-way."""


class StillRuns(TimeoutError):
    """It did not end in time, and goes on."""


async def run_within(seconds: float, work: Awaitable[T]) -> T:
    """Return or raise what `work` does; TimeoutError after `seconds`, and CUT_SECONDS more at the most.

    `work` runs in a task of its own. It is cancelled once, at its deadline, or when the caller is; where it does not
    end then, it goes on alone: StillRuns. A cancellation that neither of them asked for becomes a RuntimeError, so
    that the caller does not take it for its own.
    """
    task = asyncio.ensure_future(work)
    overdue = False
    try:
        await asyncio.wait({task}, timeout=seconds)
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


async def settle_task(task: "asyncio.Future[Any]", seconds: float) -> bool:
    """Wait at most so long for the end of a task; whether it has ended. A cancellation meanwhile counts afterwards."""
    loop = asyncio.get_running_loop()
    deadline, cancelled = loop.time() + seconds, None
    while not task.done() and (left := deadline - loop.time()) > 0:
        try:
            await asyncio.wait({task}, timeout=left)
        except asyncio.CancelledError as error:
            cancelled = error
    if task.done() and not task.cancelled():
        task.exception()  # it is looked at, whoever else looks
    if cancelled is not None:
        raise cancelled
    return task.done()


def _let_go(task: "asyncio.Future[Any]") -> None:
    _left_alone.discard(task)
    if not task.cancelled():
        task.exception()  # seen: or the event loop complains of it


def raise_if_cancelling(error: BaseException) -> None:
    """Raise it where this task is being ended from outside: khod's event loop ends, and nothing may be undone."""
    task = asyncio.current_task()
    if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
        raise error
