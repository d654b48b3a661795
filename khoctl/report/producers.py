# SPDX-License-Identifier: LGPL-2.1-or-later
"""What each producer answered in an attempt, and how long it took, from the events of the attempt."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from khoctl.render import is_notable
from khod.history.model import Standstill
from khod.model import Event, EventKind


@dataclass
class ProducerAnswers:
    """One producer's answers: `seconds` has the time of the last answer to each verb, in the order of the verbs.

    `standstill` says how long it was stopped by the handover, None if that is not known. `problems` has the verb and
    the answer for each that is not `ready`, and for a verb that was never answered.
    """

    name: str
    kind: str
    seconds: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    unanswered: str = ""
    standstill: Standstill | None = None

    @property
    def total_seconds(self) -> float:
        """The seconds of all answers together."""
        return sum(self.seconds.values())


def collect_answers(events: Iterable[Event], standstills: Iterable[Standstill] = ()) -> list[ProducerAnswers]:
    """Return the producers of an attempt: those with a problem first, then the slowest."""
    found: dict[str, ProducerAnswers] = {}
    for event in events:
        about = event.producer
        if about is None or event.kind not in (EventKind.producer_called, EventKind.producer_answered):
            continue
        answers = found.setdefault(about.name, ProducerAnswers(about.name, about.kind))
        if event.kind is EventKind.producer_called:
            answers.unanswered = about.phase
            continue
        answers.unanswered = ""
        answers.seconds[about.phase] = event.duration or 0.0
        if is_notable(about):
            answers.problems.append(f"{about.phase}: {about.answer}")
    for standstill in standstills:
        if standstill.name in found:
            found[standstill.name].standstill = standstill
    for answers in found.values():
        if answers.unanswered:
            answers.problems.append(f"{answers.unanswered}: no answer")
    return sorted(found.values(), key=lambda item: (not item.problems, -item.total_seconds))
