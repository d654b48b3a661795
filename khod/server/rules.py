# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who may call what, and how it is served. A method that is not in here is not served."""

import enum
from dataclasses import dataclass

from khod.server.access import Standing
from khod.wire import INTERFACE, PRODUCER, SERVICE


class CallKind(enum.Enum):
    """How a call is served."""

    fixed = "fixed"
    """The answer is always the same."""
    question = "question"
    """The engine is asked, once for everyone who asks the same thing at a time."""
    operation = "operation"
    """A task of its own, which goes on to its end whether or not the client stays."""
    conversation = "conversation"
    """As an operation; it may wait for hours, so it is nothing that others must make way for."""
    stream = "stream"
    """Every change, until the client goes."""


EVERYONE = frozenset(Standing)
OPERATORS = frozenset({Standing.operator, Standing.root})
PRODUCERS = frozenset({Standing.producer, Standing.operator, Standing.root})


@dataclass(frozen=True)
class Rule:
    """One method. `what` stands in the sentence "User 1000 may not ..."."""

    kind: CallKind
    callers: frozenset[Standing] = EVERYONE
    what: str = ""
    image: bool = False
    """Whether it takes an image: then it is an operator's, and the answer is the caller's alone."""
    registered: bool = False
    """Whether it is for a connection that is a producer's."""


def _operators_rule(what: str) -> Rule:
    return Rule(CallKind.operation, OPERATORS, what)


_IMAGE = Rule(CallKind.question, what="have khod look at an image", image=True)
RULES = {
    f"{SERVICE}.GetInfo": Rule(CallKind.fixed),
    f"{SERVICE}.GetInterfaceDescription": Rule(CallKind.fixed),
    f"{INTERFACE}.Status": Rule(CallKind.question),
    f"{INTERFACE}.Producers": Rule(CallKind.question),
    f"{INTERFACE}.Scratch": Rule(CallKind.question),
    f"{INTERFACE}.Check": _IMAGE,
    f"{INTERFACE}.Plan": _IMAGE,
    f"{INTERFACE}.Monitor": Rule(CallKind.stream),
    f"{INTERFACE}.Activate": _operators_rule("activate"),
    f"{INTERFACE}.Abort": _operators_rule("abort"),
    f"{INTERFACE}.Kexec": _operators_rule("kexec"),
    f"{INTERFACE}.Rehearse": _operators_rule("test a producer"),
    f"{INTERFACE}.Retry": _operators_rule("have a producer take its state back"),
    f"{INTERFACE}.Forget": _operators_rule("forget a producer"),
    f"{INTERFACE}.Tree": _operators_rule("read the state tree"),
    f"{INTERFACE}.Snapshots": _operators_rule("list the snapshots"),
    f"{PRODUCER}.Register": Rule(CallKind.conversation, PRODUCERS, "be a producer"),
    f"{PRODUCER}.Next": Rule(CallKind.conversation, registered=True),
}
