# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who may call which method, and how it is served; other methods are not served."""

import enum

from khod.dataclass import dataclass
from khod.server.access import Standing
from khod.wire import INTERFACE, METRICS_INTERFACE, PRODUCER, SERVICE


class CallKind(enum.Enum):
    """How a call is served."""

    fixed = "fixed"
    """The answer is always the same."""
    question = "question"
    """The engine is asked, once for all clients with the same question at that time."""
    operation = "operation"
    """A task of its own, which runs to its end even if the client goes."""
    conversation = "conversation"
    """As an operation, but it may wait for hours, so it does not count as work that others must not slow down."""
    listing = "listing"
    """As a question; the answer is several replies."""
    stream = "stream"
    """Sends every change, until the client goes."""


EVERYONE = frozenset(Standing)
OPERATORS = frozenset({Standing.operator, Standing.root})
PRODUCERS = frozenset({Standing.producer, Standing.operator, Standing.root})


@dataclass(frozen=True)
class Rule:
    """One method; `what` completes the sentence "User 1000 may not ..."."""

    kind: CallKind
    callers: frozenset[Standing] = EVERYONE
    what: str = ""
    image: bool = False
    """Whether it accepts an image; with one it is for operators only, and the answer is only for the caller."""
    registered: bool = False
    """Whether it is only for the connection of a producer."""


def _operators_rule(what: str) -> Rule:
    return Rule(CallKind.operation, OPERATORS, what)


_IMAGE = Rule(CallKind.question, what="have khod look at an image", image=True)
RULES = {
    f"{SERVICE}.GetInfo": Rule(CallKind.fixed),
    f"{SERVICE}.GetInterfaceDescription": Rule(CallKind.fixed),
    f"{INTERFACE}.Status": Rule(CallKind.question),
    f"{INTERFACE}.Producers": Rule(CallKind.question),
    f"{INTERFACE}.Scratch": Rule(CallKind.question),
    f"{INTERFACE}.History": Rule(CallKind.question),
    f"{INTERFACE}.Attempt": Rule(CallKind.question),
    f"{INTERFACE}.Chain": Rule(CallKind.question),
    f"{INTERFACE}.Check": _IMAGE,
    f"{INTERFACE}.Plan": _IMAGE,
    f"{INTERFACE}.Monitor": Rule(CallKind.stream),
    f"{INTERFACE}.Activate": _operators_rule("activate"),
    f"{INTERFACE}.Abort": _operators_rule("abort"),
    f"{INTERFACE}.Kexec": _operators_rule("kexec"),
    f"{INTERFACE}.Announce": _operators_rule("announce the run of a profile"),
    f"{INTERFACE}.TakeAnnouncement": _operators_rule("take the announcement of a profile's run"),
    f"{INTERFACE}.Rehearse": _operators_rule("test a producer"),
    f"{INTERFACE}.Retry": _operators_rule("have a producer take its state back"),
    f"{INTERFACE}.Forget": _operators_rule("forget a producer"),
    f"{INTERFACE}.Acknowledge": _operators_rule("acknowledge a failed handover"),
    f"{INTERFACE}.Tree": _operators_rule("read the state tree"),
    f"{INTERFACE}.Snapshots": _operators_rule("list the snapshots"),
    f"{METRICS_INTERFACE}.List": Rule(CallKind.listing),
    f"{METRICS_INTERFACE}.Describe": Rule(CallKind.listing),
    f"{PRODUCER}.Register": Rule(CallKind.conversation, PRODUCERS, "be a producer"),
    f"{PRODUCER}.Next": Rule(CallKind.conversation, registered=True),
}
