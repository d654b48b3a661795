"""One handover under way: the machine, its record and its actions, moved together.

Every step is recorded before it is taken; a failed step leads to the undo of all that was done.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NoReturn

from khod.engine.steps import Actions
from khod.errors import Failed, KhoError, NotRolledBack, RecordError
from khod.kernel.explain import FORGOT
from khod.machine import HELD, Machine
from khod.model import Event, Phase, Producer, Step, StepTiming, Word
from khod.producers.barrier import Member
from khod.record import Record, Store

INTERRUPTIBLE = frozenset({Step.prepare, Step.freeze})
"""Steps an abort may cut short: they wait for producers. A kernel call is waited for."""

TOGETHER = (Step.activate, Step.load)
"""One durable record names both where they follow each other: an fsync between them would lengthen the blackout."""


def together(steps: Sequence[Step]) -> Sequence[Step]:
    """The first step, and the next where both are recorded by one write."""
    return steps[:2] if tuple(steps[:2]) == TOGETHER else steps[:1]


def _cause(error: Exception) -> KhoError:
    """The error an operator is told."""
    if isinstance(error, KhoError):
        return error
    if isinstance(error, OSError):
        return Failed(str(error))
    return Failed(f"khod itself failed: {error!r}", remedy="This is a bug; the journal has more.")


class Handover:
    """Where this host's handover stands. `tell` is called with every change, from the event loop."""

    def __init__(self, store: Store, tell: Callable[[Event], None], look: Callable[[], None] = lambda: None) -> None:
        """Begin at rest; `look` is called before each step, and calls off what must not go on."""
        self.machine = Machine()
        self.record = Record()
        self.reason = ""
        self.actions: Actions | None = None
        self._off: KhoError | None = None
        self._called_off = asyncio.Event()
        self._store = store
        self._tell = tell
        self._look = look

    async def forward(self, steps: Sequence[Step], actions: Actions, *, hold: bool) -> None:
        """Take the steps in order; on failure everything is put back and the cause raised."""
        recorded: Sequence[Step] = ()
        for number, step in enumerate(steps):
            before = self.machine
            try:
                self._still_on()
                ahead = None if step in recorded else together(steps[number:])[1:]
                recorded = recorded if ahead is None else (step, *ahead)
                await self._step(step, actions, ahead)
            except Exception as error:  # whatever went wrong, a bug of ours too: the kernel must be put back
                cause = _cause(error)
                if not self.machine.done:
                    raise cause from error
                if step is Step.activate and isinstance(error.__cause__, OSError):  # the kernel's own no
                    self.record = replace(self.record, failed_activations=self.record.failed_activations + 1)
                if hold and before.phase in HELD:
                    await self._hold(step, before, actions, cause)
                await self.roll_back(cause, actions)
        await self.keep()

    async def _step(self, step: Step, actions: Actions, ahead: Sequence[Step] | None) -> None:
        """Take one step, recorded with those `ahead`; None where a durable record names it already."""
        self.machine = self.machine.begin(step)
        done = (*self.machine.done, *(ahead or ()))
        await self._write(replace(self.current(), done=done), durable=ahead is not None)
        self.say(step.value)
        began = time.monotonic()
        if step is Step.activate:
            self.record = replace(self.record, window_began_at=time.time())
        await self._interruptibly(step, actions)
        timing = StepTiming(step.value, began, time.monotonic() - began)
        self.record = replace(self.record, timings=(*self.record.timings, timing))
        self.machine = self.machine.finish(step)
        self.say(f"{step.value} took {timing.seconds:.3f} s")

    async def _interruptibly(self, step: Step, actions: Actions) -> None:
        if step not in INTERRUPTIBLE:
            await actions.do(step)
            return
        work = asyncio.ensure_future(actions.do(step))
        abort = asyncio.ensure_future(self._called_off.wait())
        try:
            await asyncio.wait({work, abort}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
                await asyncio.wait({work})
                self._still_on()
            await work
        finally:
            abort.cancel()

    def call_off(self, cause: KhoError) -> None:
        """End what is under way, at the next step at the latest; the first cause counts."""
        if not self._called_off.is_set():
            self._off = cause
            self._called_off.set()

    def go_on(self) -> None:
        """Forget that something before this was called off."""
        self._off = None
        self._called_off.clear()

    def _still_on(self) -> None:
        self._look()
        if self._off is not None:
            raise self._off

    async def _hold(self, step: Step, before: Machine, actions: Actions, cause: KhoError) -> NoReturn:
        """Put only the failed step back and stay where it began, as --hold asks."""
        try:
            await actions.undo(step)
        except KhoError as error:
            self.say(f"{step.value} could not be put back: {error.what}")
            await self.roll_back(cause, actions)
        self.machine, self.reason = before, cause.what
        self.record = replace(self.record, last_error=str(cause))
        await self.keep()
        self.say(f"held at {before.phase.value}: {cause.what}")
        raise NotRolledBack(
            f"{cause.what}; held at {before.phase.value} as asked",
            where=cause.where,
            remedy=f"{cause.remedy} To go back: khoctl abort".strip(),
        )

    async def roll_back(self, cause: KhoError | None, actions: Actions, *, said: str = "called off") -> None:
        """Undo every step done, the last first; a step that cannot be undone does not stop the others.

        Raises `cause`, or NotRolledBack where something is left; returns where there is no cause: the
        operator asked for it.
        """
        if self.machine.phase is not Phase.rolling_back:  # khod may have died while it rolled back
            self.machine = self.machine.to(Phase.rolling_back)
        if cause is not None:
            self.record = replace(self.record, last_error=str(cause))
        await self.keep_if_possible()
        self.say(cause.what if cause else said)
        failures: list[KhoError] = []
        for step in reversed(self.machine.done):
            if step is Step.activate and actions.kernel and (forgot := FORGOT.get(actions.kernel.abort)):
                self.record = replace(self.record, suspect=forgot)
            try:
                await actions.undo(step)
            except KhoError as error:
                failures.append(error)
                self.say(f"{step.value} could not be put back: {error.what}")
            else:
                # Whoever could not be thawed was not told `cancel` either: that stays due with it.
                if step is not Step.prepare or Step.freeze not in self.machine.done:
                    self.machine = self.machine.undone(step)
        self.machine = self.machine.to(Phase.failed if failures else Phase.idle)
        self.reason = "; ".join(f"{error.what} ({error.where})" if error.where else error.what for error in failures)
        if failures:
            self.record = replace(self.record, last_error=self.reason)
        else:
            self.record = replace(self.record, producers=())
        await self.keep_if_possible()
        self.say("not everything is back" if failures else "everything is back as it was")
        if failures:
            remedies = dict.fromkeys(error.remedy for error in failures if error.remedy)
            raise NotRolledBack(
                f"{f'{cause.what}. ' if cause else ''}Not everything could be put back: {self.reason}",
                where=", ".join(step.value for step in self.machine.done),
                remedy=f"{' '.join(remedies) or 'Look at the kernel log.'} Then: khoctl abort",
            )
        if cause is not None:
            raise cause

    def current(self) -> Record:
        """The record as it would be written now."""
        known = self.actions is not None and self.machine.done and not self.actions.barrier.broken
        producers = self.actions.barrier.holders() if self.actions and known else self.record.producers
        return replace(self.record, phase=self.machine.phase, done=self.machine.done, producers=producers)

    async def keep(self) -> None:
        """Write the record, durably; RecordError."""
        await self._write(self.current(), durable=True)

    async def _write(self, record: Record, *, durable: bool) -> None:
        self.record = record
        await asyncio.to_thread(self._store.write, record, durable=durable)

    async def keep_if_possible(self) -> None:
        """Write the record on the way back: a full disk must not keep the kernel from being put back."""
        try:
            await self.keep()
        except RecordError as error:
            self.say(str(error))

    def say(self, message: str, producer: Producer | None = None, words: list[Word] | None = None) -> None:
        """Tell everyone how it stands."""
        self._tell(Event(time.monotonic(), self.machine.phase, message, self.record.run, producer, words))

    def heard(self, member: Member) -> None:
        """Tell everyone what a producer was told or said."""
        self.say(f"{member.producer.name}: {member.about}: {member.answer or 'told'}", member.shown())
