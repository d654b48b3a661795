# SPDX-License-Identifier: LGPL-2.1-or-later
"""How long each producer stood still in a run, from the events of both kernels."""

from collections.abc import Iterator, Sequence

from khod.history.bridge import Bridge
from khod.history.model import Standstill
from khod.history.phases import READY
from khod.model import Event, EventKind, Producer


def find_standstills(before: Sequence[Event], after: Sequence[Event], bridge: Bridge) -> list[Standstill]:
    """Return how long each producer stood still that took its state back, the longest first.

    Also one that did so after the verification was concluded. What a producer says of itself comes with `finish`.
    """
    frozen = {name: at for name, at, _ in reversed([*_find_verb(before, "freeze", EventKind.producer_called)])}
    own = {name: producer.stopped_seconds for name, _, producer in _find_verb(after, "finish")}
    found = {
        name: Standstill(
            name, producer.kind, round(bridge.to_first(at) - frozen[name], 6), bridge.error_seconds, own.get(name)
        )
        for name, at, producer in _find_verb(after, "restore")
        if producer.answer == READY and name in frozen
    }
    return sorted(found.values(), key=lambda one: -one.seconds)


def _find_verb(
    events: Sequence[Event], verb: str, kind: EventKind = EventKind.producer_answered
) -> Iterator[tuple[str, float, Producer]]:
    """Yield the events of this kind about a verb: the producer's name, when it was, and the producer."""
    for event in events:
        producer = event.producer
        if producer is not None and event.kind is kind and producer.phase == verb:
            yield producer.name, event.seconds, producer
