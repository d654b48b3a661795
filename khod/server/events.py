# SPDX-License-Identifier: LGPL-2.1-or-later
"""The changes that monitors are told: one log for all of them, each event encoded once.

A monitor is a place in the log, so a thousand that do not read cost no more than one. What the slowest has not read
is kept up to a bound; a monitor that is further behind is told the last event, as the end of its stream.
"""

from collections import deque
from collections.abc import Callable
from typing import Protocol

MAX_EVENTS = 1 << 15
"""Events kept for the slowest monitor: two a verb for as many producers as one user may have, there and back."""
MAX_EVENT_BYTES = 16 << 20
"""Bytes of these, over all monitors."""
BATCH_EVENTS = 64
"""Events that are sent to a monitor in one piece."""


class Line(Protocol):
    """Where a monitor is."""

    @property
    def is_drained(self) -> bool:
        """Whether it has read all that was sent."""

    def submit_work(self, work: Callable[[], None]) -> None:
        """Do something for it in its turn."""

    def send_data(self, data: bytes) -> None:
        """Send something."""


class EventLog:
    """What has happened and some monitor was not told yet."""

    def __init__(
        self, last: Callable[[], bytes], max_events: int = MAX_EVENTS, max_bytes: int = MAX_EVENT_BYTES
    ) -> None:
        """Begin without any; `last` gives what ends a stream."""
        self.last = last
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._events: deque[bytes] = deque()
        self._kept_bytes = 0
        self._begin = 0
        self._streams: set[Stream] = set()
        self._caught_up: set[Stream] = set()
        self.is_closed = False

    @property
    def end(self) -> int:
        """The place after the last event."""
        return self._begin + len(self._events)

    @property
    def has_streams(self) -> bool:
        """Whether anyone listens: otherwise nothing needs to be encoded."""
        return bool(self._streams)

    @property
    def kept_bytes(self) -> int:
        """How much is kept."""
        return self._kept_bytes

    def append_event(self, event: bytes) -> None:
        """Tell every monitor of an event, as it goes over the wire."""
        if len(self._caught_up) == len(self._streams):
            self._begin += len(self._events)
            self._events.clear()
            self._kept_bytes = 0
        self._events.append(event)
        self._kept_bytes += len(event)
        while len(self._events) > self._max_events or self._kept_bytes > self._max_bytes:
            self._kept_bytes -= len(self._events.popleft())
            self._begin += 1
        self._wake_streams()

    def end_streams(self) -> None:
        """End every stream, after what it was not told yet."""
        self.is_closed = True
        self._wake_streams()

    def events_after(self, place: int) -> list[bytes] | None:
        """Give the next events from a place on; None where they are kept no more."""
        if place < self._begin:
            return None
        first = place - self._begin
        return [self._events[at] for at in range(first, min(first + BATCH_EVENTS, len(self._events)))]

    def add_stream(self, stream: "Stream") -> None:
        """Keep what this monitor was not told."""
        self._streams.add(stream)

    def remove_stream(self, stream: "Stream") -> None:
        """Keep nothing for it any more."""
        self._streams.discard(stream)
        self._caught_up.discard(stream)

    def note_waiting(self, stream: "Stream") -> None:
        """Note that a monitor was told everything."""
        self._caught_up.add(stream)

    def _wake_streams(self) -> None:
        for stream in self._caught_up:
            stream.submit_turn()
        self._caught_up.clear()


class Stream:
    """One monitor."""

    def __init__(self, log: EventLog, line: Line, ended: Callable[[], None]) -> None:
        """Tell `line` all that happens from now on; `ended` is called after the last event."""
        self._log = log
        self._line = line
        self._ended = ended
        self._place = log.end
        self._begun = False
        self._is_open = True
        log.add_stream(self)

    def begin_stream(self, first: bytes) -> None:
        """Send what the stream begins with, and then the changes."""
        self._line.send_data(first)
        self._begun = True
        self.go_on()

    def submit_turn(self) -> None:
        """Go on in the client's turn."""
        self._line.submit_work(self.go_on)

    def go_on(self) -> None:
        """Send what is next, unless the client has not read what came before."""
        if not self._is_open or not self._begun or not self._line.is_drained:
            return
        events = self._log.events_after(self._place)
        if events:
            self._place += len(events)
            self._line.send_data(b"".join(events))
            if self._place < self._log.end or self._log.is_closed:
                self.submit_turn()
            elif self._line.is_drained:
                self._log.note_waiting(self)
        elif events is None or self._log.is_closed:
            self.stop_stream()
            self._line.send_data(self._log.last())
            self._ended()
        else:
            self._log.note_waiting(self)

    def stop_stream(self) -> None:
        """Tell nothing more."""
        self._is_open = False
        self._log.remove_stream(self)
