# SPDX-License-Identifier: LGPL-2.1-or-later
"""The order of producers: a newcomer is held against those it names and those told after it, and nobody else."""

import math
import random
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import pytest

from khod.errors import ConfigError, UsageError
from khod.handover.record import Owner, Process
from khod.producers.barrier import Barrier, Verb
from khod.producers.hooks import Hook
from khod.producers.identity import process_of
from khod.producers.order import check_newcomer, order_in_ranks
from khod.producers.peer import Peer, Registration
from khod.producers.peers import Peers
from khod.producers.registry import ProducerRegistry
from khod.producers.sessions import Sessions

OWNER = Owner(1000, "kv.service")
PROCESS = Process(2**22, 1)
MANY = 400


@dataclass(frozen=True)
class One:
    """Somebody in the order."""

    name: str
    after: tuple[str, ...] = ()
    before: tuple[str, ...] = ()


def check(newcomer: One, others: list[One]) -> None:
    known = {other.name: other for other in others}
    check_newcomer(newcomer, known.get, lambda name: [one for one in others if name in (*one.after, *one.before)])


def test_a_newcomer_is_refused_where_the_whole_order_would_be_a_cycle() -> None:
    assert sum(map(refusals, range(20))) > 20


def refusals(seed: int) -> int:
    """Have a dozen come in turn; how many were refused, each of them rightly."""
    chance = random.Random(seed)
    others: list[One] = []
    names = [f"p{number}" for number in range(12)]
    for name in chance.sample(names, len(names)):
        after, before = (tuple(chance.sample(names, chance.choice((0, 0, 1, 2)))) for _ in range(2))
        newcomer = One(name, after, before)
        try:
            order_in_ranks([*others, newcomer])
        except ConfigError:
            with pytest.raises(ConfigError) as raised:
                check(newcomer, others)
            path = raised.value.what.partition(": ")[2].split(" -> ")
            assert path[0] == path[-1] == name
            told = {one.name: one for one in (*others, newcomer)}
            assert all(then in told[first].before or first in told[then].after for first, then in pairwise(path))
        else:
            check(newcomer, others)
            others.append(newcomer)
    return len(names) - len(others)


@pytest.fixture
def registry() -> ProducerRegistry:
    return ProducerRegistry(list, Peers(cast("Sessions", None), lambda _peer: None, lambda _peer: None))


def register(registry: ProducerRegistry, name: str, after: tuple[str, ...] = (), before: tuple[str, ...] = ()) -> Peer:
    return registry.register_peer(name, OWNER, PROCESS, Registration(after=after, before=before), MANY + 3)


def test_thousands_that_name_one_are_not_held_against_each_other(
    registry: ProducerRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at: list[str] = []
    find = registry.peers.find_peer

    def counted(name: str) -> Peer | None:
        looked_at.append(name)
        return find(name)

    monkeypatch.setattr(registry.peers, "find_peer", counted)
    ordered = "khod.producers.registry.order_in_ranks"
    monkeypatch.setattr(ordered, lambda _producers: pytest.fail("everyone was put in order"))
    register(registry, "storage")
    for number in range(MANY):
        register(registry, f"p{number}", ("storage",) if number % 2 else (), () if number % 2 else ("storage",))
    assert len(looked_at) < 10 * MANY


def test_who_has_left_or_was_given_up_is_no_constraint(registry: ProducerRegistry) -> None:
    first = register(registry, "first", ("second",))
    with pytest.raises(ConfigError):
        register(registry, "second", ("first",))
    registry.peers.remove_peer(first)
    second = register(registry, "second", ("first",))
    with pytest.raises(ConfigError):
        register(registry, "first", ("second",))
    registry.peers.remove_peer(second)
    register(registry, "first", ("second",))


def test_one_that_comes_back_with_another_order_is_held_to_that(registry: ProducerRegistry) -> None:
    process = process_of(1)
    assert process is not None
    first = register(registry, "first", ("second",))
    first.claim.begin_verb(Verb.freeze)
    registry.peers.remove_peer(first)
    assert [peer.name for peer in registry.peers.peers_naming("second")] == ["first"], (
        "it is waited for, and will be told"
    )
    with pytest.raises(ConfigError):
        register(registry, "second", ("first",))
    assert register(registry, "first") is first
    assert registry.peers.peers_naming("second") == []
    register(registry, "second", ("first",))


def test_a_name_that_is_none_is_not_looked_for(registry: ProducerRegistry) -> None:
    with pytest.raises(UsageError):
        register(registry, "first", ("not/a/name",))
    assert registry.peers.peers_naming("not/a/name") == []


async def test_the_limit_that_is_shown_is_the_one_that_comes_first() -> None:
    """A step ends for everybody after deadlines.freeze, whatever timeout a producer has."""
    short, long = Hook("short", 2, commands={}), Hook("long", 30, commands={})
    for seconds, expected in ((10, [10, 2]), (60, [30, 2])):
        here = Barrier.from_producers([short, long], "run-1", lambda _member: None)
        await here.broadcast(Verb.freeze, seconds=seconds)
        assert [math.ceil(member.limit) for member in here.members] == expected
