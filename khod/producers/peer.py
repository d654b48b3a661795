# SPDX-License-Identifier: LGPL-2.1-or-later
"""A producer that connects, registered for as long as its connection lives.

A peer is told what to do as the reply to its own call (`Next`), so one connection carries everything,
and who answers is who registered. The end of the connection is a veto. A peer that loses its connection
stays as it is, frozen or not, and connects again: so an undo waits for it, until its process has ended
and what it held with it. Until then its name is nobody else's.
"""

import asyncio
import enum
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from khod.errors import UsageError
from khod.handover.record import Owner, Process, ProducerRecord
from khod.producers.barrier import GONE, UNDONE_BY, ParticipantVeto, ProducerCall, Verb
from khod.producers.claim import Claim
from khod.producers.configured import check_name
from khod.producers.conversation import Conversation, HungUp
from khod.producers.identity import wait_ended

KIND = "varlink"
MAX_TIMEOUT_SECONDS = 600.0
"""Seconds a peer may ask for: an undo waits as long for one that hangs."""

MAX_PATH = 255
DEVICE = re.compile(r"/(sys|dev)/[^\0]+")
MAX_NAMES = 32
"""Names of other producers, or devices, one registration may have: each stands in the record."""


@dataclass(frozen=True)
class Registration:
    """What a producer registers with; see `khod.producers.barrier.Participant`. `timeout` is in seconds."""

    timeout: float = 30.0
    after: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()

    def check_values(self) -> None:
        """Raise UsageError where one of the values cannot be."""
        if not 0 < self.timeout <= MAX_TIMEOUT_SECONDS:  # a NaN is neither
            raise UsageError(
                f"The timeout is {self.timeout}",
                where="timeout",
                remedy=f"Give seconds, more than 0 and at most {MAX_TIMEOUT_SECONDS:g}.",
            )
        for what, names in (("after", self.after), ("before", self.before)):
            for other in names:
                check_name(other)
            _check_count(what, names)
        for device in self.devices:
            if not DEVICE.fullmatch(device) or ".." in device.split("/") or len(device) > MAX_PATH:
                raise UsageError(
                    f"{device[:80]!r} is not a device", where="devices", remedy="Give a path below /sys or /dev."
                )
        _check_count("devices", self.devices)


def _check_count(what: str, names: Sequence[str]) -> None:
    if len(names) > MAX_NAMES:
        raise UsageError(f"{len(names)} names in `{what}`", where=what, remedy=f"Give at most {MAX_NAMES}.")


class PeerState(enum.Enum):
    """Where a peer is. Whoever is not connected may connect again, also when nobody waits for that."""

    connected = "connected"
    expected = "expected"
    """An earlier khod told it something: every verb waits for its connection until its process has ended."""
    left = "left"
    """Its connection has ended after it was told something: only an undo waits for another."""
    given_up = "given_up"
    """The operator expects it back no more: nothing waits for it, and its name is free for another owner."""
    claiming = "claiming"
    """It has not come yet for what it left in the previous kernel: that waits for it, whatever process it has."""
    gone = "gone"
    """Nothing of it stands: where it connects again, it is a new one."""


AWAITED = frozenset({PeerState.expected, PeerState.left, PeerState.given_up})
"""States of a peer that was told something in this boot, and is not connected."""


