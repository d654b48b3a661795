# SPDX-License-Identifier: LGPL-2.1-or-later
"""At start, compare the record with the kernel; each disagreement has a phase of its own."""

import enum
from dataclasses import replace

from khod.dataclass import dataclass
from khod.errors import RecordError
from khod.handover.machine import HELD, RESTING, STEPS
from khod.handover.record import Record
from khod.kernel.kexec import Kexec
from khod.kernel.mark import is_marked, run_mark
from khod.kernel.protocol import KhoKernel
from khod.model import ColdBoot, Observed, Phase, Step
from khod.text import join_names


class Action(enum.Enum):
    """What khod does next on its own."""

    none = "none"
    roll_back = "roll back"
    resume = "resume"
    verify = "verify"


@dataclass(frozen=True)
class Found:
    """The phase in which khod starts, why, and what it does next.

    `doubt` is why what arrived cannot be all of the producers' state, "" without such a reason.
    """

    phase: Phase
    reason: str
    action: Action = Action.none
    doubt: str = ""


JUMPABLE = frozenset(Step) - {Step.quiesce, Step.execute}
"""The steps after which every producer is frozen and the image has the state."""


def reconcile_record(
    record: Record | RecordError | None, kernel: Observed, after_daemon_died: str = "roll-back"
) -> Found:
    """Decide what to do for a pair of record and kernel; every pair has exactly one answer.

    Changes that other programs made to the kernel do not matter here: `is_foreign` checks them anew each time.
    """
    if isinstance(record, RecordError):
        return Found(Phase.inconsistent, record.what)
    if record is None:
        return _without_record(kernel)
    if record.boot_id == kernel.boot_id:
        return _same_boot(record, kernel, after_daemon_died)
    return _other_boot(record, kernel)


def _phase_words(phase: Phase) -> str:
    return phase.value.replace("_", " ")


def provisional_state(record: Record | RecordError | None) -> Found:
    """Return the state according to the record, until the kernel has answered."""
    if isinstance(record, RecordError):
        return Found(Phase.inconsistent, record.what)
    return Found(record.phase if record else Phase.idle, "khod starts: the kernel was not asked yet")


def _without_record(kernel: Observed) -> Found:
    if (run := run_mark(kernel.cmdline)) and kernel.arrived:
        return Found(Phase.degraded, f"this boot was reached by the handover {run}, of which no record is left")
    return Found(Phase.idle, "")


def _same_boot(record: Record, kernel: Observed, after_daemon_died: str) -> Found:
    if record.phase in RESTING:
        return Found(record.phase, record.last_error)
    if record.phase is Phase.verifying:
        return Found(Phase.verifying, "khod stopped unexpectedly while it verified", Action.verify, record.doubt)
    if record.phase is Phase.rolling_back:
        return Found(record.phase, "khod stopped unexpectedly while it rolled back", Action.roll_back)
    if record.phase is Phase.failed:
        kept = {Step.activate: kernel.active, Step.load: kernel.loaded}
        clean = not any(kept.get(step, True) for step in record.done)
        return Found(record.outcome, "") if clean else Found(Phase.failed, record.last_error)
    if exceeds_record(record, kernel):
        return Found(Phase.inconsistent, f"the record says {record.phase.value}, and {describe_kernel(kernel)}")
    if not record_agrees(record, kernel):
        # Part of it was undone, by khod or by hand, and that could not be recorded. Frozen producers are still frozen.
        return Found(
            record.phase,
            f"khod stopped unexpectedly after {_phase_words(record.phase)}, and {describe_kernel(kernel)}",
            Action.roll_back,
        )
    if after_daemon_died == "resume" and record.phase in HELD:
        return Found(record.phase, "khod was restarted and resumed", Action.resume)
    return Found(
        record.phase, f"khod stopped unexpectedly while the handover was {_phase_words(record.phase)}", Action.roll_back
    )


def _other_boot(record: Record, kernel: Observed) -> Found:
    if record.phase in RESTING:
        if record.interrupted:
            return Found(Phase.cold_boot, f"the host went down and booted cold: {record.interrupted}")
        return Found(Phase.idle, _lost_claims(record))
    by_our_kexec = is_marked(kernel.cmdline, record.run)
    if record.phase is Phase.verifying:
        lost = _lost_claims(record)
        again = f"the host booted again before the last handover was verified{f'; {lost}' if lost else ''}"
        # Without a shutdown and without a jump the kernel that the handover led to has died.
        died = not (record.interrupted or by_our_kexec or kernel.arrived)
        return Found(Phase.cold_boot if died else Phase.idle, again)
    if by_our_kexec or kernel.arrived:  # whichever image it was, the producers' state came with it
        return Found(Phase.verifying, "first start after the jump", Action.verify, _record_doubt(record))
    if record.phase is Phase.executing:
        return Found(
            Phase.cold_boot,
            "the host booted cold instead of jumping: "
            f"neither this handover's mark on the command line nor state from {record.release} is here",
        )
    if record.phase in (Phase.failed, Phase.rolling_back):
        return Found(Phase.idle, "")  # what was not undone ended with its kernel
    return Found(
        Phase.idle,
        f"the host went down while a handover was at {record.phase.value}, before the jump: nothing was handed over",
    )


def _lost_claims(record: Record) -> str:
    """Describe what was lost with the boot of the record; "" if nothing waited to be taken back."""
    names = join_names(holder.name for holder in record.claims)
    return f"the host booted again before {names} had taken back what waited: it is lost" if names else ""


