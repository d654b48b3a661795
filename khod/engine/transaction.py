# SPDX-License-Identifier: LGPL-2.1-or-later
"""One handover under way: the only writer of the machine and of its record.

Every step is recorded before it is taken; a failed step leads to the undo of all steps done. A cause that ends a
handover is kept until it was acted on: it is checked before each step, after the last one, and once more at the end of
an operation.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

from khod.concurrency.bounded import ANYTHING, raise_if_cancelling
from khod.concurrency.worker import Worker
from khod.deferred import defer_module
from khod.engine.cancellation import Cancellation
from khod.engine.record_writer import RECORD_SECONDS, RECORD_UNDO_SECONDS, RecordWriter
from khod.errors import Failed, KhoError, NotRolledBack, Refused
from khod.handover.machine import HELD, RESTING, STEPS, Machine
from khod.handover.reconcile import Found
from khod.handover.record import ProducerRecord, Record, Store
from khod.model import (
    NO_TERMS,
    ColdBoot,
    Event,
    EventKind,
    Observed,
    Phase,
    Producer,
    Step,
    StepTiming,
    Terms,
    UnderWay,
    Verdict,
    Word,
)
from khod.producers.barrier import Member, write_verb
from khod.text import join_names

if TYPE_CHECKING:
    from khod.engine import attempt as attempts
    from khod.engine import rollback
    from khod.engine.attempt import Attempt
    from khod.handover import verify
    from khod.history.model import Timeline
    from khod.kernel import explain
    from khod.producers.session_scan import SightedSessions
else:
    attempts = defer_module("khod.engine.attempt")
    rollback = defer_module("khod.engine.rollback")
    verify = defer_module("khod.handover.verify")
    explain = defer_module("khod.kernel.explain")

LOG = logging.getLogger(__name__)
COALESCED = (Step.activate, Step.load)
"""Two steps that one durable record names if they follow each other: an fsync between them would lengthen the
blackout."""

BEGINS = {
    Step.prepare: "{who} is told to prepare",
    Step.quiesce: "the rest of the host is stopped",
    Step.freeze: "{who} is told to freeze",
    Step.activate: "the kernel serializes its state",
    Step.load: "the kernel takes the image",
    Step.execute: "the jump is asked for",
}
"""The message when a step begins."""

NOT_UNDONE = "Not everything could be put back"
"""Follows the first cause in a message if the rollback fails too: a later error must not hide the cause."""
ROLLED_BACK = "Everything was rolled back."
"""Begins the remedy if the rollback does not fail."""

SHUTDOWN_SECONDS = 2.0
"""Seconds that an undo waits at its end for systemd to say whether the host is shut down; a later answer is recorded
too."""

CAN_END = HELD | {STEPS[step].doing for step in STEPS if step is not Step.execute}
"""Phases that a veto may still end: those before the jump is requested."""


def recorded_ahead(steps: Sequence[Step]) -> Sequence[Step]:
    """Return the steps after the first that the first one's record names too."""
    return steps[1:2] if tuple(steps[:2]) == COALESCED else ()


def told_error(error: BaseException) -> KhoError:
    """Return the error that is reported to an operator."""
    if isinstance(error, KhoError):
        return error
    if isinstance(error, OSError):
        return Failed(str(error))
    return Failed(f"khod itself failed: {error!r}", remedy="This is a bug; the journal has more.")


