# SPDX-License-Identifier: LGPL-2.1-or-later
"""What ends a handover on its way forward, and how that interrupts what khod waits for."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from khod.errors import KhoError

T = TypeVar("T")
INTERRUPT_SECONDS = 5.0
"""Seconds that work has to end if it is cancelled in the middle of a step; then the undo begins all the same."""


class Cancellation:
    """The cause that ends a handover: the first one counts, and is kept until it was acted on.

    `before_step` is called before each step, and cancels the handover if it must not continue.
    """

    def __init__(self, before_step: Callable[[], None]) -> None:
        self.cause: KhoError | None = None
        """The cause that was not acted on yet."""
        self._cancelled = asyncio.Event()
        self._before_step = before_step
        self._doubts: set[asyncio.Future[None]] = set()

    def cancel(self, cause: KhoError) -> None:
        """End what is under way; the first cause counts, and stays until it has led to a rollback."""
        if self.cause is None:
            self.cause = cause
            self._cancelled.set()

    def settle(self) -> None:
        """Clear the cause: it was acted on, or found nothing to end."""
        self.cause = None
        self._cancelled.clear()

    def wait_for_judgement(self, judgement: "asyncio.Future[None]") -> None:
        """Take no further step before `judgement` is done; it calls `cancel` if something ends the handover."""
        self._doubts.add(judgement)
        judgement.add_done_callback(self._doubts.discard)

    async def raise_if_cancelled(self) -> None:
        """Raise the cause that has ended the handover, after all waiting events and judgements."""
        self._before_step()
        while self._doubts and self.cause is None:
            await self.wait_interruptibly(asyncio.wait(set(self._doubts)))
        if self.cause is not None:
            raise self.cause

    async def wait_interruptibly(self, work: Awaitable[T]) -> T:
        """Return what `work` returns; if the handover is cancelled first, cancel `work` and raise the cause.

        What `work` requested of the kernel continues there: every undo is made by the same thread, after it.
        """
        task = asyncio.ensure_future(work)
        cancelled = asyncio.ensure_future(self._cancelled.wait())
        try:
            await asyncio.wait({task, cancelled}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                task.cancel()
                await asyncio.wait({task}, timeout=INTERRUPT_SECONDS)
                if self.cause is not None and (not task.done() or task.cancelled()):
                    raise self.cause
            if task.cancelled():
                raise RuntimeError("it was cancelled, and nobody asked for that")
            return await task
        except asyncio.CancelledError:
            task.cancel()
            raise
        finally:
            cancelled.cancel()
