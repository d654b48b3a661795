# SPDX-License-Identifier: LGPL-2.1-or-later
"""The way back from any phase: for an operator's abort, and where khod is stopped in the middle of a handover."""

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from khod.deferred import defer_module
from khod.engine.attempts import Attempts
from khod.engine.jump import Jump
from khod.engine.observer import Observer
from khod.engine.queries import Queries
from khod.engine.resources import Resources
from khod.engine.signals import Signals
from khod.engine.transaction import Transaction
from khod.engine.turn import Turn
from khod.errors import Aborted, Failed, KhoError, Refused
from khod.handover import reconcile
from khod.handover.machine import HELD, RESTING
from khod.model import Observed, Phase, Step
from khod.producers.registry import ProducerRegistry

if TYPE_CHECKING:
    from khod.engine import rollback
else:
    rollback = defer_module("khod.engine.rollback")


class WayBack:
    """Ends what is under way and rolls back what the host holds, whoever did it."""

    def __init__(
        self,
        transaction: Transaction,
        attempts: Attempts,
        turn: Turn,
        jump: Jump,
        queries: Queries,
        observer: Observer,
        registry: ProducerRegistry,
        resources: Resources,
        signals: Signals,
    ) -> None:
        self._transaction = transaction
        self._attempts = attempts
        self._turn = turn
        self._jump = jump
        self._queries = queries
        self._observer = observer
        self._registry = registry
        self._resources = resources
        self._started = signals.started

    async def abort(self, *, force: bool, by: str) -> None:
        """Roll everything back, as Engine.abort does."""
        await self._wait_started()
        if self._transaction.phase is Phase.verifying:
            raise Refused("Producers are taking back what they left, which has no undo", remedy="khoctl verify")
        if self._transaction.phase is Phase.executing:
            await self._jump.check_may_be_called_back(self._attempts.current_attempt(), force=force)
        await self.end_and_undo(
            Aborted(f"The handover was aborted{f' by {by}' if by else ''}", where="abort"), force=force
        )

    async def end_and_undo(
        self, cause: KhoError, *, force: bool = False, stopping: bool = False, down: bool = False
    ) -> None:
        """End and roll back the operation under way; only then ask the kernel, which may hang, and undo the rest.

        `stopping` means that khod ends, `down` that the host is shut down; `force` is as in Engine.abort.
        """
        under_way, ended = self._transaction.phase, self._transaction.rollbacks
        if self._turn.is_taken:
            self._transaction.cancellation.cancel(cause)
        async with self._turn.at_work():
            if under_way is Phase.rolling_back and self._transaction.rollbacks > ended and not down:
                if self._transaction.rollback_error is not None:  # the requested rollback was already under way
                    raise self._transaction.rollback_error
                return
            try:
                await self._put_back(cause, under_way, force=force, stopping=stopping, down=down)
            finally:  # even if this was refused, another cause may have come to end the handover
                await self._turn.act_on_cause(quiet=True)

    async def _put_back(self, cause: KhoError, under_way: Phase, *, force: bool, stopping: bool, down: bool) -> None:
        if down and self._transaction.phase in RESTING and under_way not in RESTING:
            await self._transaction.note_interrupted(under_way)
        if failure := self._transaction.failure_after(cause):
            raise failure  # the operation under way has rolled back for this cause, but not everything
        if self._transaction.cancellation.cause is cause:
            self._transaction.cancellation.settle()  # it found nothing to end; any other cause must still be acted on
        observed = await self._observer.try_observe(self._resources.settings.current.deadlines.observe)
        phase = self._queries.effective_phase(observed)
        foreign = observed is not None and reconcile.is_foreign(self._transaction.current_record(), observed)
        unrecorded = force and phase in RESTING and not self._transaction.record.run
        if phase is Phase.inconsistent or foreign or unrecorded:
            await self._take_over(phase, observed, force=force)
        elif phase in RESTING:
            self._transaction.cancellation.settle()
            return
        elif phase is Phase.failed:
            self._transaction.attach_attempt(None)  # a producer's file may have been repaired since
        elif phase in HELD and Step.load in self._transaction.machine.done and not stopping:
            await self._jump.refuse_on_the_way(self._attempts.current_attempt())
        elif phase is Phase.executing:  # the request for the jump may have succeeded meanwhile
            await self._jump.check_may_be_called_back(self._attempts.current_attempt(), force=force or stopping)
        await self._attempts.roll_back(None, interrupted=phase if down else None, because=cause if stopping else None)

    async def _take_over(self, phase: Phase, observed: Observed | None, *, force: bool) -> None:
        """Take over what khod did not do, or what its record does not fully describe; Refused without `force`."""
        kernel = "the kernel was not asked" if observed is None else reconcile.describe_kernel(observed)
        if not force:
            raise Refused(
                f"khod did not do this, or cannot tell: {self._transaction.reason or phase.value}; {kernel}",
                where=phase.value,
                remedy="To put it back all the same: `Abort(force)`",
            )
        shown = observed or Observed("", "", active=True, loaded=True, arrived=False, cmdline="")
        record = self._transaction.record
        unknown = phase is Phase.inconsistent or not record.boot_id or not record.run
        steps = reconcile.steps_to_undo(self._transaction.machine.done, shown, told=unknown)
        note = ""
        if self._transaction.phase is Phase.inconsistent:
            workers, deadline = self._resources.workers, self._resources.settings.current.deadlines.observe
            with suppress(KhoError):  # if this fails, a new record replaces it
                kept = await workers.disk.call_within(self._resources.store.set_aside, "keeping the record", deadline)
                note = f"The record could not be read; it is kept as {kept}." if kept else ""
        taken = Phase.inconsistent if phase is Phase.inconsistent else Phase.foreign
        self._transaction.adopt_steps(taken, steps, shown, note)
        self._transaction.attach_attempt(None)

    async def _wait_started(self) -> None:
        """Wait until khod's start is complete; Failed if it takes too long, because the kernel does not answer."""
        try:
            async with asyncio.timeout(self._start_seconds()):
                await self._started.wait()
        except TimeoutError:
            raise Failed(
                "khod has not come to the end of its start: the kernel does not say how it stands",
                where="abort",
                remedy="Look at the kernel log; khoctl status says what khod waits for.",
            ) from None

    def _start_seconds(self) -> float:
        """Return the maximum seconds of a start that asks the kernel once and rolls back, in any order of producers."""
        try:
            producers = self._registry.all_producers()
        except KhoError:
            producers = [*self._registry.peers.all_peers()]
        deadlines = self._resources.settings.current.deadlines
        told = sum(2 * producer.timeout for producer in producers)
        quiesce = deadlines.quiesce_undo if self._transaction.record.quiesced else 0.0
        return deadlines.activate + rollback.bound_seconds(deadlines, (), quiesce) + told
