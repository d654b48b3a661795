# SPDX-License-Identifier: LGPL-2.1-or-later
"""The barrier: every producer answers before any goes on, and each one that was told a verb is told its undo.

`after` and `before` of the producers determine their ranks. Within one rank they run side by side; the undo goes
through the ranks in reverse. A producer that vetoes, dies or misses its deadline ends the attempt at once. It may have
done half of the step, so it is told the undo too.
"""

import asyncio
import enum
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field, replace
from typing import Protocol

from khod import model
from khod.concurrency.bounded import CUT_SECONDS, Since, StillRuns, run_within, wait_within
from khod.dataclass import dataclass
from khod.errors import (
    ConfigError,
    Failed,
    KhoError,
    ProducerGone,
    ProducerRefused,
    ProducerTimedOut,
    Refused,
    Unsupported,
)
from khod.handover.record import ProducerRecord
from khod.producers.order import LEADERS, Ordered, order_in_ranks


class Verb(enum.Enum):
    """What a producer is told. prepare: its work goes on. freeze: its blackout begins.

    Then follow either thaw and cancel or, in the next kernel, restore and finish.
    """

    prepare = "prepare"
    freeze = "freeze"
    thaw = "thaw"
    cancel = "cancel"
    restore = "restore"
    finish = "finish"


VERBS = {verb.value: verb for verb in Verb}


def read_verb(word: str) -> Verb | None:
    """Return the verb for a word of the record, None for "".

    An unknown word is read as freeze, whose undo is harmless for a producer that has done less.
    """
    return VERBS.get(word, Verb.freeze) if word else None


def write_verb(verb: Verb | None) -> str:
    """Return the word for a verb in the record and in the interface, "" for None."""
    return verb.value if verb else ""


NO_ANSWER = "no answer"
READY = "ready"
GONE = "gone, and not told"
"""The answer to an undo if nothing is left that could be told."""
NOT_RECORDED = "not recorded"
"""The note of an undo if the record of what was done is lost: the producer must find out for itself."""
LEAVING = 5.0
"""Seconds a producer has to make way; the shutdown continues meanwhile."""

UNDO = {Verb.prepare: Verb.cancel, Verb.freeze: Verb.thaw}
UNDONE_BY = {undo: verb for verb, undo in UNDO.items()}
"""The verb that each undo takes back."""
AFTER = {Verb.thaw: Verb.prepare, Verb.cancel: Verb.cancel, Verb.finish: Verb.finish}
"""What counts as told once these verbs were answered with a yes, and not before: a thawed producer must still be told
`cancel`, and one that could not be thawed is told `thaw` again."""


class ParticipantVeto(Exception):
    """A producer refuses, or its answer cannot be understood as a yes; the message is the reason."""


@dataclass
class ProducerCall:
    """One verb for a producer, and what the producer may report before it is done."""

    verb: Verb
    run: str
    note: str = ""
    """What the producer must still know after a restart of khod. What `prepare` leaves here is recorded before any
    producer is told `freeze`; every later verb gets it."""
    not_yet: Callable[[str, float | None], None] = lambda _reason, _progress: None
    """Reports that the verb takes longer: a reason, and how much is done (0 to 1, None if that is not known)."""
    stopped_seconds: float | None = None
    """What the producer says with its answer, as in `khod.model.Producer`."""


class Participant(Ordered, Protocol):
    """One holder of state."""

    @property
    def kind(self) -> str:
        """The kind of producer: hook, unit, qemu, vm, varlink."""

    @property
    def timeout(self) -> float:
        """Seconds that it may take for one verb."""

    @property
    def devices(self) -> tuple[str, ...]:
        """Devices that it needs, as paths below /sys or /dev: if one disappears, the attempt ends."""

    @property
    def units(self) -> tuple[str, ...]:
        """Units of systemd that it needs until the jump, or patterns of their names: quiesce does not stop them."""

    @property
    def restores_state(self) -> bool:
        """Whether it has anything to do in the next kernel: its state then counts among what arrived."""

    @property
    def is_reachable(self) -> bool:
        """Whether it can be told something now; one that must first return does not delay the undo of the others."""

    async def make_way(self, note: str) -> None:
        """Make way: the host goes into the next kernel, nothing is undone any more. `note` is as in ProducerCall."""

    async def wait_returned(self) -> None:
        """After a restart of khod, return when it can be told something; ParticipantVeto if it never can."""

    def to_record(self) -> ProducerRecord:
        """Return its record, without what it was told."""

    async def carry_out(self, telling: ProducerCall) -> str | None:
        """Carry a verb out and return when it is done; ParticipantVeto with the reason if it is not.

        Returns GONE if an undo has found nobody to tell, else None or the answer to show.

        The call may be cancelled at any time, by a deadline or an abort. The undo follows, and nothing may be under way
        then that could still freeze something.
        """


