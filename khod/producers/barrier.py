"""The barrier: every producer answers before anyone goes on, and whoever was told is told when it is off.

Producers have ranks from `after` and `before`. Within one rank they run side by side; the undo goes
through the ranks in reverse. A producer that vetoes, dies or misses its deadline ends the attempt at
once; it may have had half of the step done, so it too is told the undo.
"""

import asyncio
import enum
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from typing import Protocol

from khod import model
from khod.errors import ConfigError, Failed, KhoError, NotRolledBack, Refused, Unsupported
from khod.record import Holder


class Verb(enum.Enum):
    """What a producer is told. prepare: work goes on. freeze: its blackout starts.

    Then either thaw and cancel, or, in the next kernel, restore and finish.
    """

    prepare = "prepare"
    freeze = "freeze"
    thaw = "thaw"
    cancel = "cancel"
    restore = "restore"
    finish = "finish"


NO_ANSWER = "no answer"
LEAVING = 5.0
"""Seconds a producer has to make way; the shutdown goes on meanwhile."""

UNDO = {Verb.prepare: Verb.cancel, Verb.freeze: Verb.thaw}


class Veto(Exception):
    """A producer says no, or cannot be understood as saying yes; the message is its reason."""


@dataclass
class Telling:
    """One verb on its way to a producer, and what the producer may say before it is done."""

    verb: Verb
    run: str
    note: str = ""
    """What the producer must still know after a restart of khod. What `prepare` leaves here is recorded
    before anyone is told `freeze`; every later verb finds it."""
    not_yet: Callable[[str, float | None], None] = lambda _reason, _progress: None
    """Say that it takes longer: a reason, and how much is done (0 to 1, None where that is not known)."""


class Producer(Protocol):
    """One holder of state."""

    @property
    def name(self) -> str:
        """Unique among the producers."""

    @property
    def kind(self) -> str:
        """What sort of producer: hook, unit, qemu, varlink."""

    @property
    def timeout(self) -> float:
        """Seconds it may take for one verb."""

    @property
    def after(self) -> tuple[str, ...]:
        """Names of producers told before it."""

    @property
    def before(self) -> tuple[str, ...]:
        """Names of producers told after it."""

    @property
    def devices(self) -> tuple[str, ...]:
        """Devices it cannot do without, as paths below /sys or /dev: one that goes away ends the attempt."""

    @property
    def restores(self) -> bool:
        """Whether it has anything to do in the next kernel: then its state counts among what arrived."""

    async def leave(self, note: str) -> None:
        """Make way: the host goes down into the next kernel, and nothing is undone any more. `note` as in Telling."""

    async def returned(self) -> None:
        """Return when it can be told more, after a restart of khod; Veto where it cannot any more."""

    def holder(self) -> Holder:
        """What the record says of it, besides what it was told."""

    async def tell(self, telling: Telling) -> None:
        """Carry a verb out; returns when it is done, raises Veto with the reason otherwise.

        It may be cancelled at any time: a deadline, or an abort. The undo follows, and must find it
        with nothing under way that could still freeze something.
        """


@dataclass(frozen=True)
class Told:
    """What a producer was told in an attempt that a khod before this one began, and its note."""

    verb: str
    note: str = ""


def ranks(producers: Iterable[Producer]) -> list[list[Producer]]:
    """Order producers; names that are not here are no constraint. ConfigError names a cycle."""
    known = {producer.name: producer for producer in producers}
    sorter: TopologicalSorter[str] = TopologicalSorter(dict.fromkeys(known, ()))
    for producer in known.values():
        sorter.add(producer.name, *(name for name in producer.after if name in known))
        for name in producer.before:
            if name in known:
                sorter.add(name, producer.name)
    try:
        sorter.prepare()
    except CycleError as error:
        raise ConfigError(
            "The producers' order is a cycle: " + " -> ".join(error.args[1]),
            where="after/before",
            remedy="Remove one of these.",
        ) from None
    result = []
    while sorter.is_active():
        rank = sorter.get_ready()
        result.append([known[name] for name in sorted(rank)])
        sorter.done(*rank)
    return result


