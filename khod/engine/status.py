# SPDX-License-Identifier: LGPL-2.1-or-later
"""The status for an operator in an emergency: one sentence on the state of the host, one on what to do."""

from khod.engine.transaction import Transaction
from khod.errors import Exit
from khod.handover import reconcile
from khod.handover.machine import HELD, RESTING
from khod.handover.record import Record
from khod.kernel.probe import Probed
from khod.model import FindingSource, Generation, Observed, Phase, Producer, Status, Step, Verdict
from khod.producers.barrier import READY
from khod.producers.session_scan import SightedSessions
from khod.text import join_names

PHASE_TEXT: dict[Phase, tuple[str, str]] = {
    Phase.idle: ("No handover is under way.", ""),
    Phase.preparing: ("Producers are getting ready; they go on working.", "To stop: khoctl abort"),
    Phase.quiescing: ("The rest of the host is being stopped; the producers still work.", "To stop: khoctl abort"),
    Phase.quiesced: ("The rest of the host is stopped; the producers still work.", "To stop: khoctl abort"),
    Phase.prepared: ("Every producer is ready.", "To stop: khoctl abort"),
    Phase.freezing: ("Producers are stopping their work.", "To stop: khoctl abort"),
    Phase.frozen: ("Every producer has stopped its work.", "To go back: khoctl abort"),
    Phase.activating: ("The kernel is serializing its state.", "To go back: khoctl abort"),
    Phase.active: (
        "The kernel's state is serialized; the host goes on running, its producers are frozen.",
        "khoctl kexec with `kernel` goes on, khoctl abort goes back",
    ),
    Phase.loading: ("The kernel is taking the next image.", "To go back: khoctl abort"),
    Phase.loaded: ("The next kernel is loaded.", "khoctl kexec jumps, khoctl abort goes back"),
    Phase.executing: (
        "The jump is under way.",
        "If the host does not go down: systemctl list-jobs, then khoctl abort",
    ),
    Phase.verifying: ("This kernel was reached by a handover; what arrived is being checked.", ""),
    Phase.verified: ("The handover succeeded: all state arrived.", ""),
    Phase.degraded: (
        "This kernel was reached by the kexec, and some state did not arrive.",
        "Whose state is missing must start from scratch. Look at the kernel log: journalctl -kb -g KHO",
    ),
    Phase.cold_boot: (
        "The handover failed: this host booted cold, nothing arrived.",
        "Producers must start from scratch; look at the last boot: journalctl -b -1",
    ),
    Phase.rolling_back: ("A handover is being rolled back.", ""),
    Phase.failed: ("A handover failed and could not be rolled back completely.", "Try again: khoctl abort"),
    Phase.foreign: (
        "Another program is using KHO or kexec; khod will not touch it.",
        "Find out who. To put it back: `Abort(force)`",
    ),
    Phase.inconsistent: (
        "khod's record and the kernel contradict each other.",
        "To undo the rest and thaw every producer: `Abort(force)`",
    ),
}

PHASE_EXITS = {
    Phase.failed: Exit.not_rolled_back,
    Phase.inconsistent: Exit.not_rolled_back,
    Phase.foreign: Exit.refused,
}
"""Exit codes by phase; for any other phase, the outcome of this boot's handover counts."""
OUTCOME_EXITS = {Phase.degraded: Exit.degraded, Phase.cold_boot: Exit.degraded}
FOREIGN = "Another program is using KHO or kexec as well; khod will not touch it."
HELD_THERE = "The next step has failed, and the handover was held there as asked."
UNKNOWN = "The handover succeeded; what no producer registered may not have arrived, and khod cannot know"
BESIDE_ARRIVAL = {
    FindingSource.content: "what arrived has other contents than what left",
    FindingSource.health: "a health check failed",
    FindingSource.log: "the kernel complains in its log",
    FindingSource.boot: "it is another kernel than expected, or was reached from another one",
    FindingSource.blackout: "the blackout was longer than its budget",
    FindingSource.profile: "a check that the profile requires has not passed",
}
"""What a finding of these sources says, where no state is missing."""
BARRED = "The same image may be refused now: khoctl check says so, and with which command it is tried again."
REBOOT = "Do not reboot before: it would jump into the image that is still loaded."