@dataclass(frozen=True)
class PriorCall:
    """What an earlier khod told a producer in this attempt, and the producer's note."""

    verb: Verb | None
    note: str = ""


@dataclass(eq=False)
class Member:
    """A producer in this attempt: the last verb it was told, its answer, and how long that took, in seconds."""

    producer: Participant
    rank: int = 0
    told: Verb | None = None
    """The verb whose undo is due. It changes when a verb is told; for an undo, when the answer to it has come."""
    about: Verb | None = None
    """The verb that `answer` belongs to: after a failed thaw, `told` is still freeze."""
    answer: str = ""
    seconds: float = 0.0
    limit: float = 0.0
    """The time limit of that verb, in seconds."""
    progress: float | None = None
    stopped_seconds: float | None = None
    began: float | None = None
    """When the verb that it is told now began (CLOCK_MONOTONIC), None while it is told nothing."""
    telling: ProducerCall | None = None
    """The last call of `prepare` or `freeze`, from which its note is read: the call may still be under way."""
    gone: bool = False
    """Whether an undo has found nobody to tell."""
    calls: int = 0
    """How often it was told anything: the result of an earlier call, which nobody waits for any more, changes nothing
    here."""

    @property
    def is_leader(self) -> bool:
        """Whether it is one of `Barrier.leaders`."""
        return self.producer.name in LEADERS

    def owes_undo(self, verb: Verb, *, leaders: bool) -> bool:
        """Whether it must undo `verb`: with `leaders` each leader that was told `prepare`, otherwise no leader."""
        return self.is_leader is leaders and (self.told in UNDO if leaders else self.told is verb)

    @property
    def is_waiting(self) -> bool:
        """Whether its answer is awaited."""
        return self.began is not None

    @property
    def note(self) -> str:
        """What the producer must still know after a restart of khod."""
        return self.telling.note if self.telling else ""

    def to_record(self) -> ProducerRecord:
        """Return its record, with what it was told."""
        about, restores = self.producer.to_record(), self.producer.restores_state
        return replace(about, told=write_verb(self.told), note=self.note, restores=restores, rank=self.rank)

    def to_model(self) -> model.Producer:
        """Return it as status shows it."""
        return model.Producer(
            self.producer.name,
            self.producer.kind,
            self.rank,
            write_verb(self.about or self.told),
            self.answer,
            self.seconds if self.began is None else time.monotonic() - self.began,
            self.is_waiting,
            self.progress,
            self.limit,
            self.stopped_seconds,
        )


