# SPDX-License-Identifier: LGPL-2.1-or-later
"""How the event loop's time is divided: those without rights get a share of it, whatever they do.

Khod serves everyone in one thread. What anyone may ask (accepting, reading, parsing, answering) is therefore paid for
from an allowance that fills up by and by: when it is used up, its work waits, and root's goes on. The shares are
small while something is under way for root, an operator or a producer, and larger while nothing is.
"""

import time
from collections.abc import Callable

from khod.model import Event, Phase

ACCEPT_SHARE, ACCEPT_SHARE_BUSY = 0.80, 0.05
"""Of the time, what accepting connections may take. Root's waits in the same queue of the kernel's as everyone's."""
CLIENTS_SHARE, CLIENTS_SHARE_BUSY = 0.20, 0.05
"""Of the time, what reading from clients without rights and writing to them may take."""
QUESTIONS_SHARE, QUESTIONS_SHARE_BUSY = 0.20, 0.05
"""Of the time, how long the engine may be at work on what they ask."""

PERIOD_SECONDS = 0.01
"""What a share of this earns is used without a pause: a client that asks now and then waits for nothing."""
MIN_WAIT_SECONDS = 0.001
"""The shortest pause: the event loop counts in milliseconds."""

UNDER_WAY = frozenset(
    {
        Phase.preparing,
        Phase.freezing,
        Phase.activating,
        Phase.loading,
        Phase.executing,
        Phase.verifying,
        Phase.rolling_back,
    }
)
"""Phases in which something happens, whoever asked for it."""


class Load:
    """Whether there is work that others must not slow down."""

    def __init__(self) -> None:
        self._calls = 0
        self._phase = Phase.idle
        self.on_relief: list[Callable[[], None]] = []
        """Called when there is no such work any more: whoever waits may go on sooner."""

    def begin_call(self) -> None:
        """Note that a call of somebody with rights has begun."""
        self._calls += 1

    def end_call(self) -> None:
        """Note that it has ended."""
        self._calls -= 1
        self._relieve_calls()

    def note_event(self, event: Event) -> None:
        """Take the phase of an event."""
        was_busy = self.is_busy
        self._phase = event.phase
        if was_busy:
            self._relieve_calls()

    def _relieve_calls(self) -> None:
        if not self.is_busy:
            for go_on in self.on_relief:
                go_on()

    @property
    def is_busy(self) -> bool:
        """Whether such a call is being served, or a handover is in a phase that goes on by itself."""
        return self._calls > 0 or self._phase in UNDER_WAY

    def make_share(self, usual: float, busy: float) -> Callable[[], float]:
        """Make a share that depends on this load."""
        return lambda: busy if self.is_busy else usual


class Allowance:
    """A share of the time: a bucket that fills at this rate, holds what a short period earns, and may be overdrawn."""

    def __init__(
        self,
        share: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
        period_seconds: float = PERIOD_SECONDS,
    ) -> None:
        self._share = share
        self._clock = clock
        self._period_seconds = period_seconds
        self._credit_seconds = share() * period_seconds
        self._filled_at = clock()

    def spend_time(self, seconds: float) -> None:
        """Note that so much time was used."""
        self._fill_up()
        self._credit_seconds -= seconds

    def left_seconds(self) -> float:
        """Give how much may be used now."""
        self._fill_up()
        return max(0.0, self._credit_seconds)

    def wait_seconds(self) -> float:
        """Give how long nothing more may be used; 0 where something may."""
        self._fill_up()
        return 0.0 if self._credit_seconds > 0 else -self._credit_seconds / self._share() + MIN_WAIT_SECONDS

    def _fill_up(self) -> None:
        now, share = self._clock(), self._share()
        earned = (now - self._filled_at) * share
        self._credit_seconds = min(share * self._period_seconds, self._credit_seconds + earned)
        self._filled_at = now
