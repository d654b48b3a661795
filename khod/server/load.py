# SPDX-License-Identifier: LGPL-2.1-or-later
"""How the event loop's time is divided: clients without rights get only a share of it.

khod serves all clients in one thread. Work that every user can cause (accepting, reading, parsing, answering) is
therefore paid for from an allowance that fills up over time: when it is used up, this work waits, and root's continues.
The shares are small while something is under way for root, an operator or a producer, and larger otherwise.
"""

import time
from collections.abc import Callable

from khod.model import Event, Phase

ACCEPT_SHARE, ACCEPT_SHARE_BUSY = 0.80, 0.05
"""The share of time for accepting connections. Those of root wait in the same queue of the kernel as all others."""
CLIENTS_SHARE, CLIENTS_SHARE_BUSY = 0.20, 0.05
"""The share of time for reading from clients without rights, and for writing to them."""
QUESTIONS_SHARE, QUESTIONS_SHARE_BUSY = 0.20, 0.05
"""The share of time for the engine's work on their questions."""

PERIOD_SECONDS = 0.01
"""What a share earns in this time may be used without a pause, so that occasional questions do not wait."""
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
"""Phases in which something happens, on any request."""


class Load:
    """Whether there is work that clients without rights must not slow down."""

    def __init__(self) -> None:
        self._calls = 0
        self._phase = Phase.idle
        self.on_relief: list[Callable[[], None]] = []
        """Called when there is no such work any more, so that waiting work may continue sooner."""

    def begin_call(self) -> None:
        """Note that a call with rights has begun."""
        self._calls += 1

    def end_call(self) -> None:
        """Note that a call with rights has ended."""
        self._calls -= 1
        self._relieve_calls()

    def note_event(self, event: Event) -> None:
        """Note the phase of an event."""
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
        """Whether a call with rights is being served, or a handover is in a phase that progresses by itself."""
        return self._calls > 0 or self._phase in UNDER_WAY

    def make_share(self, usual: float, busy: float) -> Callable[[], float]:
        """Return a share that depends on this load."""
        return lambda: busy if self.is_busy else usual


class Allowance:
    """A share of the time: a bucket that fills at this rate up to what PERIOD_SECONDS earn, and may be overdrawn."""

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
        """Charge this time."""
        self._fill_up()
        self._credit_seconds -= seconds

    def left_seconds(self) -> float:
        """Return how much time may be used now."""
        self._fill_up()
        return max(0.0, self._credit_seconds)

    def wait_seconds(self) -> float:
        """Return how long to wait before time may be used; 0 if it may be used now."""
        self._fill_up()
        return 0.0 if self._credit_seconds > 0 else -self._credit_seconds / self._share() + MIN_WAIT_SECONDS

    def _fill_up(self) -> None:
        now, share = self._clock(), self._share()
        earned = (now - self._filled_at) * share
        self._credit_seconds = min(share * self._period_seconds, self._credit_seconds + earned)
        self._filled_at = now
