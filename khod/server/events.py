# SPDX-License-Identifier: LGPL-2.1-or-later
"""The events for monitors: one log for all of them, each event encoded once.

A monitor is a position in the log, so a thousand that do not read cost no more than one. What the slowest has not read
is kept up to a limit; a monitor that is further behind gets the last event, which ends its stream.
"""

from collections import deque
from collections.abc import Callable
from typing import Protocol

MAX_EVENTS = 1 << 15
"""The number of events kept for the slowest monitor.

It is two for each verb, and for its undo, of as many producers as one user may have.
"""
MAX_EVENT_BYTES = 16 << 20
"""The maximum size of these events in bytes, for all monitors."""
BATCH_EVENTS = 64
"""The number of events sent to a monitor at once."""


class Line(Protocol):
    """The connection of a monitor."""

    @property
    def is_drained(self) -> bool:
        """Whether the client has read all that was sent."""

    def submit_work(self, work: Callable[[], None]) -> None:
        """Run work for the client in its turn."""

    def send_data(self, data: bytes) -> None:
        """Send data to the client."""


class EventLog:
    """The events that some monitor has not got yet."""

    def __init__(
        self, last: Callable[[], bytes], max_events: int = MAX_EVENTS, max_bytes: int = MAX_EVENT_BYTES
    ) -> None:
        """Begin with no events; `last` returns the event that ends a stream."""
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
        """The position after the last event."""
        return self._begin + len(self._events)

    @property
    def has_streams(self) -> bool:
        """Whether there is a monitor; without one, nothing needs to be encoded."""
        return bool(self._streams)

    @property
    def kept_bytes(self) -> int:
        """The size of the kept events in bytes."""
        return self._kept_bytes

    def append_event(self, event: bytes) -> None:
        """Append an event, as encoded for the wire, for every monitor."""
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
        """End every stream, after the events it has not got yet."""
        self.is_closed = True
        self._wake_streams()

    def events_after(self, place: int) -> list[bytes] | None:
        """Return the next events from a position on; None if they are no longer kept."""
        if place < self._begin:
            return None
        first = place - self._begin
        return [self._events[at] for at in range(first, min(first + BATCH_EVENTS, len(self._events)))]

    def add_stream(self, stream: "Stream") -> None:
        """Keep events for this stream."""
        self._streams.add(stream)

    def remove_stream(self, stream: "Stream") -> None:
        """Stop keeping events for this stream."""
        self._streams.discard(stream)
        self._caught_up.discard(stream)

    def note_waiting(self, stream: "Stream") -> None:
        """Note that a stream has got all events."""
        self._caught_up.add(stream)

    def _wake_streams(self) -> None:
        for stream in self._caught_up:
            stream.submit_turn()
        self._caught_up.clear()


class Stream:
    """The stream of one monitor."""

    def __init__(self, log: EventLog, line: Line, ended: Callable[[], None]) -> None:
        """Send to `line` all events from now on; `ended` is called after the last one."""
        self._log = log
        self._line = line
        self._ended = ended
        self._place = log.end
        self._begun = False
        self._is_open = True
        log.add_stream(self)

    def begin_stream(self, first: bytes) -> None:
        """Send the first event, and then the changes."""
        self._line.send_data(first)
        self._begun = True
        self.go_on()

    def submit_turn(self) -> None:
        """Continue in the client's turn."""
        self._line.submit_work(self.go_on)

    def go_on(self) -> None:
        """Send the next events, unless the client has not read the ones before."""
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
        """Send nothing more."""
        self._is_open = False
        self._log.remove_stream(self)
