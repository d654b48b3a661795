"""The barrier: every producer answers before anyone goes on, and whoever was told is told when it is off.

Producers have ranks from `after` and `before`. Within one rank they run side by side; the undo goes
through the ranks in reverse. A producer that vetoes, dies or misses its deadline ends the attempt;
it may have had half of the step done, so it too is told the undo.
"""

import asyncio
import enum
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Protocol

from khod import model
from khod.errors import ConfigError, KhoError, NotRolledBack, Refused


class Verb(enum.Enum):
    """What a producer is told. prepare: work goes on. freeze: its blackout starts."""

    prepare = "prepare"
    freeze = "freeze"
    thaw = "thaw"
    cancel = "cancel"


NO_ANSWER = "no answer"

UNDO = {Verb.prepare: Verb.cancel, Verb.freeze: Verb.thaw}


class Veto(Exception):
    """A producer says no, or cannot be understood as saying yes; the message is its reason."""


class Producer(Protocol):
    """One holder of state."""

    @property
    def name(self) -> str:
        """Unique among the producers."""

    @property
    def kind(self) -> str:
        """What sort of producer: hook, ..."""

    @property
    def timeout(self) -> float:
        """Seconds it may take for one verb."""

    @property
    def after(self) -> tuple[str, ...]:
        """Names of producers told before it."""

    @property
    def before(self) -> tuple[str, ...]:
        """Names of producers told after it."""

    async def tell(self, verb: Verb, run: str) -> None:
        """Carry a verb out; returns when it is done, raises Veto with the reason otherwise."""


def ranks(producers: Sequence[Producer]) -> list[list[Producer]]:
    """Order producers; names that are not here are no constraint. ConfigError names a cycle."""
    known = {producer.name: producer for producer in producers}
    sorter: TopologicalSorter[str] = TopologicalSorter(dict.fromkeys(known, ()))
    for producer in producers:
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


@dataclass
class Member:
    """A producer in this attempt: the last verb it was told, its answer, and how long that took."""

    producer: Producer
    told: str = ""
    answer: str = ""
    seconds: float = 0.0
    waiting: bool = False

    def shown(self) -> model.Producer:
        """What status says of it."""
        return model.Producer(self.producer.name, self.producer.kind, self.told, self.answer, self.seconds)


class Barrier:
    """All producers of one attempt. `changed` is called whenever an answer comes in."""

    def __init__(
        self, producers: Sequence[Producer], run: str, changed: Callable[[str], None], *, told: Verb | None = None
    ) -> None:
        """Gather producers; `told` is what a khod that died had told them, so that they hear of the undo."""
        self.broken: ConfigError | None = None
        """Why the producers are not known: then nobody can be told of the undo, and that is said."""
        last = told.value if told else ""
        self._ranks = [[Member(producer, last) for producer in rank] for rank in ranks(producers)]
        self._run = run
        self._changed = changed

    @property
    def members(self) -> list[Member]:
        """Every producer, in rank order."""
        return [member for rank in self._ranks for member in rank]

    async def tell(self, verb: Verb) -> None:
        """Tell everyone, rank by rank; raises Refused with the first veto of a rank."""
        for rank in self._ranks:
            vetoes = await asyncio.gather(*(self._one(member, verb) for member in rank))
            for member, veto in zip(rank, vetoes, strict=True):
                if veto is not None:
                    raise Refused(
                        f"Producer {member.producer.name} refuses to {verb.value}: {veto}",
                        where=f"{member.producer.kind} {member.producer.name}",
                        remedy="Everything told so far is told that it is off.",
                    )

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
            answers = await asyncio.gather(*(self._one(member, UNDO[verb]) for member in told))
            failed += [
                f"{member.producer.name}: {veto}"
                for member, veto in zip(told, answers, strict=True)
                if veto is not None
            ]
            for member, veto in zip(told, answers, strict=True):
                if veto is not None:
                    member.told = verb.value  # so that another abort tells it again
                elif verb is Verb.freeze:
                    member.told = Verb.prepare.value  # thawed, and still to be told `cancel`
        if failed:
            raise NotRolledBack(
                f"Not every producer could {UNDO[verb].value}: {'; '.join(failed)}", remedy="Look after these by hand."
            )

    async def _one(self, member: Member, verb: Verb) -> str | None:
        """Tell one producer; its reason for a no, None for a yes."""
        began = time.monotonic()
        member.told, member.answer, member.waiting = verb.value, "", True
        self._changed(f"{member.producer.name}: {verb.value}")
        try:
            async with asyncio.timeout(member.producer.timeout):
                await member.producer.tell(verb, self._run)
            veto = None
        except Veto as error:
            veto = str(error)
        except TimeoutError:
            veto = f"no answer within {member.producer.timeout:g} s"
        except (OSError, KhoError) as error:
            veto = str(error)
        except asyncio.CancelledError:
            member.answer = NO_ANSWER
            raise
        finally:
            member.waiting, member.seconds = False, time.monotonic() - began
        member.answer = veto or "ready"
        self._changed(f"{member.producer.name}: {verb.value}: {member.answer}")
        return veto
