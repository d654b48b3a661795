# SPDX-License-Identifier: LGPL-2.1-or-later
"""After the jump: what arrived is compared with the snapshot, and the producers take back what they left."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from khod.concurrency.bounded import Since
from khod.deferred import defer_module
from khod.engine.judgement import Judgement
from khod.engine.resources import Resources
from khod.engine.signals import Signals
from khod.engine.transaction import Transaction
from khod.engine.verification import Verification
from khod.errors import Failed, KhoError, Refused
from khod.handover.machine import RESTING
from khod.handover.record import ProducerRecord
from khod.kernel.protocol import KhoKernel
from khod.model import Finding, FindingSource, Observed, Phase, Verdict
from khod.producers.barrier import Barrier, Member, Verb
from khod.producers.peer import Peer
from khod.producers.registry import ProducerRegistry
from khod.producers.session_scan import SessionScan

if TYPE_CHECKING:
    from khod.producers import session_holders
else:
    session_holders = defer_module("khod.producers.session_holders")


class Restoration:
    """The outcome of the handover into this boot, and the producers that have not taken back what they left.

    `signals.busy` is held while producers are told; `spawn` starts a task that nobody waits for.
    """

    def __init__(
        self,
        transaction: Transaction,
        registry: ProducerRegistry,
        verification: Verification,
        resources: Resources,
        *,
        signals: Signals,
        spawn: Callable[[Coroutine[None, None, None]], None],
        judgement: Judgement,
    ) -> None:
        self._transaction = transaction
        self._registry = registry
        self._verification = verification
        self._kexec = resources.kexec
        self._workers = resources.workers
        self._settings = resources.settings
        self._scanner = resources.scanner
        self._host_up = resources.host_up
        self._busy = signals.busy
        self._spawn = spawn
        self._judgement = judgement
        self._barrier: Barrier | None = None
        self._late: set[Peer] = set()
        self._told_later: dict[str, Member] = {}
        self._gives_back_late = False

    @property
    def members(self) -> list[Member]:
        """The producers that were told to take something back."""
        members = self._barrier.members if self._barrier else []
        return [self._told_later.get(member.producer.name, member) for member in members]

    async def begin_restoration(self, observed: Observed, kernel: KhoKernel | None, doubt: str, note: str) -> None:
        """Verify this boot, and have the producers take back what they left.

        This does not wait for them: a producer may start only after khod is ready. `doubt` is the reason why not all of
        it can have arrived ("" for none); `note` is as in Transaction.enter_verifying.
        """
        self._verification.enter_boot(observed)
        await self._transaction.enter_verifying(observed, note, doubt)
        verdict = self._verification.begin_verdict()

        async def examine_arrival(given_back: Verdict) -> Verdict:
            found = await self._verification.examine_arrival(observed, kernel, given_back)
            return found.with_findings([*found.findings, Finding.of_khod(doubt)]) if doubt else found

        record = self._transaction.record
        changed = self._transaction.on_member_changed
        self._barrier = barrier = self._registry.resume_barrier(
            record.arrived_run, changed, record.claims, None, restoring=True
        )
        idle = {member.producer.name for member in barrier.members if not member.producer.restores_state}
        if any(holder.name in idle for holder in record.claims):  # an earlier khod did not record `restores`
            await self._transaction.note_claims(tuple(held for held in record.claims if held.name not in idle))
        if not self._transaction.record.claims:
            verdict = await examine_arrival(verdict)
        if self._transaction.record.claims or self._verification.takes_long:
            self._spawn(self._bring_all_back(barrier, verdict, examine_arrival))
        else:
            await self._note_blackout()
            await self._conclude_verdict(await self._examine_rest(verdict))

    def restore_late(self, peer: Peer) -> None:
        """Give a producer that comes after the verification what it left, and correct the verdict.

        During a handover, this waits until the handover has ended.
        """
        self._late.add(peer)
        self.resume_claims()

    def make_way(self) -> bool:
        """Cut short the restore of a late producer for an operator's request; return whether one was under way."""
        if self._gives_back_late:
            self._transaction.cancellation.cancel(Failed("Somebody wants something else done first"))
        return self._gives_back_late

    def resume_claims(self) -> None:
        """Give the producers that came during a handover what they left."""
        while self._late and self._transaction.phase in RESTING:
            self._spawn(self._restore_late(self._late.pop()))

    async def _count_sessions(self, verdict: Verdict) -> Verdict:
        """Add to the verdict which sessions of other processes arrived, by the processes that have them now."""
        record, calls = self._transaction.record, self._kexec.calls
        scan = SessionScan()
        if record.sessions:
            with suppress(KhoError, OSError):
                deadline = self._settings.current.deadlines.activate
                scan = await self._workers.queries.call_within(
                    lambda: session_holders.scan_others(calls, self._scanner), "looking for LUO sessions", deadline
                )
        return session_holders.count_arrivals(
            verdict,
            record.sessions,
            record.sessions_unseen,
            scan.sessions,
            at_once=record.at_once and not record.quiesced,
        )

    async def _examine_rest(self, verdict: Verdict) -> Verdict:
        """Add to the verdict what can be known only now that the producers have their state."""
        return await self._verification.conclude(await self._count_sessions(verdict))

    async def _bring_all_back(
        self, barrier: Barrier, verdict: Verdict, examine_arrival: Callable[[Verdict], Awaitable[Verdict]]
    ) -> None:
        async with self._busy:
            began = time.monotonic()
            try:
                if self._transaction.record.claims:
                    verdict = await self._bring_back_at_boot(barrier, verdict)
                    self._transaction.note_timing("restore", began)
                    verdict = await examine_arrival(verdict)
                else:
                    await self._note_blackout()
                verdict = await self._examine_rest(verdict)
            except Exception as error:  # noqa: BLE001 - otherwise the verification would never end
                verdict = verdict.with_findings([*verdict.findings, Finding.of_khod(f"khod itself failed: {error!r}")])
            await self._conclude_verdict(verdict)
        for peer in self._registry.peers.all_peers():
            if peer.is_reachable and peer.claim.is_restoring:  # it came after the wait for it had ended
                self.restore_late(peer)

    async def _restore_late(self, peer: Peer) -> None:
        async with self._busy:
            record = self._transaction.record
            if self._transaction.phase not in RESTING:
                self._late.add(peer)
                return
            if not peer.is_reachable or not peer.claim.is_restoring:
                return
            barrier = Barrier.from_producers([peer], record.arrived_run, self._transaction.on_member_changed)
            self._gives_back_late = True
            try:
                await self._transaction.cancellation.wait_interruptibly(self._bring_back_later(barrier, peer.timeout))
            except KhoError:  # cut short: what the peer left stays, and it is told again afterwards
                self._transaction.cancellation.settle()
                self._late.add(peer)
            finally:
                self._gives_back_late = False

    async def retry_restore(self, holder: ProducerRecord) -> None:
        """Tell a producer again to take back what it left; Refused if it does not.

        Called at rest, with no other operation under way.
        """
        changed, run = self._transaction.on_member_changed, self._transaction.record.arrived_run
        barrier = self._registry.resume_barrier(run, changed, [holder], None, restoring=True)
        await self._bring_back_later(barrier, self._restore_seconds)
        if any(claim.name == holder.name for claim in self._transaction.record.claims):
            (member,) = [member for member in barrier.members if member.producer.name == holder.name]
            raise Refused(
                f"Producer {holder.name} did not take back what it left: {member.answer}",
                where=f"{holder.kind} {holder.name}",
                remedy=f"It still waits. Repair the cause and try again, or: khoctl producers forget {holder.name}",
            )

    async def _bring_back_later(self, barrier: Barrier, deadline: float) -> None:
        """Give producers what they left after the verification, and correct the verdict if there is one."""
        record = self._transaction.record
        self._told_later |= {member.producer.name: member for member in barrier.members}
        verdict = await self._bring_back(barrier, record.verdict or Verdict(), deadline)
        if record.outcome in (Phase.verified, Phase.degraded):
            await self._conclude_verdict(verdict)

    async def _bring_back_at_boot(self, barrier: Barrier, verdict: Verdict) -> Verdict:
        """As `_bring_back`: the producers that wait for the host's services are given all of their time after that."""
        host_up = asyncio.ensure_future(self._host_up())
        try:
            return await self._bring_back(barrier, verdict, self._restore_seconds, host_up)
        finally:
            host_up.cancel()

    async def _bring_back(self, barrier: Barrier, verdict: Verdict, deadline: float, since: Since = None) -> Verdict:
        """Tell `restore` and then `finish`, rank by rank; return the verdict with who has its state again.

        A producer that is done leaves the claims. The others stay in them, so that what they left is given to nobody
        else. If khod dies meanwhile, the record says which producers must be told again.
        """
        told = self._transaction.record.claims
        members = [member for member in barrier.members if member.producer.restores_state]
        empty = [member for member in members if member.told is not Verb.finish]
        failed = await barrier.bring_back(Verb.restore, empty, deadline, since)
        restored = [member for member in members if member not in failed]
        for member in restored:
            # Recorded before any session is finished: a producer that has its state again is not told to restore it
            # once more.
            member.told = Verb.finish
        verdict = self._verification.add_contents(verdict, told)
        await self._transaction.note_claims(self._remaining_claims(barrier, set()), verdict)
        failed += await barrier.bring_back(Verb.finish, restored, deadline, since)
        if any(member not in failed for member in members):
            await self._note_blackout()
        names = {member.producer.name for member in members}
        lost = {member.producer.name for member in failed}
        content = FindingSource.content
        findings = [one for one in verdict.findings if one.producer not in names or one.source is content]
        findings += [Finding.of_producer(member.producer.name, member.answer) for member in failed]
        arrived = sorted({*verdict.arrived, *(names - lost)} - {*verdict.changed})
        missing = sorted({*verdict.missing, *lost} - set(arrived))
        verdict = replace(verdict, arrived=arrived, missing=missing).with_findings(findings)
        await self._transaction.note_claims(self._remaining_claims(barrier, names - lost), verdict)
        return verdict

    async def _note_blackout(self) -> None:
        """Record the blackout up to now; without the kernel's uptime the wall clock is trusted."""
        uptime: float | None = None
        with suppress(KhoError, OSError):
            deadline = self._settings.current.deadlines.observe
            uptime = await self._workers.queries.call_within(
                self._kexec.uptime, "asking how long the host is up", deadline
            )
        self._transaction.note_blackout(uptime)

    def _remaining_claims(self, barrier: Barrier, done: set[str]) -> tuple[ProducerRecord, ...]:
        """Return the record's claims without those of the producers in `done`, as the barrier has them by now."""
        now = {holder.name: holder for holder in barrier.to_records()}
        claims = self._transaction.record.claims
        return tuple(now.get(old.name, old) for old in claims if old.name not in done)

    @property
    def _restore_seconds(self) -> float:
        return self._settings.under(self._transaction.record.arrived_terms).deadlines.restore

    async def _conclude_verdict(self, verdict: Verdict) -> None:
        await self._judgement.conclude_verdict(self._verification.add_producers(verdict))
