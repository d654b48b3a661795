# SPDX-License-Identifier: LGPL-2.1-or-later
"""The steps of the verification after the jump: each adds a check to the verdict, and findings if something is wrong.

All of it comes after the producers were told, because they wait: how this kernel was reached, what its tree has, what
was compared of their files while they took them back, the log of this boot, and the health checks of the operator. A
step that khod cannot make is shown as skipped; none of them stops another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from khod.deferred import defer_module
from khod.engine.resources import Resources
from khod.engine.transaction import Transaction
from khod.errors import KhoError
from khod.handover.record import ProducerRecord
from khod.kernel.protocol import KhoKernel, Tree
from khod.model import Finding, FindingSource, Generation, Observed, Verdict
from khod.producers.contents import Comparison, check_contents, contents_check

if TYPE_CHECKING:
    from khod.handover import evidence, verify
    from khod.kernel import boot_log
    from khod.producers.health import HealthCheck
else:
    evidence = defer_module("khod.handover.evidence")
    verify = defer_module("khod.handover.verify")
    boot_log = defer_module("khod.kernel.boot_log")

LOG_SECONDS = 10.0
"""Seconds in which the kernel log of this boot must be read."""
NOT_TAKEN = "it was not taken back"


class Verification:
    """Verifies this boot, with the operator's checks and what was compared of producers' files."""

    def __init__(self, transaction: Transaction, resources: Resources) -> None:
        self._transaction = transaction
        self._store = resources.store
        self._kexec = resources.kexec
        self._workers = resources.workers
        self._settings = resources.settings
        self._kept_files = resources.sessions.kept_files
        self._health = resources.health
        self._host_up = resources.host_up
        self._is_first = False
        """Whether no khod before this one was in this boot: no producer was given its files before."""
        self._checks: list[HealthCheck] = []
        self._left: dict[str, int] = {}
        """The producers that had something to take back, and how many files."""

    def enter_boot(self, observed: Observed) -> None:
        """Note whether an earlier khod has begun to verify this boot; call it before that is recorded."""
        self._is_first = self._transaction.record.boot_id != observed.boot_id

    def begin_verdict(self) -> Verdict:
        """Return the verdict on what an earlier khod of this boot gave back; call it before any producer is told."""
        self._left = {holder.name: len(holder.kept) for holder in self._transaction.record.claims}
        return self._read_earlier()

    async def examine_arrival(self, observed: Observed, kernel: KhoKernel | None, given_back: Verdict) -> Verdict:
        """Compare what arrived with what left; return the verdict on that and on what was given back.

        No producer needs to wait for this.
        """
        record = self._transaction.record
        deadline = self._settings.current.deadlines.activate
        now = kernel.generation if kernel else Generation.none
        snapshot = arrived = None
        try:
            snapshot = await self._workers.disk.call_within(
                lambda: self._store.snapshots.read_tree(record.arrived_run), "reading the snapshot", deadline
            )
            if kernel is not None:
                arrived = await self._workers.observer.call_within(
                    kernel.arrived_tree, "reading the state that arrived", deadline
                )
            verdict = verify.compare_trees(snapshot, arrived, record.generation, now)
        except Exception as error:  # noqa: BLE001 - after any error, the producers must still get back what they left
            verdict = Verdict().with_findings([Finding.of_khod(_describe_error(error))])
        unread = await self._load_health_checks()
        steps = [
            *unread,
            _make_step("kho", lambda: evidence.check_arrival(observed)),
            await self._check_kernel(observed),
            _make_step("tree", lambda: evidence.check_tree(verdict, snapshot)),
            *self._compare_blobs(snapshot, arrived),
        ]
        verdict = evidence.add_evidence(verdict, [step for step in steps if step is not None])
        return _join_verdicts(verdict, given_back)

    async def conclude(self, verdict: Verdict) -> Verdict:
        """Add what can be known once the producers have their state: the kernel log, and the health checks."""
        if self._checks:
            await self._host_up()
        checks = await self._health.run_checks(self._checks, self._transaction.record.arrived_run)
        return evidence.add_evidence(verdict, [await self._read_log(), *checks])

    @property
    def takes_long(self) -> bool:
        """Whether there are health checks, which khod's start must not wait for."""
        return bool(self._checks)

    def add_contents(self, verdict: Verdict, told: Sequence[ProducerRecord]) -> Verdict:
        """Add what was compared of the files of the producers that were told to take theirs back."""
        by_producer: dict[str, list[Comparison]] = {}
        for comparison in self._kept_files.comparisons:
            by_producer.setdefault(comparison.producer, []).append(comparison)
        steps, differing = [], set[str]()
        known = {check.name for check in verdict.checks}
        for holder in told:
            found = by_producer.get(holder.name, [])
            if not holder.kept or (not found and contents_check(holder.name) in known):
                continue
            names = {one.name for one in found}
            missed = [Comparison(holder.name, one.name, gap=NOT_TAKEN) for one in holder.kept if one.name not in names]
            check, findings = check_contents(holder.name, [*found, *missed], given_before=not self._is_first)
            steps.append(evidence.Evidence(check, tuple(findings)))
            differing |= {finding.producer for finding in findings}
        verdict = evidence.add_evidence(verdict, steps)
        if not differing:
            return verdict
        return replace(
            verdict,
            arrived=[name for name in verdict.arrived if name not in differing],
            changed=sorted({*verdict.changed, *differing}),
        )

    def add_producers(self, verdict: Verdict) -> Verdict:
        """Add what became of the producers that are required, and of the files in LUO's sessions."""
        config = self._settings.under(self._transaction.record.arrived_terms)
        arrived = len(self._kept_files.comparisons)
        required = evidence.check_required(
            config.producers.require, sorted({*self._left, *verdict.arrived}), verdict, config.deadlines.restore
        )
        sessions = sum(1 for count in self._left.values() if count)
        luo = evidence.check_sessions(sum(self._left.values()), arrived, sessions)
        return evidence.add_evidence(verdict, [step for step in (required, luo) if step is not None])

    def _read_earlier(self) -> Verdict:
        """Return what an earlier khod of this boot found: who has its state again, and what was in the files."""
        before = None if self._is_first else self._transaction.record.verdict
        if before is None:
            return Verdict()
        found = [finding for finding in before.findings if finding.source is FindingSource.content]
        changed = {finding.producer for finding in found}
        back = {*before.arrived} - {*self._left} - changed
        of_files = {*map(contents_check, [*self._left, *changed, *back])}
        checks = [check for check in before.checks if check.name in of_files]
        return Verdict(arrived=sorted(back), changed=sorted(changed), checks=checks).with_findings(found)

    async def _load_health_checks(self) -> list[evidence.Evidence]:
        """Read the operator's health checks; return what is to be said if their directory does not answer."""
        try:
            deadline = self._settings.current.deadlines.activate  # the first boot is busy: none may be left out
            self._checks = await self._workers.files.call_within(
                self._health.load_checks, "reading /etc/kho/verify.d", deadline
            )
        except (KhoError, OSError) as error:
            return [evidence.Evidence.unknown("health", f"the health checks cannot be read: {_describe_error(error)}")]
        return []

    async def _check_kernel(self, observed: Observed) -> evidence.Evidence:
        try:
            deadline = self._settings.current.deadlines.observe
            banner = await self._workers.files.call_within(self._kexec.banner, "reading /proc/version", deadline)
        except (KhoError, OSError):
            banner = ""
        return _make_step(
            "kernel", lambda: evidence.check_kernel(self._transaction.record, observed, banner)
        ) or evidence.Evidence.unknown("kernel", "not examined")

    def _compare_blobs(self, snapshot: Tree | None, arrived: Tree | None) -> list[evidence.Evidence | None]:
        record = self._transaction.record
        return [
            _make_step("memblock", lambda: evidence.check_memblock(snapshot, arrived)),
            _make_step(evidence.METADATA_BLOB, lambda: evidence.check_metadata(record, snapshot, arrived)),
        ]

    async def _read_log(self) -> evidence.Evidence:
        try:
            found = await self._workers.queries.call_within(
                lambda: boot_log.read_boot_log(self._kexec.calls), "reading the kernel log", LOG_SECONDS
            )
        except (KhoError, OSError) as error:
            return evidence.Evidence.unknown("log", f"the kernel log cannot be read: {_describe_error(error)}")
        return evidence.check_log(found)


def _join_verdicts(compared: Verdict, given_back: Verdict) -> Verdict:
    """Join what was compared in the state trees with what producers were given back."""
    changed = {*compared.changed, *given_back.changed}
    missing = {*compared.missing, *given_back.missing}
    return replace(
        compared,
        arrived=sorted({*compared.arrived, *given_back.arrived} - changed - missing),
        missing=sorted(missing),
        changed=sorted(changed),
        checks=[*compared.checks, *given_back.checks],
    ).with_findings([*compared.findings, *given_back.findings])


def _make_step(name: str, step: Callable[[], evidence.Evidence | None]) -> evidence.Evidence | None:
    """Make one step; an error of khod's in it leaves a skipped check, and the others go on."""
    try:
        return step()
    except Exception as error:  # noqa: BLE001 - an unexpected answer of a kernel
        return evidence.Evidence.unknown(name, f"not examined: {_describe_error(error)}")


def _describe_error(error: Exception) -> str:
    return str(error) if isinstance(error, (KhoError, OSError)) else f"khod itself failed: {error!r}"