class Transaction:
    """The state of this host's handover. `tell` is called with every change, in the event loop.

    `before_step` is called before each step, and cancels the handover if it must not continue. `goes_down` asks whether
    the host is being shut down. `before_departure` is called before the record that announces the jump is written.

    One class of this size: it is the only writer of the machine and the record, and every exception to the table of the
    machine (a hold, a take-over, a cancelled step) has to be where those are private.
    """

    def __init__(
        self,
        store: Store,
        disk: Worker,
        tell: Callable[[Event], None],
        before_step: Callable[[], None],
        goes_down: Callable[[], Awaitable[bool]] | None = None,
        before_departure: Callable[[], None] = lambda: None,
    ) -> None:
        self._machine = Machine()
        self._record = Record()
        self._reason = ""
        self._attempt: Attempt | None = None
        self.cancellation = Cancellation(before_step)
        self._acted_on: tuple[KhoError, KhoError] | None = None
        self.rollbacks = 0
        """The number of rollbacks that have ended."""
        self.rollback_error: KhoError | None = None
        """The error of the last rollback if it could not undo everything."""
        self._step_began = 0.0
        self._jump_asked = False
        self._emitted = self._machine.phase  # the phase of the last event
        self._rolled_back_from = Phase.rolling_back
        self._note = ""
        self._writer = RecordWriter(store, disk, self.current_record, self.emit_event)
        self._tell = tell
        self._goes_down = goes_down
        self._before_departure = before_departure
        self._shutdown_note: asyncio.Future[None] | None = None

    @property
    def machine(self) -> Machine:
        """The phase, and the steps whose undo is due."""
        return self._machine

    @property
    def phase(self) -> Phase:
        """The machine's phase."""
        return self._machine.phase

    @property
    def record(self) -> Record:
        """The record, with changes that the next write saves."""
        return self._record

    @property
    def reason(self) -> str:
        """Why the handover is in its phase, "" if there is nothing to say."""
        return self._reason

    @property
    def attempt(self) -> Attempt | None:
        """The attempt of the handover under way."""
        return self._attempt

    @property
    def under_way(self) -> UnderWay | None:
        """The step that has begun and has not ended."""
        done = self._machine.done
        if not done or self.phase is not STEPS[done[-1]].doing:
            return None
        return UnderWay(done[-1].value, time.monotonic() - self._step_began)

    # Beginnings

    def adopt_found(self, found: Found, record: Record) -> None:
        """Take over the state that a start of khod has found."""
        self._record, self._reason = record, found.reason
        self._machine = Machine(found.phase, () if found.phase in RESTING else record.done)

    def begin_run(self, record: Record) -> None:
        """Begin the run of this record, from rest."""
        # The outcome of this boot stays if the handover ends before its first step.
        self._machine, self._attempt, self._record, self._reason = Machine(record.outcome), None, record, ""

    def note_target(self, image: str, *, luo_off: bool = False, release: str = "", banner: str = "") -> None:
        """Note the image of the handover and its kernel, for its next record. The fields are those of Begun."""
        begun = replace(self._record.begun, image=image, luo_off=luo_off, kernel_release=release, kernel_banner=banner)
        self._record = replace(self._record, begun=begun)

    def attach_attempt(self, attempt: Attempt | None) -> None:
        """Use this attempt from here on; None if a new one is to be made from the record."""
        self._attempt = attempt

    def adopt_steps(self, phase: Phase, steps: tuple[Step, ...], observed: Observed, note: str = "") -> None:
        """Take over steps that khod has no record of (`foreign`), or no consistent one (`inconsistent`), to undo them.

        `note` is what an operator should know of it afterwards.
        """
        self._machine = Machine(phase, steps)
        self._record = replace(self._record, last_error=note or self._record.last_error)
        if not self._record.boot_id:
            self._record = replace(self._record, boot_id=observed.boot_id, release=observed.release)

    @contextmanager
    def drive_aside(self, record: Record) -> Iterator[None]:
        """Drive something other than a handover, from rest; if that ends at rest, restore the state from before."""
        machine, before, reason = self._machine, self._record, self._reason
        self.begin_run(record)
        try:
            yield
        finally:
            if self.phase in RESTING:
                self._machine, self._attempt, self._record, self._reason = machine, None, before, reason

    @property
    def can_be_cancelled(self) -> bool:
        """Whether something is under way that can still be ended: before the jump is requested."""
        return self.phase in CAN_END or (self.phase is Phase.executing and not self._jump_asked)

    def failure_after(self, cause: KhoError) -> KhoError | None:
        """Return what the rollback for `cause` could not undo; None if it undid everything."""
        if self._acted_on is not None and self._acted_on[0] is cause and self._acted_on[1] is not cause:
            return self._acted_on[1]
        return None

    # The way forward

    async def run_steps(self, steps: Sequence[Step], *, hold: bool) -> None:
        """Take the steps in order; a failure undoes everything and raises the cause.

        With `hold` only the failed step is undone, and the handover waits where it was before that step.
        """
        recorded: Sequence[Step] = ()
        for number, step in enumerate(steps):
            before, caught_up = self._machine, False
            try:
                await self._catch_up(step, begins=number == 0)
                caught_up = True
                await self.cancellation.raise_if_cancelled()
                ahead = None if step in recorded else recorded_ahead(steps[number:])
                recorded = recorded if ahead is None else (step, *ahead)
                await self._take_step(step, ahead)
            except attempts.JumpUnderWay:
                self.cancellation.settle()
                raise
            except ANYTHING as error:  # also a bug in khod: it must be undone
                raise_if_cancelling(error)
                # --hold does not apply if a late producer could not catch up with the others: it must not stay
                # half-way.
                await self._on_failure(error, step, before, hold=hold and caught_up)
        if self.phase is Phase.executing:
            return
        try:
            await self.cancellation.raise_if_cancelled()
            await self.write_record()
            await self.cancellation.raise_if_cancelled()
        except ANYTHING as error:
            raise_if_cancelling(error)
            await self._on_failure(error, None, self._machine, hold=False)

    async def _on_failure(self, error: BaseException, step: Step | None, before: Machine, *, hold: bool) -> NoReturn:
        cause, called_off = told_error(error), self.cancellation.cause is not None
        if not self._machine.done:
            self.cancellation.settle()
            raise cause from error
        if step is Step.activate and isinstance(error.__cause__, OSError):  # the kernel itself refused
            self._record = replace(self._record, failed_activations=self._record.failed_activations + 1)
        if hold and step is not None and before.phase in HELD and not called_off:
            await self._hold_before(step, before, cause)
        await self.roll_back(self.cancellation.cause or cause)
        raise AssertionError("a rollback with a cause raises")

    async def _catch_up(self, step: Step, *, begins: bool) -> None:
        """Bring late producers to the state of the others: each verb is recorded before it is told.

        The leaders confirm what they hold where an operation goes on with a handover, and before the step that stops
        anything; after quiesce the host may have no network to ask.
        """
        attempt = self._require_attempt()
        if attempt.resumed:
            await self.cancellation.wait_interruptibly(attempt.wait_reconnected())
        if step is Step.execute and self._jump_asked:
            return
        while late := attempt.admit_late():
            for verb in attempt.past:
                await self.write_record()
                await self.cancellation.wait_interruptibly(attempt.tell_producers(verb, late))
        if (begins or step in (Step.quiesce, Step.freeze)) and Step.quiesce not in self._machine.done:
            await self.cancellation.wait_interruptibly(attempt.confirm_leaders())
        self._require_luo()

    def _require_luo(self) -> None:
        """Refuse an image that starts with LUO off if files were handed over: the next kernel would lose them.

        The check `formats` warns of it before any producer is told, when it is not known yet whether there will be
        files. This is checked again before each step, and --hold does not apply to it: no other image can replace one
        that is loaded.
        """
        if self._record.begun.luo_off and (names := self._require_attempt().preserving_producers):
            raise Refused(
                f"LUO is off in the next kernel, which would lose the files of {join_names(names)}",
                where="the next kernel's command line",
                remedy="Add it: `kernel.append=liveupdate=on`",
            )

    async def _take_step(self, step: Step, ahead: Sequence[Step] | None) -> None:
        """Take one step, recorded together with those in `ahead`; None if a durable record names it already."""
        attempt = self._require_attempt()
        if step is Step.quiesce:  # recorded before the first of them is stopped: the undo starts what stands there
            quiesced = await self.cancellation.wait_interruptibly(attempt.select_units())
            self._record = replace(self._record, quiesced=quiesced)
        self._machine, self._step_began = self._machine.begin_step(step), time.monotonic()
        done = (*self._machine.done, *(ahead or ()))
        if ahead is not None:
            await self._write_record(replace(self.current_record(), done=done), departs=step is Step.execute)
        begun = self._record.begun
        to = f", to {begun.image}" if begun.image else ""
        by = f"; begun by {begun.by}{to}" if begun.by and step is Step.prepare else ""
        members = attempt.barrier.members
        who = members[0].producer.name if len(members) == 1 else "every producer"
        self.emit_event(f"{BEGINS[step].format(who=who)}{by}", EventKind.step_began, step=step)
        began = time.monotonic()
        if step is Step.freeze:
            self._record = replace(self._record, window_began_at=time.time())
        if step is Step.execute:
            await self.cancellation.raise_if_cancelled()
            self._jump_asked = True
        await self.cancellation.wait_interruptibly(attempt.do_step(step))
        if step is Step.quiesce and self._record.at_once and not attempt.immediate:
            self._record = replace(self._record, at_once=False)
            self.emit_event("a service has stored files in its stop, which systemctl kexec hands over: it jumps")
        self.note_timing(step.value, began)
        self._record = replace(self._record, last_error="")  # of an earlier try, which was held
        self._machine = self._machine.finish_step(step)
        took = self._record.timings[-1].seconds
        self.emit_event(f"{step.value} took {took:.3f} s", EventKind.step_ended, step=step, duration=took)

    async def _hold_before(self, step: Step, before: Machine, cause: KhoError) -> NoReturn:
        """Undo only the failed step and stay where it began, as --hold requests."""
        if await rollback.undo_all(self._require_attempt(), (step,), self.emit_event):
            await self.roll_back(cause)
        self._machine, self._reason, self._jump_asked = before, cause.what, False
        self._record = replace(self._record, last_error=str(cause))
        try:
            await self.write_record()
        except Exception:  # noqa: BLE001 - what cannot be recorded is not held
            await self.roll_back(self.cancellation.cause or cause)
        self.emit_event(f"held at {before.phase.value}: {cause.what}")
        raise NotRolledBack(
            f"{cause.what}; held at {before.phase.value} as asked",
            where=cause.where,
            remedy=f"{cause.remedy} To go back: khoctl abort".strip(),
        )

    async def record_departure(self) -> None:
        """Record that the host goes down into the next kernel, whoever requested it: from here on nothing is undone."""
        if self.phase is not Phase.executing:
            self._machine = self._machine.begin_step(Step.execute)
        self._jump_asked = True
        self._record = replace(self._record, at_once=False)
        await self._write_record(self.current_record(), departs=True)
        self.emit_event("the host goes down into the next kernel")

    # The way back

    async def roll_back(
        self,
        cause: KhoError | None,
        *,
        said: str = "putting everything back",
        interrupted: Phase | None = None,
        because: KhoError | None = None,
    ) -> None:
        """Undo every step done; one that cannot be undone does not stop the others, and every wait has a limit.

        Raises `cause`, or NotRolledBack if something could not be undone. Without a cause it returns: the operator
        requested it, or `because` is the reason and no caller waits for an answer. `interrupted` is the phase of the
        handover when a shutdown of the host stopped khod. A shutdown may also be behind `cause`, if it stopped a
        producer before khod: systemd is asked, and the record says so.
        """
        if cause is not None:
            self._shutdown_note = asyncio.ensure_future(self._note_shutdown(self._record.run, self.phase))
        self._rolled_back_from = self.phase
        if interrupted is not None:
            self._set_interrupted(interrupted)
        if self.phase is not Phase.rolling_back:  # khod may have died while it rolled back
            self._machine = self._machine.enter_phase(Phase.rolling_back)
        if ended := cause or because:
            self._record = replace(self._record, last_error=str(ended))
        await self.try_write_record(RECORD_UNDO_SECONDS)
        self.emit_event(ended.what if ended else said)
        attempt = self._require_attempt()
        if (
            Step.activate in self._machine.done
            and attempt.kernel
            and (forgot := explain.FORGOT.get(attempt.kernel.abort))
        ):
            self._record = replace(self._record, suspect=forgot)
        failures = await rollback.undo_all(attempt, self._machine.done, self.emit_event)
        left = {failure.step for failure in failures}
        if Step.freeze in left:  # a producer that could not be thawed was not told `cancel` either
            left.add(Step.prepare)
        for step in set(self._machine.done) - left:
            self._machine = self._machine.strike_step(step)
        if self._shutdown_note is not None:
            await asyncio.wait({self._shutdown_note}, timeout=SHUTDOWN_SECONDS)
        await self._end_rollback(cause, failures, because)

    async def _end_rollback(
        self, cause: KhoError | None, failures: Sequence[rollback.Failure], because: KhoError | None
    ) -> None:
        self._machine = self._machine.enter_phase(Phase.failed if failures else self._record.outcome)
        self._reason = "; ".join(dict.fromkeys(failure.describe() for failure in failures))
        first = self._record.last_error.partition(NOT_UNDONE)[0]
        left = f"{first.rstrip(' .')}. {NOT_UNDONE}: {self._reason}".removeprefix(". ")
        gone = [member.producer.name for member in self._require_attempt().barrier.members if member.gone]
        died = f" Went away, and could not be told: {join_names(gone)}. Look at them." if gone else ""
        if (ended := cause or because) and not failures:
            ended.remedy = f"{ROLLED_BACK}{died} {ended.remedy}".strip()
            self._record = replace(self._record, last_error=str(ended))
        elif gone and not failures:
            self._record = replace(self._record, last_error=died.strip())
        not_undone = tuple(item for failure in failures for item in failure.items)
        self._record = replace(
            self._record,
            not_undone=not_undone,
            last_error=left if failures else self._record.last_error,
            quiesced=tuple(item.producer for item in not_undone if item.step == Step.quiesce.value),
            producers=self.current_record().producers if failures else (),
        )
        self._jump_asked = False
        await self.try_write_record(RECORD_UNDO_SECONDS, departure_served=True)
        self.emit_event(f"{'Not everything was rolled back.' if failures else 'Rolled back.'}{died}")
        raised, self.rollbacks, self.rollback_error = cause, self.rollbacks + 1, None
        if failures:
            remedies = dict.fromkeys(item.remedy for item in self._record.not_undone if item.remedy)
            raised = NotRolledBack(
                f"{f'{cause.what}. ' if cause else ''}{NOT_UNDONE}: {self._reason}",
                where=", ".join(step.value for step in self._machine.done),
                remedy=f"{' '.join(remedies) or 'Look at the kernel log.'} Then: khoctl abort",
            )
            self.rollback_error = raised
        if cause is not None and raised is not None:
            self._acted_on = (cause, raised)
        self.cancellation.settle()
        if raised is not None:
            raise raised

    # After the jump

    async def enter_verifying(self, observed: Observed, note: str = "", doubt: str = "") -> None:
        """Record that this boot is the one after the jump; if khod dies while verifying, the jump is not counted again.

        What the producers left waits for them from here on, whatever happens to the record. `note` is what an operator
        should know even if all state arrived. `doubt` is the reason why not all of it can have arrived, for every khod
        that verifies.
        """
        self._note = note
        record = self._record
        if record.boot_id != observed.boot_id:
            record = replace(
                record,
                boot_id=observed.boot_id,
                previous_release=record.release,
                release=observed.release,
                suspect="",
                failed_activations=0,
                handovers=record.handovers + 1,
                blackout_seconds=None,
                doubt=doubt,
                verdict=None,
                outcome=Phase.idle,
                arrived_run=record.run,
                arrived_terms=record.terms,
                claims=tuple(replace(holder, told="") for holder in record.producers if holder.restores is not False),
            )
        elif not record.claims and record.producers:  # of an earlier khod, which kept them in `producers`
            record = replace(record, arrived_run=record.run, claims=record.producers)
        self._record = replace(record, producers=(), done=(), not_undone=(), interrupted="")
        self._machine = Machine(Phase.verifying)
        await self.try_write_record(departure_served=True)
        self.emit_event("this kernel was reached by a handover; what arrived is being checked")

    async def _note_shutdown(self, run: str, under_way: Phase) -> None:
        """Record that the host is shut down during this rollback, if systemd says so."""
        try:
            down = self._goes_down is not None and await self._goes_down()
        except Exception:  # without an answer it is not known whether there is a shutdown
            LOG.exception("systemd could not be asked whether the host is shut down")
            return
        if down and self._record.run == run and self.phase in RESTING | {Phase.rolling_back, Phase.failed}:
            await self.note_interrupted(under_way)

    async def settle_shutdown_note(self) -> None:
        """Wait until systemd has answered the last rollback's question, and the answer is in the record."""
        if self._shutdown_note is not None:
            await asyncio.wait({self._shutdown_note})

    async def note_interrupted(self, under_way: Phase) -> None:
        """Record the phase in which the host was shut down, if the rollback is over already."""
        self._set_interrupted(under_way)
        await self.try_write_record(RECORD_UNDO_SECONDS)

    async def note_cut_short(self) -> None:
        """Record that the host is shut down during the verification: the kernel that it verifies has not died."""
        self._record = replace(self._record, interrupted="the host was shut down while the handover was verified")
        await self.try_write_record(RECORD_UNDO_SECONDS)

    def _set_interrupted(self, under_way: Phase) -> None:
        if under_way is Phase.rolling_back:  # the shutdown itself may have caused it
            under_way = self._rolled_back_from
        what = "being rolled back" if under_way is Phase.rolling_back else f"at {under_way.value}, and was rolled back"
        self._record = replace(self._record, interrupted=f"a handover was {what}")

    def note_timing(self, step: str, began: float) -> None:
        """Add to the next record how long a step took, from `began` (CLOCK_MONOTONIC) to now."""
        timing = StepTiming(step, began, time.monotonic() - began)
        self._record = replace(self._record, timings=(*self._record.timings, timing))

    def note_sessions(self, sighted: SightedSessions, *, at_once: bool) -> None:
        """Add to the next record whose LUO sessions leave with the jump, and whether the jump is immediate."""
        self._record = replace(self._record, sessions=sighted.sessions, sessions_unseen=sighted.unseen, at_once=at_once)

    def note_terms(self, terms: Terms) -> None:
        """Add to the next record the terms of a call, which replace those of an earlier one if it has any."""
        if terms == NO_TERMS:
            return
        begun = replace(self._record.begun, profile=terms.profile or "")
        self._record = replace(self._record, terms=terms, begun=begun)
        if terms.window_ignored:
            self.emit_event(f"the window ({terms.window}) is ignored, as asked")

    def note_watchdog(self, device: str) -> None:
        """Add to the next record the watchdog that is armed for the jump."""
        self._record = replace(self._record, watchdog=device)

    async def clear_watchdog(self) -> None:
        """Record that no watchdog is armed for a jump any more."""
        self.note_watchdog("")
        await self.try_write_record(RECORD_UNDO_SECONDS)

    async def note_claims(self, claims: tuple[ProducerRecord, ...], verdict: Verdict | None = None) -> None:
        """Record the producers that have not taken back what they left, and what was found until now."""
        self._record = replace(self._record, claims=claims, verdict=verdict or self._record.verdict)
        await self.try_write_record()

    def note_blackout(self, uptime: float | None) -> None:
        """Set the blackout up to now, unless another handover has begun since: the record has the begin of that one."""
        record = self._record
        if record.run == record.arrived_run:
            blackout = verify.blackout_seconds(record.window_began_at, time.time(), uptime)
            self._record = replace(record, blackout_seconds=blackout, blackout_error_seconds=verify.WALL_CLOCK_SECONDS)

    async def note_timeline(self, run: str, timeline: Timeline) -> None:
        """Record the blackout as the timeline of the handover into this boot has it, with its error."""
        seconds = timeline.blackout_seconds
        if seconds is None or run != self._record.arrived_run:
            return
        self._record = replace(self._record, blackout_seconds=seconds, blackout_error_seconds=timeline.error_seconds)
        if self.phase in RESTING:  # else the next step's record has it
            await self.try_write_record()

    async def note_cold_boot(self, found: ColdBoot) -> None:
        """Record what is known of the cold boot that this boot is, and tell it."""
        known, error = self._record.cold_boot, self._record.last_error
        if known is not None and error == known.reason:  # else it is of a later handover
            error = found.reason
        self._record = replace(self._record, cold_boot=found, last_error=error)
        if self.phase in RESTING:  # else the next step's record has it
            await self.try_write_record()
        self.emit_event(f"the cold boot: {found.reason}")

    async def conclude_verification(self, verdict: Verdict, message: str) -> None:
        """Record the outcome of the handover into this boot: verified, or degraded with the reason.

        It may be corrected when a producer comes late, also during another handover.
        """
        outcome = Phase.degraded if verdict.reason else Phase.verified
        at_rest = self.phase in RESTING or self.phase is Phase.verifying
        if at_rest and self.phase is not outcome:
            self._machine = self._machine.enter_phase(outcome)
        self._record = replace(self._record, verdict=verdict, outcome=outcome)
        if at_rest:
            self._reason = verdict.reason
            self._record = replace(self._record, last_error=verdict.reason or self._note)
        await self.try_write_record()
        self.emit_event(message)

    # The record and its listeners

    def current_record(self) -> Record:
        """Return the record as it would be written now."""
        attempt, done = self._attempt, self._machine.done
        known = attempt is not None and done and not attempt.barrier.broken
        producers = attempt.barrier.to_records() if attempt is not None and known else self._record.producers
        return replace(self._record, phase=self.phase, done=done, producers=producers)

    async def write_record(self) -> None:
        """Write the record durably; RecordError if that fails."""
        await self._write_record(self.current_record())

    async def try_write_record(self, seconds: float = RECORD_SECONDS, *, departure_served: bool = False) -> None:
        """Write the record if possible, as RecordWriter.try_write."""
        self._record = self.current_record()
        await self._writer.try_write(seconds, departure_served=departure_served)

    async def settle_record(self) -> None:
        """Write the record a last time if the one on the disk is outdated: khod ends."""
        await self._writer.settle()

    async def _write_record(self, record: Record, *, departs: bool = False) -> None:
        """Write the record on the way forward; interruptible, because a hanging file system must not delay an undo."""
        self._record = record
        if departs:
            self._before_departure()
        await self.cancellation.wait_interruptibly(self._writer.write(record, departs=departs))

    def emit_event(
        self,
        message: str,
        kind: EventKind | None = None,
        *,
        step: Step | None = None,
        duration: float | None = None,
        producer: Producer | None = None,
        words: list[Word] | None = None,
    ) -> None:
        """Emit an Event with the current phase to every listener; the error of a listener is only logged.

        Without a kind it is a change of the phase if the event before had another phase, else a note.
        """
        kind = kind or (EventKind.note if self.phase is self._emitted else EventKind.phase)
        self._emitted, run = self.phase, self._record.run
        name = step.value if step else ""
        try:
            self._tell(
                Event(time.monotonic(), self.phase, message, run, producer, words, kind, name, duration, time.time())
            )
        except (Exception, asyncio.CancelledError):  # a listener must not decide how the handover goes
            LOG.exception("An event could not be passed on: %s", message)

    def on_member_changed(self, member: Member) -> None:
        """Emit what a producer was told, or has answered."""
        if not member.is_waiting:
            kind, duration = EventKind.producer_answered, member.seconds
        else:
            kind, duration = EventKind.producer_waits if member.answer else EventKind.producer_called, None
        message = f"{member.producer.name}: {write_verb(member.about)}: {member.answer or 'told'}"
        self.emit_event(message, kind, duration=duration, producer=member.to_model())

    def _require_attempt(self) -> Attempt:
        assert self._attempt is not None, "an attempt is attached before it is moved"
        return self._attempt
