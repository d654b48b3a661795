# SPDX-License-Identifier: LGPL-2.1-or-later
"""What comes from outside during a handover and may end it: producers that connect or leave, devices that change."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from khod.engine.background import Background
from khod.engine.guard import Seen, Severity
from khod.engine.jump import Jump
from khod.engine.restoration import Restoration
from khod.engine.transaction import Transaction
from khod.engine.turn import Turn
from khod.errors import DeviceChanged, KhoError, ProducerGone
from khod.model import EventKind, Phase, Step
from khod.producers.barrier import Member, Verb
from khod.producers.peer import Peer

if TYPE_CHECKING:
    from khod.engine.attempt import Attempt

SHUTDOWN_QUESTIONS = 3
"""How often systemd is asked whether the host goes down if it does not answer: during a shutdown it may be busy."""


class Interruptions:
    """Listens to the producers' connections and to the guard, and ends the handover under way if it cannot go on."""

    def __init__(
        self, transaction: Transaction, turn: Turn, jump: Jump, restoration: Restoration, background: Background
    ) -> None:
        self._transaction = transaction
        self._turn = turn
        self._jump = jump
        self._restoration = restoration
        self._background = background

    # What ends a handover

    def cancel(self, cause: KhoError) -> None:
        """End the handover under way for `cause`, if there is one that can still be ended."""
        if self._jump.going_down or not self._transaction.can_be_cancelled:
            return
        self._transaction.cancellation.cancel(cause)
        if not self._turn.is_taken:
            self._background.spawn_task(self._end_held())

    def _cancel_attempt(self, attempt: Attempt, cause: KhoError) -> None:
        """End this attempt, but not one that has begun since."""
        if self._transaction.attempt is attempt:
            self.cancel(cause)

    async def _end_held(self) -> None:
        """Roll back a handover that waits for an operation; an operation that takes the lock before does the same."""
        async with self._turn.at_work():
            await self._turn.act_on_cause(quiet=True)

    # Producers that connect

    def on_peer_came(self, peer: Peer) -> None:
        """Report a producer that has registered; one that has something to take back is given it."""
        where = peer.owner.unit or "no unit"
        self._transaction.emit_event(
            f"producer {peer.name} registered (user {peer.owner.uid}, {where})",
            EventKind.producer_waits,
            producer=Member(peer).to_model(),
        )
        if peer.claim.is_restoring and self._transaction.phase is not Phase.verifying:
            self._restoration.restore_late(peer)

    def on_peer_left(self, peer: Peer) -> None:
        """Report a producer that has disconnected, and end the handover if it was told something."""
        gone = Member(peer).to_model()
        self._transaction.emit_event(f"producer {peer.name} disconnected", EventKind.producer_waits, producer=gone)
        told = peer.claim.told
        if told is None or peer.claim.is_restoring:
            return
        cause = ProducerGone(
            f"Producer {peer.name} went away after it was told to {told.value}: its connection ended",
            kind=peer.kind,
            producer=peer.name,
            verb=told.value,
            remedy="Look why it ended, then begin again.",
        )
        attempt = self._transaction.attempt
        if attempt is not None and told is Verb.freeze and Step.load in self._transaction.machine.done:
            judgement = asyncio.ensure_future(self._judge_departure(attempt, cause))
            self._transaction.cancellation.wait_for_judgement(judgement)
        else:
            self.cancel(cause)

    async def _judge_departure(self, attempt: Attempt, cause: KhoError) -> None:
        """End the handover because a frozen producer disconnected, unless the host is on its way into the kexec.

        In that case systemd has stopped the producer: what is ordered after khod is stopped before it. A frozen
        producer has handed over all it has, and when the host goes down nothing will thaw it.
        """
        excused: bool | None = None
        for _question in range(SHUTDOWN_QUESTIONS):
            if (excused := await attempt.goes_down()) is not None:
                break
        if not excused:  # without an answer the producer counts as dead
            self._cancel_attempt(attempt, cause)
            return
        attempt.going_down = True
        self._background.spawn_task(self._end_without_shutdown(attempt, cause))

    async def _end_without_shutdown(self, attempt: Attempt, cause: KhoError) -> None:
        """End the handover after all if the shutdown that excuses a producer's disconnection is cancelled."""
        await self._jump.until_called_off(attempt)
        attempt.going_down = False
        self._cancel_attempt(attempt, cause)

    def on_unkept_registration(self, error: Exception) -> None:
        """Report that the list of registered producers could not be written."""
        self._transaction.emit_event(
            f"producers would not be missed after a restart of khod, their list is not kept: {error}"
        )

    # Devices

    def on_device_event(self, seen: Seen) -> None:
        """Report a device that appeared or disappeared, and end the handover if the configuration says so."""
        sentence = seen.describe()
        self._transaction.emit_event(sentence, EventKind.device)
        if seen.severity is Severity.abort:
            self.cancel(
                DeviceChanged(
                    f"The hardware changed during the handover: {sentence}",
                    where="guard",
                    remedy="Begin again when it is quiet; guard.abort in khod.toml says what counts.",
                )
            )
