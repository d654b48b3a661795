"""After the jump: what arrived is held against the snapshot, and the producers take back what they left."""

import time
from dataclasses import replace

from khod import verify
from khod.engine.transaction import Handover
from khod.errors import ConfigError, KhoError
from khod.kernel.protocol import KhoKernel
from khod.kernel.thread import KernelThread
from khod.machine import Machine
from khod.model import Generation, Observed, Phase, Verdict
from khod.producers.barrier import Barrier, Verb
from khod.record import Holder, Store

PART = "; "
"""Between the parts of a verdict's reason."""

SHOWN = 20
"""Names in one message; the verdict has them all."""


async def look(
    here: Handover, store: Store, kernel: KhoKernel | None, thread: KernelThread, deadline: float
) -> Verdict:
    """Compare the tree that arrived with the one that left; what cannot be read is a finding."""
    try:
        snapshot, arrived = store.snapshots.read(here.record.run), None
        if kernel is not None:
            arrived = await thread.call(kernel.arrived, "reading the state that arrived", deadline)
        now = kernel.generation if kernel else Generation.none
        return verify.compare(snapshot, arrived, here.record.generation, now)
    except (KhoError, OSError) as error:
        return Verdict(reason=str(error))


async def enter(here: Handover, observed: Observed) -> None:
    """Record that this boot is the one after the jump; a khod that dies while it verifies is not counted again."""
    here.machine = Machine(Phase.verifying)
    record = here.record
    if record.boot_id != observed.boot_id:
        began = record.window_began_at
        here.record = replace(
            record,
            boot_id=observed.boot_id,
            previous_release=record.release,
            release=observed.release,
            suspect="",
            failed_activations=0,
            handovers=record.handovers + 1,
            blackout_seconds=time.time() - began if began else None,
        )
    await here.keep_if_possible()
    here.say("this kernel was reached by a handover; what arrived is being checked")


async def bring_back(here: Handover, barrier: Barrier, verdict: Verdict, deadline: float) -> Verdict:
    """Tell `restore` and then `finish`, rank by rank, and add to the verdict who has its state again.

    Whoever is done leaves the record; the others stay in it, so that what they left is given to nobody
    else. A khod that dies in between leaves in the record to whom it is said again.
    """
    waiting = [member for member in barrier.members if member.producer.restores]
    empty = [member for member in waiting if member.told != Verb.finish.value]
    failed = await barrier.bring_back(Verb.restore, empty, deadline)
    restored = [member for member in waiting if member not in failed]
    for member in restored:
        # Recorded before anyone's session is let go: whoever has what is theirs is not told to restore it again.
        member.told = Verb.finish.value
    here.record = replace(here.record, producers=_left(here, barrier, set()))
    await here.keep_if_possible()
    failed += await barrier.bring_back(Verb.finish, restored, deadline)
    done = {member.producer.name for member in barrier.members if member not in failed}
    arrived = sorted({*verdict.arrived, *(m.producer.name for m in waiting if m not in failed)})
    missing = sorted({*verdict.missing, *(member.producer.name for member in failed)} - set(arrived))
    told = tuple(_of(member.producer.name) for member in waiting)
    kept = [part for part in verdict.reason.split(PART) if part and not part.startswith(told)]
    reasons = [*kept, *(f"{_of(member.producer.name)} {member.answer.replace(PART, ', ')}" for member in failed)]
    verdict = replace(verdict, arrived=arrived, missing=missing, reason=PART.join(reasons))
    here.record = replace(here.record, producers=_left(here, barrier, done), verdict=verdict)
    return verdict


def _left(here: Handover, barrier: Barrier, done: set[str]) -> tuple[Holder, ...]:
    """The record's producers without those that are done, as the barrier has them by now."""
    now = {holder.name: holder for holder in barrier.holders()}
    return tuple(now.get(old.name, old) for old in here.record.producers if old.name not in done)


def unreadable(verdict: Verdict, error: ConfigError) -> Verdict:
    """The verdict where it cannot even be told who had something to take back."""
    return replace(verdict, reason=PART.join(part for part in (verdict.reason, str(error)) if part))


def _of(producer: str) -> str:
    """How a reason that is a producer's begins."""
    return f"producer {producer}:"


async def conclude(here: Handover, verdict: Verdict) -> None:
    """End the verification, or correct it when somebody came late: verified, or degraded with the reason."""
    phase = Phase.degraded if verdict.reason else Phase.verified
    if here.machine.phase is not phase:
        here.machine = here.machine.to(phase)
    here.reason = verdict.reason
    here.record = replace(here.record, verdict=verdict, last_error=verdict.reason)
    await here.keep_if_possible()
    here.say(verdict.reason or f"the state of {len(verdict.arrived)} producers: {', '.join(verdict.arrived[:SHOWN])}")
