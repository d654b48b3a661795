# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rules as hypothesis draws them, and as a generator of random numbers does: for runs of millions."""

import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from tests.model.ground import Setting
from tests.model.rules import RULES, SETTINGS, Rule, setting_of
from tests.model.world import World

STEPS = 60
"""Rules of one example, at most."""

LIKELY = 0.75
"""Of the rules, the part that an example has at all: whatever is left out cannot get in the way."""


class Count:
    """What all examples together come to, and the last of them."""

    rules: ClassVar[int] = 0
    states: ClassVar[set[int]] = set()
    known: ClassVar[frozenset[str]] = frozenset()
    log: ClassVar[list[tuple[Any, ...]]] = []
    setting: ClassVar[Setting] = Setting()


def new_world(setting: Setting) -> World:
    """A host for one example."""
    world = World(setting, Count.known)
    Count.log, Count.setting = world.log, setting
    return world


def carry_out(world: World, name: str, *arguments: Any) -> None:
    """Carry out one rule, and count it."""
    Count.rules += 1
    world.do(name, *arguments)
    Count.states.add(world.state())


def drawn_from(values: Mapping[str, Sequence[Any]]) -> Any:
    """A strategy for each argument."""
    return {name: st.sampled_from(each) for name, each in values.items()}


class Host(RuleBasedStateMachine):
    """One host; its rules are added below."""

    world: World

    @initialize(**drawn_from(SETTINGS))
    def begin(self, **chosen: Any) -> None:
        self.world = new_world(setting_of(chosen))

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        try:
            if sys.exc_info()[0] is None and self.world.invariants.violation is None:
                carry_out(self.world, "mend")
        finally:
            self.world.close()


def _method(one: Rule) -> Callable[..., None]:
    def method(self: Host, **chosen: Any) -> None:
        carry_out(self.world, one.does, *one.arguments(chosen))

    method.__name__ = one.name
    draws: Any = rule(**drawn_from(one.values))
    drawn: Callable[..., None] = draws(method)
    held: Callable[..., None] = precondition(lambda self: one.when(self.world))(drawn)
    return held


KhodMachine: Any = type(
    "KhodMachine", (Host,), {f"{one.name}_{number}": _method(one) for one in RULES for number in range(one.weight)}
)
"""The machine hypothesis runs."""


@contextmanager
def quiet() -> Iterator[None]:
    """Say nothing of coroutines of a killed khod, which nobody ever ran to their end."""
    before, sys.unraisablehook = sys.unraisablehook, lambda _unraisable: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    finally:
        sys.unraisablehook = before


def explore(examples: int, *, steps: int = STEPS, shrink: bool = True, number: int | None = None) -> None:
    """Have hypothesis make so many examples; raises what one ends in. Without a number they are always the same."""
    if number is not None:
        KhodMachine._hypothesis_internal_use_seed = number
    with quiet():
        run_state_machine_as_test(
            KhodMachine,
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                derandomize=number is None,
                database=None,
                deadline=None,
                phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
                suppress_health_check=list(HealthCheck),
                print_blob=False,
                report_multiple_bugs=False,
            ),
        )


def example(generator: random.Random, steps: int = STEPS, rules: Sequence[Rule] = RULES) -> None:
    """Make one example of random numbers; raises Violation."""
    chosen = {name: generator.choice(values) for name, values in SETTINGS.items()}
    some = [one for one in rules if one.does == "start" or generator.random() < LIKELY]
    some = [one for one in some for _ in range(one.weight)]
    world = new_world(setting_of(chosen))
    try:
        for _ in range(generator.randint(steps // 2, steps)):
            one = generator.choice(some)
            if one.when(world):
                values = {name: generator.choice(values) for name, values in one.values.items()}
                carry_out(world, one.does, *one.arguments(values))
        carry_out(world, "mend")
    finally:
        world.close()
