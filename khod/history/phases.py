# SPDX-License-Identifier: LGPL-2.1-or-later
"""What khod's events of a run say of its time: the steps before the jump, and who took back what after it."""

from collections.abc import Sequence

from khod.dataclass import dataclass
from khod.history.model import RowKind
from khod.history.stretches import Stretch
from khod.model import Event, EventKind, Phase, Step

ARRIVED = (Phase.verifying, Phase.verified, Phase.degraded, Phase.cold_boot)
"""The phases that only the khod after the jump enters."""
CONCLUDED = (Phase.verified, Phase.degraded)
READY = "ready"
ROLLBACK = "rollback"
PARENTS = {"thaw": ROLLBACK, "cancel": ROLLBACK}
"""The row of a producer's answer, where it does not have the name of the verb."""


def split_events(events: Sequence[Event]) -> tuple[list[Event], list[Event]]:
    """Split the events at the jump: those of the kernel before, and those of the kernel after it."""
    for number, event in enumerate(events):
        if event.phase in ARRIVED or event.boot_id != events[0].boot_id:
            return list(events[:number]), list(events[number:])
    return list(events), []


def find_freeze(events: Sequence[Event]) -> float | None:
    """Return when the first producer was told to freeze, or else when the step began; None if it did not."""
    for event in events:
        if event.kind is EventKind.producer_called and event.producer and event.producer.phase == Step.freeze.value:
            return event.seconds
    began = [event.seconds for event in events if _begins(event, Step.freeze)]
    return began[0] if began else None


def find_execute(events: Sequence[Event]) -> float | None:
    """Return when the jump was asked for, the last time; None if it was not."""
    began = [event.seconds for event in events if _begins(event, Step.execute)]
    return began[-1] if began else None


def _begins(event: Event, step: Step) -> bool:
    return event.kind is EventKind.step_began and event.step == step.value


def find_steps(events: Sequence[Event]) -> list[Stretch]:
    """Return the steps in order, without the jump, and the rollback if there was one."""
    found: list[Stretch] = []
    begun: tuple[str, float] | None = None

    def end_step(at: float, detail: str) -> None:
        if begun is not None:
            found.append(Stretch(RowKind.step, begun[0], begun[1], at, detail=detail))

    for event in events:
        rolls_back = event.phase is Phase.rolling_back
        if begun is not None and begun[0] == ROLLBACK:
            if not rolls_back:
                end_step(event.seconds, "")
                begun = None
        elif rolls_back:
            end_step(event.seconds, "failed")
            begun = ROLLBACK, event.seconds
        if event.kind is EventKind.step_ended and begun is not None and begun[0] == event.step:
            end_step(event.seconds, "")
            begun = None
        elif event.kind is EventKind.step_began:
            end_step(event.seconds, "failed")
            begun = (event.step, event.seconds) if event.step != Step.execute.value else None
    if begun is not None:
        end_step(events[-1].seconds, "" if begun[0] == ROLLBACK else "not finished")
    return found


def find_answers(events: Sequence[Event]) -> list[Stretch]:
    """Return each producer's answers, as rows in that of the verb; an answer that never came is left out."""
    called: dict[tuple[str, str], float] = {}
    found = []
    for event in events:
        producer = event.producer
        if producer is None:
            continue
        key = producer.name, producer.phase
        if event.kind is EventKind.producer_called:
            called[key] = event.seconds
        elif event.kind is EventKind.producer_answered and key in called:
            detail = "" if producer.answer == READY else producer.answer
            parent = PARENTS.get(producer.phase, producer.phase)
            begin = called.pop(key)
            found.append(Stretch(RowKind.producer, producer.name, begin, event.seconds, parent=parent, detail=detail))
    return found


@dataclass(frozen=True)
class Recovery:
    """When the producers had their state again, CLOCK_MONOTONIC of the kernel after the jump.

    `restored` is the last answer to `restore`, `finished` the last one to `finish`; None if nobody was told.
    """

    ended: float
    restored: float | None = None
    finished: float | None = None
    answers: tuple[Stretch, ...] = ()


def find_recovery(events: Sequence[Event]) -> Recovery | None:
    """Return how the host recovered; None if the verification is not concluded, or no producer has its state again.

    A producer that came after the conclusion does not count.
    """
    concluded = next((number for number, event in enumerate(events) if event.phase in CONCLUDED), None)
    if concluded is None:
        return None
    answers = find_answers(events[:concluded])
    if not answers:
        return Recovery(events[concluded].seconds)
    restored = [one.end for one in answers if one.parent == "restore"]
    finished = [one.end for one in answers if one.parent == "finish" and not one.detail]
    if not finished:
        return None
    return Recovery(max(finished), max(restored, default=None), max(finished), tuple(answers))
