# SPDX-License-Identifier: LGPL-2.1-or-later
"""A producer that connects, registered for as long as its connection lives.

A peer is told what to do as the reply to its own call (`Next`), so one connection carries everything,
and who answers is who registered. The end of the connection is a veto. A peer that loses its connection
stays as it is, frozen or not, and connects again: so an undo waits for it, until its process has ended
and what it held with it. Until then its name is nobody else's.
"""

import asyncio
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
        self.process = process
        self.terms = terms
        self.claim = claim
        self.conversation = Conversation(claim, lambda: late(self))
        self.left: Process | None = None
        """The process whose connection ended after it was told something: what it did stands as long as it lives."""
        self.connected = False
        self.given_up = False
        """Whether the operator gave it up while it was waited for: its name is free for another."""
        self._back = asyncio.Event()

    def to_record(self) -> ProducerRecord:
        """What the record says of it; the barrier adds what it was told."""
        return ProducerRecord(
            self.name, KIND, owner=self.owner, process=self.bearer_process, kept=self.claim.kept, **vars(self.terms)
        )

    @property
    def bearer_process(self) -> Process | None:
        """The process that did what it was told, be it connected or not; None where none is known."""
        return self.process or self.left

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
        return self.connected

    @property
    def is_awaited(self) -> bool:
        """Whether it was told something in this boot, and is not connected."""
        return bool(self.claim.told) and not self.claim.is_restoring and not self.connected

    # What the barrier does

    async def carry_out(self, telling: ProducerCall) -> str | None:
        verb = telling.verb
        self.claim.enter_run(telling.run)
        while here := self.connected or await self._comes_back(telling):
            if verb is Verb.finish and not self.claim.was_given_to(self.process):
                await self.conversation.give_command(replace(telling, verb=Verb.restore))
            if verb is Verb.freeze:
                self.claim.require_preserved()
            try:
                await self.conversation.give_command(telling)
                break
            except HungUp:
                if verb not in UNDONE_BY:
                    raise
        await self.claim.settle_verb(telling, self.process, self.timeout)
        return None if here else GONE

    async def make_way(self, note: str) -> None:
        """Nothing: its process gets the shutdown's signals."""

    async def wait_returned(self) -> None:
        if not self.connected and (self.process is None or not await self._back_or_gone()):
            raise ParticipantVeto("it is gone")

    async def _comes_back(self, telling: ProducerCall) -> bool:
        """Wait for a connection; False where there is nobody to tell and nothing to undo."""
        undo = telling.verb in UNDONE_BY
        bearer = self.bearer_process if undo else self.process
        if bearer is None and not self.claim.is_restoring:
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
        gone = asyncio.ensure_future(wait_ended(None if self.claim.is_restoring else self.bearer_process))
        try:
            await asyncio.wait({back, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (back, gone):
                task.cancel()
        return self.connected

    # What becomes of its connection

    def attach_connection(self, process: Process, terms: Registration) -> None:
        """A connection has come for this entry."""
        self.claim.note_connected(process)
        self.process, self.left, self.terms, self.connected = process, None, terms, True
        self.given_up = False
        self.conversation.open_connection(terms.timeout)
        self._back.set()

    def detach_connection(self) -> None:
        """The connection has ended: whatever it was told is answered with a veto, an undo is still to be told."""
        self.claim.note_unanswered(self.conversation.hang_up())
        self.left = self.process if self.claim.told and not self.claim.is_restoring else None
        self.connected, self.process = False, None
        self._back.clear()

    def give_up(self) -> bool:
        """Expect it back no more; whether it was expected with a process that has what it was told."""
        if not self.is_awaited or self.bearer_process is None:
            return False
        self.process = self.left = None
        self.given_up = True
        return True