def _record_doubt(record: Record) -> str:
    if record.phase is Phase.executing or (record.phase in HELD and set(record.done) >= JUMPABLE):
        return ""
    if record.phase in HELD and Step.freeze in record.done:
        return "the host jumped into an image that khod had not loaded"
    if record.phase in (Phase.failed, Phase.rolling_back):
        return "the host jumped into the image of a handover that was being rolled back: what arrived is stale"
    return f"the host jumped while the handover was at {record.phase.value}: not every producer was frozen"


def record_agrees(record: Record, kernel: Observed) -> bool:
    """Whether the kernel is in the state that the record says.

    A step under way, and those recorded together with it, may have had their effect or not.
    """
    doing = [number for number, step in enumerate(record.done) if STEPS[step].doing is record.phase]
    open_ended = record.done[doing[0] :] if doing else ()
    facts = ((Step.activate, kernel.active), (Step.load, kernel.loaded))
    return all(fact is None or step in open_ended or fact == (step in record.done) for step, fact in facts)


def exceeds_record(record: Record, kernel: Observed) -> bool:
    """Whether the kernel shows an effect that no recorded step of khod has."""
    facts = ((Step.activate, kernel.active), (Step.load, kernel.loaded))
    return any(fact and step not in record.done for step, fact in facts)


def describe_kernel(kernel: Observed) -> str:
    """Describe the state of the kernel in words."""
    image = f"with {'an' if kernel.loaded else 'no'} image loaded"
    if kernel.active is None:
        return f"this kernel has no active phase; {'an' if kernel.loaded else 'no'} image is loaded"
    return f"the kernel is {'active' if kernel.active else 'inactive'} {image}"


def observe_kernel(kexec: Kexec, kernel: KhoKernel | None) -> Observed:
    """Read the state of the kernel, in the kernel's thread. Raises OSError."""
    return Observed(
        boot_id=kexec.boot_id(),
        release=kexec.kernel_release(),
        cmdline=kexec.cmdline(),
        active=None if kernel is None else kernel.is_active(),
        loaded=kexec.is_loaded(),
        arrived=kernel is not None and kernel.has_arrived(),
    )


def is_foreign(record: Record, kernel: Observed) -> bool:
    """Whether another program has entered the active phase or loaded an image, while khod has nothing under way."""
    return record.phase in RESTING and bool(kernel.active or kernel.loaded)


def effective_phase(record: Record, kernel: Observed) -> Phase:
    """Return the phase shown to operators: the record's, unless the kernel contradicts it.

    The outcome of this boot's handover is always shown, whatever was done since.
    """
    if is_foreign(record, kernel) and record.phase is Phase.idle:
        return Phase.foreign
    if record.phase in HELD and not record_agrees(record, kernel):
        return Phase.inconsistent
    return record.phase


def steps_to_undo(done: tuple[Step, ...], kernel: Observed, *, told: bool) -> tuple[Step, ...]:
    """Return the steps to undo by force: the recorded ones, and those whose effect only the kernel shows.

    With `told` the producers' steps are included. They may have been done without a record, and an undo is harmless if
    nothing was done.
    """
    steps = (*((Step.prepare, Step.freeze) if told else ()), *done)
    facts = ((Step.activate, kernel.active), (Step.load, kernel.loaded))
    return (*dict.fromkeys(steps), *(step for step, fact in facts if fact and step not in done))


def reset_record(record: Record, found: Found, kernel: Observed) -> Record:
    """Return the record of a host at rest: nothing is under way, and facts about another boot are removed.

    The outcome of this boot stays, whatever was tried since.
    """
    if record.boot_id == kernel.boot_id:
        # An earlier khod kept what waits to be taken back in `producers` of a record at rest, which is empty now.
        earlier = record.producers if record.phase in RESTING else ()
        claims, run = record.claims or earlier, record.arrived_run or (record.run if earlier else "")
        return replace(
            record,
            phase=found.phase,
            outcome=found.phase,
            done=(),
            producers=(),
            claims=claims,
            arrived_run=run,
            interrupted="",
        )
    cold = _begin_cold_boot(record, found) if found.phase is Phase.cold_boot else None
    kept = record if found.phase is Phase.cold_boot else Record(previous_release=record.previous_release)
    return replace(
        kept,
        phase=found.phase,
        outcome=found.phase,
        done=(),
        boot_id=kernel.boot_id,
        release=kernel.release,
        handovers=record.handovers,
        previous_release=record.release if found.phase is Phase.cold_boot else record.previous_release,
        last_error=found.reason,
        suspect="",
        failed_activations=0,
        producers=(),  # nothing arrived, so no producer has anything to take back
        claims=(),
        # If a session of it arrived all the same, it is the previous kernel's, and must not be closed as a stray of
        # this boot.
        arrived_run=kept.run,
        arrived_terms=kept.terms,
        doubt="",
        not_undone=(),
        interrupted="",
        cold_boot=cold,
        watchdog=record.watchdog,
    )


def _begin_cold_boot(record: Record, found: Found) -> ColdBoot:
    """Return what is known before the explanation.

    From another phase than these the image was not booted: `idle` is that of a handover which a shutdown rolled back.
    """
    is_image_suspect = record.phase in (Phase.executing, Phase.verifying)
    return ColdBoot(found.reason, record.phase, boot_id=record.boot_id, is_image_suspect=is_image_suspect)