@dataclass(eq=False)
class Member:
    """A producer in this attempt: the last verb it was told, its answer, and how long that took (seconds)."""

    producer: Producer
    rank: int = 0
    told: str = ""
    about: str = ""
    """The verb `answer` is the answer to: after a thaw that failed it still counts as told to freeze."""
    answer: str = ""
    seconds: float = 0.0
    note: str = ""
    progress: float | None = None
    began: float | None = None
    """When what it is told now began (CLOCK_MONOTONIC), None while it is told nothing."""

    @property
    def waiting(self) -> bool:
        """Whether its answer is waited for."""
        return self.began is not None

    def shown(self) -> model.Producer:
        """What status says of it."""
        return model.Producer(
            self.producer.name,
            self.producer.kind,
            self.rank,
            self.about or self.told,
            self.answer,
            self.seconds if self.began is None else time.monotonic() - self.began,
            self.waiting,
            self.progress,
        )


@dataclass
class Barrier:
    """All producers of one attempt. `changed` is called with the member whenever something is heard of it."""

    run: str
    changed: Callable[[Member], None]
    broken: ConfigError | None = None
    """Why the producers are not known: then nobody can be told of the undo, and that is said."""
    _ranks: list[list[Member]] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        producers: Iterable[Producer],
        run: str,
        changed: Callable[[Member], None],
        told: Mapping[str, Told] | None = None,
    ) -> "Barrier":
        """Gather producers; `told` is what a khod that died had told them, so that they hear of the undo."""
        here = cls(run, changed)
        here.admit(producers)
        for member in here.members:
            if told and (before := told.get(member.producer.name)):
                member.told, member.note = before.verb, before.note
        return here

    @property
    def members(self) -> list[Member]:
        """Every producer, in rank order."""
        return [member for rank in self._ranks for member in rank]

    def holders(self) -> tuple[Holder, ...]:
        """Every producer as the record has it."""
        return tuple(replace(m.producer.holder(), told=m.told, note=m.note) for m in self.members)

    def admit(self, producers: Iterable[Producer]) -> list[Member]:
        """Take in producers that came since, in their ranks; the new members. ConfigError names a cycle."""
        known, producers = {member.producer.name: member for member in self.members}, list(producers)
        if all(producer.name in known for producer in producers):
            return []
        everyone = {**{name: member.producer for name, member in known.items()}, **{p.name: p for p in producers}}
        self._ranks = [
            [known.get(producer.name) or Member(producer) for producer in rank] for rank in ranks(everyone.values())
        ]
        for number, rank in enumerate(self._ranks):
            for member in rank:
                member.rank = number
        return [member for member in self.members if member.producer.name not in known]

    async def tell(self, verb: Verb, among: Sequence[Member] | None = None) -> None:
        """Tell everyone, or those `among` them, rank by rank.

        The first no of a rank ends it there: whoever is still at it is cut short. Raises Refused with
        the veto; Unsupported where the kernel cannot keep what a producer hands over.
        """
        wanted = None if among is None else frozenset(among)
        for rank in self._ranks:
            chosen = [member for member in rank if wanted is None or member in wanted]
            tasks = [asyncio.ensure_future(self._one(member, verb, member.producer.timeout)) for member in chosen]
            try:
                for first in asyncio.as_completed(tasks):
                    if (refusal := await first) is not None:
                        raise refusal
            finally:
                for task in tasks:
                    task.cancel()
                if tasks:
                    await asyncio.wait(tasks)

    async def gather_in(self) -> None:
        """After a restart of khod: wait until everyone who was told something is there again; Refused if not."""
        told = [member for member in self.members if member.told]
        for refusal in await asyncio.gather(*map(self._returned, told)):
            if refusal is not None:
                raise refusal

    async def _returned(self, member: Member) -> Refused | None:
        timeout, member.began = member.producer.timeout, time.monotonic()
        try:
            async with asyncio.timeout(timeout):
                await member.producer.returned()
            return None
        except TimeoutError:
            member.answer = f"has not come back within {timeout:g} s since khod was restarted"
        except Veto as error:
            member.answer = str(error)
        finally:
            member.began = None
        return self._refused(member, Verb(member.told))

    async def leave(self) -> None:
        """Let everyone make way for the shutdown; nobody can stop it any more, so a failure is only noted."""
        frozen = [member for member in self.members if member.told == Verb.freeze.value]
        await asyncio.gather(*map(self._leaves, frozen))

    async def _leaves(self, member: Member) -> None:
        try:
            async with asyncio.timeout(LEAVING):
                await member.producer.leave(member.note)
        except (Veto, OSError, TimeoutError) as error:
            member.answer = str(error) or f"did not make way within {LEAVING:g} s"
            self.changed(member)

    async def undo(self, verb: Verb) -> None:
        """Tell everyone who was told `verb` that it is off, in reverse order; everyone is told.

        Raises NotRolledBack naming those that failed, after the last was told.
        """
        if self.broken is not None:
            raise NotRolledBack(
                f"The producers cannot be told to {UNDO[verb].value}: {self.broken.what}",
                where=self.broken.where,
                remedy="Mend this file, then: khoctl abort",
            )
        failed = []
        for rank in reversed(self._ranks):
            told = [member for member in rank if member.told == verb.value]
            for member, refusal in await self._all(told, UNDO[verb]):
                if refusal is not None:
                    member.told = verb.value  # so that another abort tells it again
                    failed.append(f"{member.producer.name}: {member.answer}")
                elif verb is Verb.freeze:
                    member.told = Verb.prepare.value  # thawed, and still to be told `cancel`
        if failed:
            raise NotRolledBack(
                f"Not every producer could {UNDO[verb].value}: {'; '.join(failed)}",
                remedy="Help these, or do it by hand and take the verb out of their files.",
            )

    async def bring_back(self, verb: Verb, among: Sequence[Member], deadline: float) -> list[Member]:
        """Tell `restore` or `finish` in rank order, whoever fails; those that did. Each has `deadline` seconds."""
        failed, wanted = [], frozenset(among)
        for rank in self._ranks:
            chosen = [member for member in rank if member in wanted]
            failed += [member for member, refusal in await self._all(chosen, verb, deadline) if refusal is not None]
        return failed

    async def _all(
        self, members: Sequence[Member], verb: Verb, deadline: float = 0.0
    ) -> list[tuple[Member, KhoError | None]]:
        """Tell all of these side by side, and wait for the slowest."""
        calls = (self._one(member, verb, max(deadline, member.producer.timeout)) for member in members)
        return list(zip(members, await asyncio.gather(*calls), strict=True))

    async def _one(self, member: Member, verb: Verb, deadline: float) -> KhoError | None:
        """Tell one producer; what its no amounts to, None for a yes."""
        producer, began = member.producer, time.monotonic()
        member.told = member.about = verb.value
        member.answer, member.began, member.progress = "", began, None
        self.changed(member)

        def not_yet(reason: str, progress: float | None) -> None:
            member.answer, member.progress = f"not yet: {reason}" if reason else "not yet", progress
            self.changed(member)

        telling = Telling(verb, self.run, member.note, not_yet)
        refusal: KhoError | None = None
        try:
            async with asyncio.timeout(deadline):
                await producer.tell(telling)
            member.answer = "ready"
        except TimeoutError:
            waited = f" ({member.answer})" if member.answer else ""
            member.answer = f"no answer within {deadline:g} s{waited}"
            refusal = self._refused(member, verb)
        except Unsupported as error:
            member.answer = error.what
            what = f"Producer {producer.name} cannot {verb.value}: {error.what}"
            refusal = Unsupported(what, where=error.where, remedy=error.remedy)
        except (Veto, OSError, KhoError) as error:
            member.answer = str(error)
            refusal = self._refused(member, verb)
        except asyncio.CancelledError:
            member.answer = NO_ANSWER
            raise
        finally:
            member.began, member.seconds = None, time.monotonic() - began
            if verb in (Verb.prepare, Verb.freeze):
                member.note = telling.note
            self.changed(member)
        return refusal

    def _refused(self, member: Member, verb: Verb) -> Refused:
        return Refused(
            f"Producer {member.producer.name} refuses to {verb.value}: {member.answer}",
            where=f"{member.producer.kind} {member.producer.name}",
            remedy=f"Once that is mended: khoctl producers test {member.producer.name}",
        )


def silent(members: Sequence[Member], verb: Verb, deadline: float) -> Failed:
    """The error for a step whose producers did not answer in time, with the names of those that did not."""
    waiting = ", ".join(member.producer.name for member in members if member.answer == NO_ANSWER)
    return Failed(
        f"Not every producer could {verb.value} within {deadline:g} s",
        where=waiting,
        remedy=f"Raise deadlines.{verb.value}, or look at these producers.",
    )