class Peer:
    """One producer by its name, connected or expected to come back.

    `late` is called when it answers, in the next kernel, what nobody waited for any more.
    """

    kind = KIND

    def __init__(
        self,
        name: str,
        owner: Owner,
        process: Process | None,
        terms: Registration,
        claim: Claim,
        late: "Callable[[Peer], None]",
    ) -> None:
        self.name = name
        self.owner = owner
        self.terms = terms
        self.claim = claim
        self.conversation = Conversation(claim, lambda: late(self))
        self._state = PeerState.expected
        self._process = process
        self._back = asyncio.Event()

    def to_record(self) -> ProducerRecord:
        """What the record says of it; the barrier adds what it was told."""
        return ProducerRecord(
            self.name, KIND, owner=self.owner, process=self.bearer_process, kept=self.claim.kept, **vars(self.terms)
        )

    @property
    def bearer_process(self) -> Process | None:
        """The process that did what it was told, be it connected or not; None where none is known."""
        return self._process

    @property
    def state(self) -> PeerState:
        """Where it is; gone where it is not connected and its claim has ended."""
        if self._state is PeerState.connected:
            return PeerState.connected
        if self.claim.is_restoring:
            return PeerState.claiming
        return self._state if self.claim.told else PeerState.gone

    @property
    def timeout(self) -> float:
        return self.terms.timeout

    @property
    def after(self) -> tuple[str, ...]:
        return self.terms.after

    @property
    def before(self) -> tuple[str, ...]:
        return self.terms.before

    @property
    def devices(self) -> tuple[str, ...]:
        return self.terms.devices

    @property
    def restores_state(self) -> bool:
        return True

    @property
    def is_reachable(self) -> bool:
        return self._state is PeerState.connected

    # What the barrier does

    async def carry_out(self, telling: ProducerCall) -> str | None:
        verb = telling.verb
        self.claim.enter_run(telling.run)
        while here := self.is_reachable or await self._comes_back(telling):
            if verb is Verb.finish and not self.claim.was_given_to(self._process):
                await self.conversation.give_command(replace(telling, verb=Verb.restore))
            if verb is Verb.freeze:
                self.claim.require_preserved()
            try:
                await self.conversation.give_command(telling)
                break
            except HungUp:
                if verb not in UNDONE_BY:
                    raise
        await self.claim.settle_verb(telling, self._process if self.is_reachable else None, self.timeout)
        return None if here else GONE

    async def make_way(self, note: str) -> None:
        """Nothing: its process gets the shutdown's signals."""

    async def wait_returned(self) -> None:
        expected = self._state is PeerState.expected and self._process is not None
        if not self.is_reachable and not (expected and await self._back_or_gone()):
            raise ParticipantVeto("it is gone")

    async def _comes_back(self, telling: ProducerCall) -> bool:
        """Wait for a connection; False where there is nobody to tell and nothing to undo."""
        undo = telling.verb in UNDONE_BY
        bearer = self._process if undo or self._state is PeerState.expected else None
        if bearer is None and self.state is not PeerState.claiming:
            if undo:
                return False
            raise ParticipantVeto("its connection ended")
        reason = "it has not connected yet"
        if bearer is not None and undo:  # it stands in the error where neither comes to pass in time
            state = "frozen" if telling.verb is Verb.thaw else "prepared"
            reason = f"process {bearer.pid} is {state}, alive and not connected"
        telling.not_yet(reason, None)
        if await self._back_or_gone():
            return True
        if undo:
            return False
        raise ParticipantVeto("its process ended")

    async def _back_or_gone(self) -> bool:
        """Wait for its connection or the end of its process; whether it is connected."""
        back = asyncio.ensure_future(self._back.wait())
        gone = asyncio.ensure_future(wait_ended(None if self.claim.is_restoring else self._process))
        try:
            await asyncio.wait({back, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (back, gone):
                task.cancel()
        return self.is_reachable

    # What changes its state, besides the end of its claim

    def attach_connection(self, process: Process, terms: Registration) -> None:
        """A connection has come for this entry."""
        self.claim.note_connected(process)
        self._state, self._process, self.terms = PeerState.connected, process, terms
        self.conversation.open_connection(terms.timeout)
        self._back.set()

    def detach_connection(self) -> None:
        """The connection has ended: whatever it was told is answered with a veto, an undo is still to be told."""
        self.claim.note_unanswered(self.conversation.hang_up())
        self._state = PeerState.left
        if self.state is not PeerState.left:  # its process has nothing that an undo is for
            self._process = None
        self._back.clear()

    def give_up(self) -> bool:
        """Expect it back no more; whether it was waited for."""
        if self.state not in AWAITED or self._process is None:
            return False
        self._state, self._process = PeerState.given_up, None
        return True
