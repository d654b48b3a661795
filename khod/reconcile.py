"""At start: what the record says against what the kernel says. Where they disagree, that has a name."""

import enum
from dataclasses import dataclass, replace

from khod.cmdline import marked
from khod.errors import RecordError
from khod.kernel.kexec import Kexec
from khod.kernel.protocol import KhoKernel
from khod.machine import HELD, RESTING, STEPS
from khod.model import Observed, Phase, Step
from khod.record import Record


class Action(enum.Enum):
    """What khod does next, without being asked."""

    none = "none"
    roll_back = "roll back"
    resume = "resume"
    verify = "verify"


@dataclass(frozen=True)
class Found:
    """The phase khod starts in, why, and what it does about it."""

    phase: Phase
    reason: str
    action: Action = Action.none


def reconcile(record: Record | RecordError | None, kernel: Observed, after_daemon_died: str = "roll-back") -> Found:
    """Decide by the table of the design: every pair of record and kernel has one answer."""
    if isinstance(record, RecordError):
        return Found(Phase.inconsistent, record.what)
    if record is None or record.phase in RESTING:
        return _at_rest(record, kernel)
    if record.boot_id == kernel.boot_id:
        return _same_boot(record, kernel, after_daemon_died)
    if record.phase is Phase.verifying:
        return Found(Phase.idle, "the host booted again before the last handover was verified")
    by_our_kexec = marked(kernel.cmdline, record.run)
    if record.phase in (Phase.failed, Phase.rolling_back) and not by_our_kexec:
        return _at_rest(None, kernel)  # whatever could not be put back went with its kernel
    jumped_by_hand = by_our_kexec and record.phase in HELD and Step.load in record.done
    if record.phase is Phase.executing or jumped_by_hand:
        if kernel.arrived or by_our_kexec:
            return Found(Phase.verifying, "first start after the jump", Action.verify)
        return Found(
            Phase.cold_boot,
            "the host booted cold instead of jumping: "
            f"neither this handover's mark on the command line nor state from {record.release} is here",
        )
    return Found(
        Phase.inconsistent,
        f"the record says {record.phase.value} in another boot ({record.boot_id}), and {said(kernel)} in this one",
    )


def _at_rest(record: Record | None, kernel: Observed) -> Found:
    if kernel.active or kernel.loaded:
        return Found(Phase.foreign, f"{said(kernel)}, and khod did not do it")
    if record is not None and record.boot_id == kernel.boot_id:
        return Found(record.phase, record.last_error)
    return Found(Phase.idle, "")


def _same_boot(record: Record, kernel: Observed, after_daemon_died: str) -> Found:
    if record.phase is Phase.verifying:
        return Found(Phase.verifying, "khod died while it verified", Action.verify)
    if record.phase is Phase.rolling_back:
        return Found(record.phase, "khod died while it rolled back", Action.roll_back)
    if record.phase is Phase.failed:
        kept = {Step.activate: kernel.active, Step.load: kernel.loaded}
        clean = not any(kept.get(step, True) for step in record.done)
        return Found(Phase.idle, "") if clean else Found(Phase.failed, record.last_error)
    if not agrees(record, kernel):
        return Found(Phase.inconsistent, f"the record says {record.phase.value}, and {said(kernel)}")
    if after_daemon_died == "resume" and record.phase in HELD:
        return Found(record.phase, "khod was restarted and resumed", Action.resume)
    return Found(record.phase, f"khod died at {record.phase.value}", Action.roll_back)


def agrees(record: Record, kernel: Observed) -> bool:
    """Tell whether the kernel is where the record puts it.

    A step under way, and those recorded together with it, may have had their effect or not.
    """
    doing = [number for number, step in enumerate(record.done) if STEPS[step].doing is record.phase]
    open_ended = record.done[doing[0] :] if doing else ()
    facts = ((Step.activate, kernel.active), (Step.load, kernel.loaded))
    return all(fact is None or step in open_ended or fact == (step in record.done) for step, fact in facts)


def said(kernel: Observed) -> str:
    """Put what the kernel says in words."""
    phase = {True: "the kernel is active", False: "the kernel is inactive", None: "the kernel has no active phase"}
    return f"{phase[kernel.active]} with {'an' if kernel.loaded else 'no'} image loaded"


def observe(kexec: Kexec, kernel: KhoKernel | None) -> Observed:
    """Ask the kernel how it stands; call it in the kernel's thread. Raises OSError."""
    return Observed(
        boot_id=kexec.boot_id(),
        release=kexec.release(),
        cmdline=kexec.cmdline(),
        active=None if kernel is None else kernel.active(),
        loaded=kexec.loaded(),
        arrived=kernel is not None and kernel.arrived() is not None,
    )


def shown(record: Record, kernel: Observed) -> Phase:
    """The phase an operator is told, while khod runs: the record's, unless the kernel contradicts it."""
    if record.phase in (Phase.foreign, *RESTING):
        if kernel.active or kernel.loaded:
            return Phase.foreign
        return Phase.idle if record.phase is Phase.foreign else record.phase
    if record.phase in HELD and not agrees(record, kernel):
        return Phase.inconsistent
    return record.phase


def due(done: tuple[Step, ...], kernel: Observed) -> tuple[Step, ...]:
    """The steps to put back by force: those of the record, and what the kernel shows beyond them."""
    facts = ((Step.activate, kernel.active), (Step.load, kernel.loaded))
    return (*done, *(step for step, fact in facts if fact and step not in done))


def settled(record: Record, found: Found, kernel: Observed) -> Record:
    """The record of a host at rest: what it was about belongs to another boot, its counts stay."""
    if found.phase is Phase.idle:
        same = record.boot_id == kernel.boot_id
        return Record(
            boot_id=kernel.boot_id,
            release=kernel.release,
            handovers=record.handovers,
            previous_release=record.previous_release,
            last_error=record.last_error if same else "",
            suspect=record.suspect if same else "",
            failed_activations=record.failed_activations if same else 0,
        )
    if found.phase is Phase.cold_boot:
        return replace(
            record,
            phase=found.phase,
            done=(),
            boot_id=kernel.boot_id,
            release=kernel.release,
            previous_release=record.release,
            last_error=found.reason,
            suspect="",
            failed_activations=0,
            producers=(),  # nothing arrived: nobody has anything to take back
        )
    return record
