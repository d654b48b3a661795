# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an operator may have khod do with one producer: forget it, tell it again, test it."""

from khod import model
from khod.engine.attempts import Attempts
from khod.engine.observer import Observer
from khod.engine.queries import Queries, new_run
from khod.engine.resources import Resources
from khod.engine.restoration import Restoration
from khod.engine.transaction import Transaction
from khod.engine.turn import Turn
from khod.errors import Refused
from khod.handover.machine import RESTING
from khod.model import Step
from khod.producers.barrier import Barrier, Member
from khod.producers.registry import ProducerRegistry


class ProducerOperations:
    """The operations on one producer; each is one operation of the engine."""

    def __init__(
        self,
        transaction: Transaction,
        turn: Turn,
        registry: ProducerRegistry,
        queries: Queries,
        restoration: Restoration,
        attempts: Attempts,
        observer: Observer,
        resources: Resources,
    ) -> None:
        self._transaction = transaction
        self._turn = turn
        self._registry = registry
        self._queries = queries
        self._restoration = restoration
        self._attempts = attempts
        self._observer = observer
        self._resources = resources

    async def forget_producer(self, name: str) -> None:
        """Free what a producer left before the jump, or stop expecting it back after a restart of khod.

        `name` may also be a LUO session of unknown owner. Refused if there is nothing of this name.
        """
        async with self._turn.one_operation():
            record, deadline = self._transaction.record, self._resources.settings.current.deadlines.activate
            claims = tuple(holder for holder in record.claims if holder.name != name)
            if len(claims) < len(record.claims):
                if (peer := self._registry.peers.find_peer(name)) is not None:
                    await self._transaction.cancellation.wait_interruptibly(peer.claim.drop_arrived(deadline))
                await self._transaction.note_claims(claims)
                self._transaction.emit_event(f"what {name} left is freed")
            elif name in self._queries.unknown_sessions:
                await self._transaction.cancellation.wait_interruptibly(
                    self._resources.sessions.drop_session(name, deadline)
                )
                self._transaction.emit_event(f"the LUO session {name} is freed")
            elif self._registry.peers.give_up(name):
                self._transaction.emit_event(f"{name} is not expected to come back any more")
            else:
                raise Refused(
                    f"Producer {name} left nothing that waits for it, and is not expected back",
                    where=name,
                    remedy="khoctl check names those that are.",
                )

    async def retry_producer(self, name: str) -> None:
        """Tell a producer of any kind again to take back what it left before the jump; Refused if it does not."""
        async with self._turn.one_operation():
            claim = next((holder for holder in self._transaction.record.claims if holder.name == name), None)
            if claim is None or self._transaction.phase not in RESTING:
                raise Refused(
                    f"Producer {name} left nothing that waits for it"
                    if claim is None
                    else f"A handover is under way ({self._transaction.phase.value}): nothing is given back meanwhile",
                    where=name,
                    remedy="khoctl status names those that something waits for." if claim is None else "khoctl status",
                )
            await self._restoration.retry_restore(claim)

    async def rehearse_producer(self, name: str) -> list[model.Producer]:
        """Take one producer through prepare, freeze, thaw and cancel, without the kernel; return its answers."""
        async with self._turn.one_operation():
            deadline = self._resources.settings.current.deadlines.activate
            observed = await self._transaction.cancellation.wait_interruptibly(self._observer.observe_kernel(deadline))
            if self._transaction.phase not in RESTING:
                raise Refused(
                    f"A producer cannot be tested now ({self._transaction.phase.value})",
                    remedy="khoctl status says more.",
                )
            if self._transaction.record.claims:
                raise Refused(
                    "Producers have not taken back what they left before the jump: a test could lose it",
                    where=", ".join(holder.name for holder in self._transaction.record.claims),
                    remedy="Start them first, or: khoctl producers forget NAME",
                )
            producer, answers = self._registry.find_producer(name), list[model.Producer]()

            def on_changed(member: Member) -> None:
                self._transaction.on_member_changed(member)
                if not member.is_waiting:
                    answers.append(member.to_model())

            record = self._transaction.record.begin_run(new_run(), observed, self._transaction.record.generation)
            try:
                with self._transaction.drive_aside(record):
                    self._transaction.attach_attempt(
                        self._attempts.make_attempt(Barrier.from_producers([producer], record.run, on_changed))
                    )
                    await self._transaction.run_steps((Step.prepare, Step.freeze), hold=False)
                    await self._transaction.roll_back(None, said="the test is over")
            finally:
                await self._transaction.try_write_record()
            return answers
