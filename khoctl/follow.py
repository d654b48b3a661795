# SPDX-License-Identifier: LGPL-2.1-or-later
"""Following a handover from one kernel into the next: the connection to khod ends with the jump, and is made again.

khoctl on the host itself ends with its kernel. One on another host stays, which has khod by `--host` or by a forwarded
socket, and so does one beside the simulated kernel.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Self

from khoctl.session import call_timeout, connect_client, khod_place, open_client, remote_host
from khod.client.handover import Client
from khod.errors import Denied, KhoError, Refused, Unreachable
from khod.model import Event, Phase, Status

AWAY_SECONDS = 600.0
"""How long khod may be away during a handover, unless the operator gave a time limit."""
RETRY_SECONDS = 1.0
"""Seconds between two tries to reach khod."""
TRY_SECONDS = 10.0
"""Maximum seconds of one try: a forwarded socket may accept a connection that leads nowhere."""
PROBE_SECONDS = 10.0
"""Seconds without an event in the phase `executing` after which khod is tried: a jump may leave a connection open."""

AT_REST = frozenset((Phase.idle, Phase.verified, Phase.degraded, Phase.cold_boot))
"""Phases after a handover that has ended or was rolled back."""
ENDED = AT_REST | {Phase.failed, Phase.foreign, Phase.inconsistent}
"""Phases in which no handover is under way."""

IN_JUMP = "the host is in the jump: khod is waited for"
AWAY = "khod has ended in the middle of a handover, and is waited for"
BACK = "khod answers again"
LOST = "the connection to the host was lost, and is made again"
SAME_BOOT = "khod was started again in the same boot: the host has not jumped"
CONNECTED = "connected again, in the same boot: the host has not jumped"
OTHER_BOOT = "khod answers in another boot of the host, with kernel"


class Link:
    """One khod: a connection for its status, and one for its events. Every method raises KhoError if it ends."""

    def __init__(self, connect: Callable[[], Client]) -> None:
        with ExitStack() as stack:
            self._asking = stack.enter_context(connect())
            self._following = stack.enter_context(connect())
            self._following.call_method("Monitor", more=True)
            self.event = self._following.receive_event()
            self.status = self.ask_status()
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Close both connections."""
        self._stack.close()

    def ask_status(self) -> Status:
        """Return the status as it is now."""
        return self._asking.status()

    def wait_event(self, seconds: float | None) -> Event | None:
        """Return the next event; None if it has not come, or not all of it, within `seconds` (None: no limit)."""
        ends = None if seconds is None else time.monotonic() + seconds
        while not self._following.reply_waiting:
            if not self._following.more:
                raise Unreachable("khod ended the stream", remedy="It was stopped, or this was not read in time.")
            if not self._following.wait_readable(None if ends is None else ends - time.monotonic()):
                return None
            self._following.receive()
        return self._following.receive_event()


