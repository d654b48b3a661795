# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every change of the handover, as the clients of Monitor and the division of the time hear of it."""

from khod.engine import Engine
from khod.model import Event, Phase
from khod.server import messages
from khod.server.events import EventLog
from khod.server.load import Load


class Monitors:
    """The clients of Monitor, over one engine."""

    def __init__(self, engine: Engine) -> None:
        self._queries = engine.queries
        self._last = Event(0.0, Phase.idle, "", "")
        self.load = Load()
        self.events = EventLog(lambda: messages.encode_reply({"event": self._last}))

    def publish_event(self, event: Event) -> None:
        """Send an event to every monitor."""
        self._last = event
        self.load.note_event(event)
        if self.events.has_streams:
            self.events.append_event(messages.encode_reply({"event": event}, continues=True))

    async def first_event(self) -> bytes:
        """Return the event with which every monitor begins."""
        return messages.encode_reply({"event": await self._queries.current_event()}, continues=True)

    def end_monitors(self) -> None:
        """End every monitor."""
        self.events.end_streams()
