# SPDX-License-Identifier: LGPL-2.1-or-later
"""The order in which producers are told, by the `after` and `before` of each."""

from collections.abc import Callable, Iterable
from graphlib import CycleError, TopologicalSorter
from typing import Protocol, TypeVar

from khod.errors import ConfigError

FLEETLOCK = "fleetlock"
LEADERS = (FLEETLOCK,)
"""Names of producers that are told `prepare` before all others, and `cancel` after them; no other may have one."""


class Ordered(Protocol):
    """A member of the order."""

    @property
    def name(self) -> str:
        """Its name, unique in the order."""

    @property
    def after(self) -> tuple[str, ...]:
        """Names of those told before it."""

    @property
    def before(self) -> tuple[str, ...]:
        """Names of those told after it."""


T = TypeVar("T", bound=Ordered)


def order_in_ranks(producers: Iterable[T]) -> list[list[T]]:
    """Return the producers in ranks, in the order in which they are told; ConfigError names a cycle.

    Leaders are the first rank. A name in `after` or `before` that is not among the others is ignored.
    """
    known = {producer.name: producer for producer in producers}
    leaders = [known.pop(name) for name in LEADERS if name in known]
    sorter: TopologicalSorter[str] = TopologicalSorter(dict.fromkeys(known, ()))
    for producer in known.values():
        sorter.add(producer.name, *(name for name in producer.after if name in known))
        for name in producer.before:
            if name in known:
                sorter.add(name, producer.name)
    try:
        sorter.prepare()
    except CycleError as error:
        raise _cycle_error(error.args[1]) from None
    result = [leaders] if leaders else []
    while sorter.is_active():
        rank = sorter.get_ready()
        result.append([known[name] for name in sorted(rank)])
        sorter.done(*rank)
    return result


def check_newcomer(
    newcomer: Ordered, find: Callable[[str], Ordered | None], naming: Callable[[str], Iterable[Ordered]]
) -> None:
    """Raise ConfigError if a newcomer closes a cycle in the order of the others, which has none.

    Thousands may come one by one, so only the producers that are told after it are visited, and none if no producer is
    told before it: such a newcomer cannot close a cycle. `find` returns one of the others by its name, `naming` returns
    those that have a name in `after` or `before`.
    """

    def others_naming(name: str) -> list[Ordered]:
        return [other for other in naming(name) if other.name != newcomer.name]

    def followers(one: Ordered) -> list[Ordered]:
        named = [newcomer if name == newcomer.name else find(name) for name in one.before]
        waiting = [other for other in others_naming(one.name) if one.name in other.after]
        return [*filter(None, named), *waiting, *([newcomer] if one.name in newcomer.after else [])]

    name = newcomer.name
    has_leaders = any(one == name or find(one) is not None for one in newcomer.after)
    if not has_leaders and not any(name in other.before for other in (newcomer, *others_naming(name))):
        return
    led_by, to_follow = dict[str, str](), [newcomer]
    while to_follow:
        one = to_follow.pop()
        for follower in followers(one):
            if follower is newcomer:
                path = [name, one.name]
                while path[-1] != name:
                    path.append(led_by[path[-1]])
                raise _cycle_error(reversed(path))
            if follower.name not in led_by:
                led_by[follower.name] = one.name
                to_follow.append(follower)


def _cycle_error(names: Iterable[str]) -> ConfigError:
    return ConfigError(
        "The producers' order is a cycle: " + " -> ".join(names), where="after/before", remedy="Remove one of these."
    )