def build_status(
    transaction: Transaction,
    phase: Phase,
    kernel: Observed | None,
    probed: Probed,
    producers: list[Producer],
    *,
    claims: list[str],
    absent: list[str],
    units: list[str],
    sighted: SightedSessions,
    stale: bool,
) -> Status:
    """Return the status from what is known; `phase` is the machine's, unless the kernel contradicts it.

    `units` are those whose stop, or start again, is waited for.
    """
    record, under_way = transaction.record, transaction.under_way
    due = [step.value for step in transaction.machine.done]
    foreign = kernel is not None and not stale and reconcile.is_foreign(transaction.current_record(), kernel)
    summary, remedy = _summarise(phase, record, probed, foreign=foreign, absent=absent)
    if phase is Phase.inconsistent:
        summary, remedy = _describe_contradiction(transaction, kernel, producers)
    contradicted = phase in (Phase.foreign, Phase.inconsistent)
    unfinished = phase in (Phase.failed, Phase.inconsistent)
    outcome = phase if phase in OUTCOME_EXITS else record.outcome
    held = phase in HELD and bool(record.last_error)  # a step that succeeds clears the error of an earlier one
    if held:
        summary, remedy = f"{summary} {HELD_THERE}", "To try again: khoctl kexec. To go back: khoctl abort"
    code = Exit.not_rolled_back if held else PHASE_EXITS.get(phase, OUTCOME_EXITS.get(outcome, Exit.done))
    return Status(
        phase=phase,
        summary=summary,
        remedy=remedy,
        exit_code=code.value,
        generation=probed.kernel.generation if probed.kernel else Generation.none,
        kernel_active=kernel.active if kernel else None,
        kernel_loaded=kernel.loaded if kernel else None,
        kernel_release=kernel.release if kernel else "",
        boot_id=kernel.boot_id if kernel else "",
        run=record.run,
        done=[step for step in due if under_way is None or step != under_way.step],
        left=due if unfinished else [],
        waiting_for=[*(producer.name for producer in producers if producer.waiting), *absent, *units],
        producers=producers,
        verdict=record.verdict,
        previous_release=record.previous_release,
        handovers=record.handovers,
        blackout_seconds=record.blackout_seconds,
        timings=list(record.timings),
        last_error=transaction.reason if contradicted and transaction.reason else record.last_error,
        stale=stale,
        outcome=outcome,
        foreign=foreign,
        claims=claims,
        not_undone=list(record.not_undone) if phase is Phase.failed else [],
        begun=record.begun if record.begun.at and phase not in RESTING else None,
        under_way=under_way,
        sessions=list(sighted.sessions),
        sessions_unseen=sighted.unseen,
        blackout_error_seconds=record.blackout_error_seconds,
        cold_boot=record.cold_boot if outcome is Phase.cold_boot else None,
        image=record.begun.image if outcome is Phase.cold_boot and record.run == record.arrived_run else "",
        terms=record.arrived_terms if phase in (*RESTING, Phase.verifying) else record.terms,
        arrived_run=record.arrived_run,
    )


def _summarise(phase: Phase, record: Record, probed: Probed, *, foreign: bool, absent: list[str]) -> tuple[str, str]:
    """Return what the operator reads first: the state of the host, and what to do."""
    summary, remedy = PHASE_TEXT[phase]
    if phase is Phase.degraded and record.verdict is not None:
        summary, remedy = _describe_degraded(record.verdict)
    if phase is Phase.verified and record.verdict is not None and record.verdict.unknown:
        unknown = join_names(record.verdict.unknown)
        summary, remedy = f"{UNKNOWN}: {unknown}.", "Ask their owners; khoctl status lists the sessions that are open."
    if probed.kernel is None and phase in RESTING:
        summary, remedy = f"{summary} No handover is possible: {probed.what}.", remedy or probed.remedy
    if phase is Phase.cold_boot and record.cold_boot and record.cold_boot.is_image_suspect:
        remedy = f"{remedy}. {BARRED}"
    if foreign and phase is not Phase.foreign:
        summary, remedy = f"{summary} {FOREIGN}", f"{remedy} {PHASE_TEXT[Phase.foreign][1]}".strip()
    if phase is Phase.failed and any(item.step == Step.load.value for item in record.not_undone):
        remedy = f"{remedy} {REBOOT}"
    if absent and phase in RESTING:
        summary = f"{summary} Producers of before khod was restarted are not back: {join_names(absent)}."
        remedy = remedy or "Start them, or: khoctl producers forget NAME"
    return summary, remedy


def _describe_contradiction(
    transaction: Transaction, kernel: Observed | None, producers: list[Producer]
) -> tuple[str, str]:
    """Name the two facts that contradict each other, or what is wrong with the record."""
    held = [found.name for found in producers if found.phase == "freeze" and found.answer == READY]
    frozen = f" Still frozen: {join_names(held)}." if held else ""
    if transaction.phase is Phase.inconsistent and transaction.reason:
        summary = f"{transaction.reason}. What a handover may have done is not known."
    else:
        found = reconcile.describe_kernel(kernel) if kernel else "the kernel was not asked"
        summary = f"khod left the host at {transaction.phase.value}, and {found}: somebody else has changed that."
    return f"{summary}{frozen}", PHASE_TEXT[Phase.inconsistent][1]


def _describe_degraded(verdict: Verdict) -> tuple[str, str]:
    """After a handover that did not bring everything, name the producers whose state is missing, and what to do."""
    summary, remedy = PHASE_TEXT[Phase.degraded]
    findings = [finding for finding in verdict.findings if finding.source not in BESIDE_ARRIVAL]
    if verdict.findings and not findings:
        sources = dict.fromkeys(finding.source for finding in verdict.findings)
        said = [BESIDE_ARRIVAL[source] for source in sources]
        others = sorted({finding.producer for finding in verdict.findings if finding.producer})
        whose = f" ({join_names(others)})" if others else ""
        return f"This kernel was reached by the kexec, and {'; '.join(said)}{whose}.", "khoctl verify shows all of it."
    names = sorted({finding.producer for finding in findings if finding.producer})
    if not names:
        return summary, remedy
    shown = join_names(names)
    remedy = "khoctl producers says why. Repair it, then: khoctl producers retry NAME"
    others = sorted(set(verdict.arrived) - set(names))
    fine = f"What arrived: {join_names(others)}." if others else "Nothing else arrived either."
    if not {*verdict.missing, *verdict.changed} <= set(names) or any(not found.producer for found in findings):
        remedy = f"{remedy}. What the kernel did not bring is lost: journalctl -kb -g KHO"
    return f"This kernel was reached by the kexec; not taken back: what {shown} left. {fine}", remedy