class Follower:
    """The host's events and its status, over the end of khod's connections while a handover is under way.

    A context manager. Raises Unreachable if khod does not answer at first, if it ends while no handover is under way,
    or if it stays away for longer than --timeout, or AWAY_SECONDS. What happens to the connection is an event too, of
    the kind `note`, with the time of this host.
    """

    def __init__(self, before: Status | None = None) -> None:
        """Connect; with the status of the host `before` the connection to it was lost, wait for khod to come back."""
        self._link: Link | None = None
        if before is None:
            self._link = Link(connect_client)
            self.status, self.event = self._link.status, self._link.event
        else:
            self.status, self.event = before, Event(0.0, before.phase, "", before.run)
        self._boot = self.status.boot_id
        self.is_other_boot = False
        """Whether khod has come back in another boot than the first."""
        self.note = self.event
        """The last event about the connection, the first event before there is one."""
        self._heard = self._lost = time.monotonic()
        self._next_try = 0.0
        self._failure: KhoError | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._link is not None:
            self._link.close()

    @property
    def away_seconds(self) -> float | None:
        """How long khod has been away, None if it is not."""
        return None if self._link is not None else time.monotonic() - self._lost

    @property
    def has_ended(self) -> bool:
        """Whether no handover is under way."""
        return self._link is not None and self.event.phase in ENDED

    @property
    def has_verdict(self) -> bool:
        """Whether the host has come to another boot, and what arrived there was verified."""
        return self.is_other_boot and self.has_ended

    def wait_event(self, seconds: float | None = None) -> Event | None:
        """Return the next event, None if there is none within `seconds` (None: no limit).

        A try to reach khod may exceed `seconds` by TRY_SECONDS.
        """
        ends = None if seconds is None else time.monotonic() + seconds
        while True:
            left = None if ends is None else ends - time.monotonic()
            event = self._next_event(left) if self._link is not None else self._try_again(left)
            if event is not None or (ends is not None and time.monotonic() >= ends):
                return event

    def refresh_status(self) -> None:
        """Ask for the status, unless khod is away or about to end: then it stays as it was.

        Like an event, the status may show that khod has ended: then it is away.
        """
        if self._link is None or (self.event.phase is self.status.phase is Phase.executing):
            return
        try:
            self.status = self._link.ask_status()
        except Unreachable:
            self._take_last_event(self._link)
            if self.event.phase in ENDED:
                raise
            self._lose_link()

    def _take_last_event(self, link: Link) -> None:
        """Take the last event that khod had sent before it ended: it says in which phase."""
        with suppress(Unreachable):
            while (event := link.wait_event(0.0)) is not None:
                self.event = event

    def _next_event(self, seconds: float | None) -> Event | None:
        """Return the next event of the connection, or that it has ended; None after some time within `seconds`."""
        assert self._link is not None
        probe = self._heard + PROBE_SECONDS - time.monotonic() if self.event.phase is Phase.executing else None
        shortest = min((limit for limit in (seconds, probe) if limit is not None), default=None)
        try:
            event = self._link.wait_event(shortest)
            if event is None and probe is not None and time.monotonic() >= self._heard + PROBE_SECONDS:
                self._probe_host()
        except Unreachable:
            if self.event.phase in ENDED:
                raise
            return self._lose_link()
        if event is None or event == self.event:  # khod ends a stream with its last event
            return None
        self._heard = time.monotonic()
        self.event = event
        return event

    def _probe_host(self) -> None:
        """Raise Unreachable if the khod of this connection no longer answers: nobody may have closed its connection."""
        with open_client(TRY_SECONDS) as asking:
            boot = asking.status().boot_id
        if boot and boot != self._boot:
            raise Unreachable("khod answers in another boot")
        self._heard = time.monotonic()

    def _lose_link(self) -> Event:
        if self._link is not None:
            self._link.close()
        self._link, self._lost = None, time.monotonic()
        return self._note(IN_JUMP if self.event.phase is Phase.executing else LOST if remote_host() else AWAY)

    def _try_again(self, seconds: float | None) -> Event | None:
        """Try to reach khod if it is time, and return that it is back; else pause within `seconds`, and return None."""
        limit = call_timeout() or AWAY_SECONDS
        left = self._lost + limit - time.monotonic()
        if left <= 0:
            last = f"The last try: {self._failure.what}. " if remote_host() and self._failure else ""
            what = f"khod has not come back within {limit:g} s"
            raise Unreachable(what, where=khod_place(), remedy=f"{last}Look at its host.")
        if (pause := self._next_try - time.monotonic()) > 0:
            time.sleep(max(0.0, min(pause, left, seconds if seconds is not None else pause)))
            return None
        self._next_try = time.monotonic() + RETRY_SECONDS
        try:
            link = Link(lambda: open_client(min(TRY_SECONDS, left), fresh=True))
        except KhoError as error:
            if isinstance(error, Refused) and not isinstance(error, Denied):
                raise  # another host key: it will not be the former one again
            self._failure = error
            return None
        if not link.status.boot_id:  # it has begun, and does not know yet how the host stands
            link.close()
            return None
        return self._adopt_link(link)

    def _adopt_link(self, link: Link) -> Event:
        self._link, self.event, self.status, self._heard = link, link.event, link.status, time.monotonic()
        boot, self._boot = self._boot, link.status.boot_id
        if boot in ("", self._boot):
            return self._note(BACK if not boot else CONNECTED if remote_host() else SAME_BOOT)
        self.is_other_boot = True
        return self._note(f"{OTHER_BOOT} {link.status.kernel_release}")

    def _note(self, message: str) -> Event:
        """Set and return the event about the connection, at the phase of the last event."""
        self.note = Event(self.event.seconds, self.event.phase, message, self.event.run, at=time.time())
        return self.note
