# SPDX-License-Identifier: LGPL-2.1-or-later
"""Virtual time: event loops that share one clock, which jumps to the next timer when nothing is ready.

Nothing sleeps, so a hang of an hour costs no real second. Each khod has a loop of its own: one that was killed is
never run again, so that neither an `except` nor a `finally` of it does.
"""

import asyncio
import heapq
from asyncio import events
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")

MAX_TURNS = 200_000
"""Callbacks in one go: more is a loop that never ends, at one moment of virtual time."""

EPOCH = 1_800_000_000.0
"""time.time() where the clock shows 0."""


class Clock:
    """CLOCK_MONOTONIC, and CLOCK_REALTIME with it."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return EPOCH + self.now


class VirtualLoop(asyncio.BaseEventLoop):
    """An event loop without a selector; `pools` runs what is handed to an executor (None is the default one)."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock
        self._clock_resolution = 1e-9
        self.pools: Callable[[Any, Callable[[], Any]], asyncio.Future[Any]] | None = None
        self.tasks: set[asyncio.Task[Any]] = set()
        self.lost: list[BaseException] = []
        """Exceptions that nobody retrieved."""
        self.set_exception_handler(self._unretrieved)

    def create_task(self, coro: Any, *, name: object = None, context: Any = None) -> "asyncio.Task[Any]":
        task: asyncio.Task[Any] = super().create_task(coro, name=name, context=context)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def bury(self) -> None:
        """Take apart what was killed in here: what its `finally` then tries has no effect any more."""
        for task in self.tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            with suppress(BaseException):
                task.get_coro().close()
        self.tasks.clear()

    def time(self) -> float:
        return self._clock.now

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., T], *args: Any
    ) -> "asyncio.Future[T]":
        assert self.pools is not None, "this loop has no threads"
        return self.pools(executor, (lambda: func(*args)) if args else func)

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any, context: Any = None) -> asyncio.Handle:  # type: ignore[override]
        return self.call_soon(callback, *args, context=context)

    @property
    def ready(self) -> bool:
        """Whether a callback can be run now."""
        return bool(self._ready)  # type: ignore[attr-defined]

    def turn(self) -> None:
        """Run one callback that is ready."""
        handle = self._ready.popleft()  # type: ignore[attr-defined]
        if not handle._cancelled:
            handle._run()

    def next_timer(self) -> float | None:
        """When the next timer is due, None where there is none."""
        timers = self._scheduled  # type: ignore[attr-defined]
        while timers and timers[0]._cancelled:
            heapq.heappop(timers)._scheduled = False
        return timers[0]._when if timers else None

    def release(self) -> None:
        """Make ready what is due."""
        timers = self._scheduled  # type: ignore[attr-defined]
        while timers and timers[0]._when <= self._clock.now:
            handle = heapq.heappop(timers)
            handle._scheduled = False
            self._ready.append(handle)  # type: ignore[attr-defined]

    def __del__(self) -> None:
        """Nothing: it has nothing open."""

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Nothing: `next_timer` drops it."""

    def _unretrieved(self, _loop: object, context: dict[str, Any]) -> None:
        if (error := context.get("exception")) is not None:
            self.lost.append(error)


class Livelock(AssertionError):
    """Something keeps an event loop busy for ever."""


class Timeline:
    """Runs loops side by side on one clock, one callback after the other."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.loops: list[VirtualLoop] = []
        self.turns = 0

    def run(
        self, *, until: float | None = None, done: Callable[[], bool] = lambda: False, turns: int | None = None
    ) -> bool:
        """Run until `done`, or the time is `until`, or that many callbacks were run; whether `done` said so.

        Without any of these, until nothing is left that would ever run.
        """
        previous = events._get_running_loop()
        events._set_running_loop(None)
        try:
            return self._run(until, done, turns)
        finally:
            events._set_running_loop(previous)

    def _run(self, until: float | None, done: Callable[[], bool], turns: int | None) -> bool:
        last = None if turns is None else self.turns + turns
        bound = self.turns + MAX_TURNS
        while not done():
            if self.turns > bound:
                raise Livelock(f"{MAX_TURNS} callbacks, and no end of it, at {self.clock.now}")
            if self.turns == last:
                return False
            if (loop := next((loop for loop in self.loops if loop.ready), None)) is not None:
                self.turns += 1
                events._set_running_loop(loop)
                try:
                    loop.turn()
                finally:
                    events._set_running_loop(None)
                continue
            timers = [when for loop in self.loops if (when := loop.next_timer()) is not None]
            when = min(timers, default=None)
            if when is None or (until is not None and when > until):
                self.clock.now = self.clock.now if until is None else max(self.clock.now, until)
                return False
            if turns is not None and until is None:
                return False  # a number of callbacks is asked for, and no time to pass
            self.clock.now = max(self.clock.now, when)
            for each in self.loops:
                each.release()
        return True