@dataclass
class Barrier:
    """All producers of one attempt. `changed` is called with the member at every change."""

    run: str
    changed: Callable[[Member], None]
    broken: KhoError | None = None
    """Why the producers are not known: then nobody can be told an undo, and `undo_verb` returns this error."""
    _ranks: list[list[Member]] = field(default_factory=list)

    @classmethod
    def from_producers(
        cls,
        producers: Iterable[Participant],
        run: str,
        changed: Callable[[Member], None],
        told: Mapping[str, PriorCall] | None = None,
        *,
        any_order: bool = False,
    ) -> "Barrier":
        """Make a barrier of producers; `told` is what a khod that died had told them, so that they are told the undo.

        ConfigError names a cycle in their order; with `any_order` they are in one rank then.
        """
        here, producers = cls(run, changed), list(producers)
        try:
            here.add_producers(producers)
        except ConfigError:
            if not any_order:
                raise
            here._ranks = [[Member(producer) for producer in producers]]
        for member in here.members:
            if told and (before := told.get(member.producer.name)):
                member.told = before.verb
                member.telling = ProducerCall(Verb.prepare, run, before.note)
        return here

    @property
    def members(self) -> list[Member]:
        """All producers, in rank order."""
        return [member for rank in self._ranks for member in rank]

    @property
    def leaders(self) -> list[Member]:
        """The producers that are told `prepare` before all others, and nothing else but its undo."""
        return [member for member in self.members if member.is_leader]

    def to_records(self) -> tuple[ProducerRecord, ...]:
        """Return the records of all producers, with what they were told."""
        return tuple(member.to_record() for member in self.members)

    def add_producers(self, producers: Iterable[Participant]) -> list[Member]:
        """Add producers that have come since, in their ranks, and return the new members. ConfigError names a cycle."""
        known, producers = {member.producer.name: member for member in self.members}, list(producers)
        if all(producer.name in known for producer in producers):
            return []
        everyone = {**{name: member.producer for name, member in known.items()}, **{p.name: p for p in producers}}
        self._ranks = [
            [known.get(producer.name) or Member(producer) for producer in rank]
            for rank in order_in_ranks(everyone.values())
        ]
        for number, rank in enumerate(self._ranks):
            for member in rank:
                member.rank = number
        return [member for member in self.members if member.producer.name not in known]

    async def broadcast(self, verb: Verb, among: Sequence[Member] | None = None, *, seconds: float = math.inf) -> None:
        """Tell all producers, or those in `among`, rank by rank, and wait for their answers.

        The caller ends it after `seconds`, which is shown as a producer's limit where it comes before its timeout.
        The first refusal ends this: calls of the same rank that are under way are cut short, and later ranks are not
        told. Raises Refused with the veto; Unsupported if the kernel cannot keep what a producer hands over.
        """
        wanted, began = None if among is None else frozenset(among), time.monotonic()
        for rank in self._ranks:
            chosen = [member for member in rank if wanted is None or member in wanted]
            left = began + seconds - time.monotonic()
            tasks = [
                asyncio.ensure_future(self._call_one(member, verb, member.producer.timeout, left)) for member in chosen
            ]
            try:
                for first in asyncio.as_completed(tasks):
                    if (refusal := await first) is not None:
                        raise refusal
            finally:
                for task in tasks:
                    task.cancel()
                if tasks:
                    await asyncio.wait(tasks, timeout=CUT_SECONDS)

    async def gather_in(self) -> None:
        """After a restart of khod, wait for every producer that was told something; Refused if one does not return."""
        told = [member for member in self.members if member.told]
        for refusal in await asyncio.gather(*map(self._wait_returned, told)):
            if refusal is not None:
                raise refusal

    async def _wait_returned(self, member: Member) -> Refused | None:
        timeout, member.began = member.producer.timeout, time.monotonic()
        try:
            async with asyncio.timeout(timeout):
                await member.producer.wait_returned()
            return None
        except TimeoutError:
            member.answer = f"has not come back within {timeout:g} s since khod was restarted"
            return _producer_error(ProducerGone, member, None, member.answer)
        except ParticipantVeto as error:
            member.answer = str(error)
            how = f"is not there any more since khod was restarted: {error}"
            return _producer_error(ProducerGone, member, None, how)
        finally:
            member.began = None

    async def make_way(self) -> None:
        """Have every frozen producer make way for the shutdown, which cannot be stopped: a failure is only noted."""
        frozen = [member for member in self.members if member.told is Verb.freeze]
        leaving = [asyncio.ensure_future(self._make_way(member)) for member in frozen]
        if leaving:
            await asyncio.wait(leaving, timeout=LEAVING + CUT_SECONDS)

    async def _make_way(self, member: Member) -> None:
        try:
            await run_within(LEAVING, member.producer.make_way(member.note))
        except Exception as error:  # noqa: BLE001 - the host goes down in any case
            member.answer = str(error)
            self.changed(member)

    async def undo_verb(self, verb: Verb, *, leaders: bool = False) -> list[tuple[str, KhoError]]:
        """Tell every producer that was told `verb` its undo, in reverse order; return the names and errors of failures.

        All of them are told, and each rank is waited for as long as its slowest member may take. A producer that must
        first return (khod was restarted) does not delay its rank: it is waited for at the end. Leaders are left out;
        with `leaders` only they are told.
        """
        if self.broken is not None:
            return [("", self.broken)]
        failed: list[tuple[str, KhoError]] = []
        absent: list[tuple[Member, asyncio.Future[KhoError | None]]] = []
        for rank in reversed(self._ranks):
            told = [(m, self._start_call(m, UNDO[verb])) for m in rank if m.owes_undo(verb, leaders=leaders)]
            absent += [(member, task) for member, task in told if not member.producer.is_reachable]
            failed += await self._gather_failures([pair for pair in told if pair[0].producer.is_reachable], UNDO[verb])
        return [*failed, *await self._gather_failures(absent, UNDO[verb])]

    async def bring_back(
        self, verb: Verb, among: Sequence[Member], deadline: float, since: Since = None
    ) -> list[Member]:
        """Tell `restore` or `finish` in rank order, also after a failure; return the members that failed.

        Each has `deadline` seconds, or its own timeout if that is longer, which count from when `since` is done.
        """
        failed: list[str] = []
        for rank in self._ranks:
            calls = [(member, self._start_call(member, verb, deadline, since)) for member in rank if member in among]
            failed += [name for name, _ in await self._gather_failures(calls, verb, deadline, since)]
        return [member for member in among if member.producer.name in failed]

    def _start_call(
        self, member: Member, verb: Verb, deadline: float = 0.0, since: Since = None
    ) -> "asyncio.Future[KhoError | None]":
        return asyncio.ensure_future(self._call_one(member, verb, max(deadline, member.producer.timeout), since=since))

    async def _gather_failures(
        self,
        calls: "Sequence[tuple[Member, asyncio.Future[KhoError | None]]]",
        verb: Verb,
        deadline: float = 0.0,
        since: Since = None,
    ) -> list[tuple[str, KhoError]]:
        """Wait for calls side by side, each with its own deadline; return the names and errors of those that failed.

        A call that is still under way then has failed.
        """
        if not calls:
            return []
        longest = max(max(deadline, member.producer.timeout) for member, _ in calls)
        try:
            await wait_within(longest + CUT_SECONDS, [task for _, task in calls], since)
        finally:
            for _, task in calls:
                task.cancel()
        failed = []
        for member, task in calls:
            if not task.done() or task.cancelled():
                member.calls += 1  # a later result is ignored
                longest = max(deadline, member.producer.timeout)
                member.answer, member.began = f"no answer within {longest:g} s, and it cannot be cut short", None
                how = f"did not answer {verb.value} within {longest:g} s"
                refusal: KhoError | None = _producer_error(ProducerTimedOut, member, verb, how)
                self.changed(member)
            else:
                refusal = task.result()
            if refusal is not None:
                failed.append((member.producer.name, refusal))
        return failed

    async def _call_one(
        self, member: Member, verb: Verb, deadline: float, left: float = math.inf, since: Since = None
    ) -> KhoError | None:
        """Tell one producer a verb; return the error that its refusal means, None for a yes."""
        producer, began = member.producer, time.monotonic()
        member.about, member.answer, member.began, member.progress = verb, "", began, None
        member.limit = min(deadline, round(left, 1))
        member.calls += 1
        call = member.calls
        if verb not in AFTER:
            member.told = verb
        self.changed(member)

        def not_yet(reason: str, progress: float | None) -> None:
            if member.calls == call and member.is_waiting:
                member.answer, member.progress = f"not yet: {reason}" if reason else "not yet", progress
                self.changed(member)

        telling = ProducerCall(verb, self.run, member.note, not_yet)
        if verb in UNDO:
            member.telling = telling
        answer, done = NO_ANSWER, False
        refusal: KhoError | None = None
        try:
            try:
                said = await run_within(deadline, producer.carry_out(telling), since)
                answer, done = said or READY, True
            except TimeoutError as error:
                waited = f" ({member.answer})" if member.answer else ""
                waited += ", and it cannot be cut short" if isinstance(error, StillRuns) else ""
                answer = f"no answer within {deadline:g} s{waited}"
                how = f"did not answer {verb.value} within {deadline:g} s{waited}"
                refusal = _producer_error(ProducerTimedOut, member, verb, how)
            except Unsupported as error:
                answer = error.what
                what = f"Producer {producer.name} cannot {verb.value}: {error.what}"
                refusal = Unsupported(what, where=error.where, remedy=error.remedy)
            except (ParticipantVeto, OSError, KhoError) as error:
                answer = str(error)
            except Exception as error:  # noqa: BLE001 - any error of one producer: the others continue
                answer = f"khod itself failed: {error!r}"
        finally:
            if member.calls == call:
                member.answer, member.began, member.seconds = answer, None, time.monotonic() - began
                member.stopped_seconds = telling.stopped_seconds
                if done:
                    member.told = AFTER.get(verb, verb)
                    member.gone |= answer == GONE
                self.changed(member)
        if done:
            return None
        return refusal or _producer_error(ProducerRefused, member, verb, f"refuses to {verb.value}: {answer}")


def _producer_error(cls: type[ProducerRefused], member: Member, verb: Verb | None, how: str) -> ProducerRefused:
    name = member.producer.name
    return cls(
        f"Producer {name} {how}",
        kind=member.producer.kind,
        producer=name,
        verb=write_verb(verb or member.told),
        remedy=f"Once that is repaired, test it with: khoctl producers test {name}",
    )


def step_timeout_error(members: Sequence[Member], verb: Verb, deadline: float) -> Failed:
    """Return the error for a step whose producers did not all answer in time; it names those that did not."""
    waiting = ", ".join(member.producer.name for member in members if member.answer == NO_ANSWER)
    return Failed(
        f"Not every producer could {verb.value} within {deadline:g} s",
        where=waiting,
        remedy=f"Raise deadlines.{verb.value}, or look at these producers.",
    )
