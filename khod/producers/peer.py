# SPDX-License-Identifier: LGPL-2.1-or-later
"""A producer that connects; it is registered for as long as its connection lives.

A peer gets its commands as replies to its own call (`Next`). So one connection carries everything, and the peer that
answers is the one that registered. The end of the connection is a veto. A peer that loses its connection stays as it
is, frozen or not, and connects again. So an undo waits for it until its process has ended, and with the process what it
held. Until then its name is not given to another.
"""

import asyncio
import enum
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from khod.dataclass import dataclass
from khod.errors import UsageError
from khod.handover.record import Owner, Process, ProducerRecord
from khod.producers.barrier import GONE, UNDONE_BY, ParticipantVeto, ProducerCall, Verb
from khod.producers.claim import Claim
from khod.producers.configured import check_name
from khod.producers.conversation import Conversation, HungUp
from khod.producers.identity import wait_ended
from khod.wire import VERB_SECONDS

KIND = "varlink"
"""The kind of a peer in the record; what is shown of it may be another one, which it has named itself."""
MAX_TIMEOUT_SECONDS = 600.0
"""Maximum seconds that a peer may request: an undo waits as long for one that hangs."""

MAX_PATH = 255
DEVICE = re.compile(r"/(sys|dev)/[^\0]+")
MAX_NAMES = 32
"""Maximum number of names of other producers, or of devices, in one registration: each is in the record."""


@dataclass(frozen=True)
class Registration:
    """What a producer registers with; see `khod.producers.barrier.Participant`. `timeout` is in seconds.

    `shown_kind` is for people and programs that look; nothing is decided by it, because any client may name any kind.
    """

    timeout: float = VERB_SECONDS
    after: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    shown_kind: str = KIND

    def check_values(self) -> None:
        """Raise UsageError if one of the values is not valid."""
        if not 0 < self.timeout <= MAX_TIMEOUT_SECONDS:  # a NaN is refused too
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
    """The state of a peer. A peer that is not connected may connect again, even if nothing waits for it."""

    connected = "connected"
    expected = "expected"
    """An earlier khod told it something: every verb waits for its connection until its process has ended."""
    left = "left"
    """Its connection has ended after it was told something: only an undo waits for a new one."""
    given_up = "given_up"
    """The operator does not expect it back: nothing waits for it, and its name is free for another owner."""
    claiming = "claiming"
    """It has not come yet for what it left in the previous kernel, which waits for it; any process of its owner may
    come."""
    gone = "gone"
    """Nothing of it is left: if it connects again, it is a new peer."""


AWAITED = frozenset({PeerState.expected, PeerState.left, PeerState.given_up})
"""States of a peer that was told something in this boot, and is not connected."""


class Peer:
    """One producer by its name, connected or expected to return.

    `late` is called when, in the next kernel, it answers a command that nobody waits for any more.
    """

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

    @property
    def units(self) -> tuple[str, ...]:
        """Its own unit; "" is none."""
        return (self.owner.unit,) if self.owner.unit else ()

    def to_record(self) -> ProducerRecord:
        """Return its record; the barrier adds what it was told."""
        return ProducerRecord(
            self.name, KIND, owner=self.owner, process=self.bearer_process, kept=self.claim.kept, **vars(self.terms)
        )

    @property
    def bearer_process(self) -> Process | None:
        """The process that carried out what it was told, connected or not; None if none is known."""
        return self._process

    @property
    def state(self) -> PeerState:
        """Its state; `gone` if it is not connected and its claim has ended."""
        if self._state is PeerState.connected:
            return PeerState.connected
        if self.claim.is_restoring:
            return PeerState.claiming
        return self._state if self.claim.told else PeerState.gone

    @property
    def kind(self) -> str:
        return self.terms.shown_kind

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
        """Do nothing: its process gets the shutdown's signals."""

    async def wait_returned(self) -> None:
        expected = self._state is PeerState.expected and self._process is not None
        if not self.is_reachable and not (expected and await self._back_or_gone()):
            raise ParticipantVeto("it is gone")

    async def _comes_back(self, telling: ProducerCall) -> bool:
        """Wait for a connection; return False if there is nobody to tell, and nothing to undo."""
        undo = telling.verb in UNDONE_BY
        bearer = self._process if undo or self._state is PeerState.expected else None
        if bearer is None and self.state is not PeerState.claiming:
            if undo:
                return False
            raise ParticipantVeto("its connection ended")
        reason = "it has not connected yet"
        if bearer is not None and undo:  # shown in the error if neither happens in time
            state = "frozen" if telling.verb is Verb.thaw else "prepared"
            reason = f"process {bearer.pid} is {state}, alive and not connected"
        telling.not_yet(reason, None)
        if await self._back_or_gone():
            return True
        if undo:
            return False
        raise ParticipantVeto("its process ended")

    async def _back_or_gone(self) -> bool:
        """Wait for its connection or the end of its process; return whether it is connected."""
        back = asyncio.ensure_future(self._back.wait())
        gone = asyncio.ensure_future(wait_ended(None if self.claim.is_restoring else self._process))
        try:
            await asyncio.wait({back, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (back, gone):
                task.cancel()
        return self.is_reachable

    # Changes of its state; the end of its claim is another one

    def attach_connection(self, process: Process, terms: Registration) -> None:
        """Begin a new connection of this peer."""
        self.claim.note_connected(process)
        self._state, self._process, self.terms = PeerState.connected, process, terms
        self.conversation.open_connection(terms.timeout)
        self._back.set()

    def detach_connection(self) -> None:
        """End the connection: the verb under way is answered with a veto, an undo must still be told."""
        self.claim.note_unanswered(self.conversation.hang_up())
        self._state = PeerState.left
        if self.state is not PeerState.left:  # its process has nothing to undo
            self._process = None
        self._back.clear()

    def give_up(self) -> bool:
        """Stop expecting it back; return whether it was waited for."""
        if self.state not in AWAITED or self._process is None:
            return False
        self._state, self._process = PeerState.given_up, None
        return True
