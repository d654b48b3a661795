# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes a counterexample small: rules are left out while the same invariant still does not hold."""

from collections.abc import Sequence
from typing import Any

from tests.model.ground import Setting
from tests.model.invariants import Violation
from tests.model.machine import quiet
from tests.model.world import World

Rules = list[tuple[Any, ...]]


def outcome(setting: Setting, rules: Sequence[tuple[Any, ...]], known: frozenset[str]) -> tuple[str, int]:
    """The invariant that these rules break, and how many of them it took; "" where all hold."""
    world = World(setting, known)
    try:
        for number, (name, *arguments) in enumerate(rules, 1):
            try:
                world.do(name, *arguments)
            except Violation as violation:
                return violation.name, number
        return "", len(rules)
    finally:
        world.close()


def reduced(setting: Setting, rules: Sequence[tuple[Any, ...]], known: frozenset[str]) -> tuple[Setting, Rules]:
    """The smallest list that was found to break the same invariant, and the smallest host."""
    with quiet():
        name, length = outcome(setting, rules, known)
        if not name:
            return setting, list(rules)
        smallest = list(rules[:length])
        smallest = _without(setting, smallest, name, known)
        setting = _smaller(setting, smallest, name, known)
        smallest = _simpler(setting, smallest, name, known)
        return setting, _without(setting, smallest, name, known)


def _without(setting: Setting, rules: Rules, name: str, known: frozenset[str]) -> Rules:
    size = max(len(rules) // 2, 1)
    while True:
        at = 0
        while at < len(rules):
            tried = rules[:at] + rules[at + size :]
            found, length = outcome(setting, tried, known)
            if found == name:
                rules = tried[:length]
            else:
                at += size
        if size == 1:
            return rules
        size //= 2


def _smaller(setting: Setting, rules: Rules, name: str, known: frozenset[str]) -> Setting:
    tried = [
        Setting(setting.kernel, setting.files, setting.peers, setting.config, chained=False),
        *(Setting(setting.kernel, setting.files[:n], setting.peers, setting.config) for n in range(len(setting.files))),
        *(Setting(setting.kernel, setting.files, setting.peers[:n], setting.config) for n in range(len(setting.peers))),
        *(Setting(setting.kernel, setting.files[:n], (), setting.config) for n in range(len(setting.files))),
        Setting(setting.kernel, (), (), 0),
        Setting(setting.kernel, setting.files, setting.peers, 0),
    ]
    best = setting
    for each in tried:
        small = len(each.files) + len(each.peers), each.config, each.chained
        if small < (len(best.files) + len(best.peers), best.config, best.chained):
            best = each if outcome(each, rules, known)[0] == name else best
    return best


def _simpler(setting: Setting, rules: Rules, name: str, known: frozenset[str]) -> Rules:
    """Values that say less: an operation that is waited for, a first call, a trouble without end."""
    for number, rule in enumerate(rules):
        for place, value in enumerate(rule):
            for plain in _plainer(rule[0], place, value):
                tried = [*rules[:number], (*rule[:place], plain, *rule[place + 1 :]), *rules[number + 1 :]]
                if outcome(setting, tried, known)[0] == name:
                    rules, rule = tried, tried[number]  # noqa: PLW2901
                    break
    return rules


def _plainer(rule: str, place: int, value: Any) -> list[Any]:
    if place == 0:
        return []
    if value is True:
        return [False]
    if isinstance(value, int) and not isinstance(value, bool):
        return (
            ["end"] if rule not in ("fault", "kill_at", "power_loss", "reload") else [n for n in (0, 1, 2) if n < value]
        )
    if isinstance(value, float) and value and rule not in ("fault", "behave"):
        return ["end"]
    return []
