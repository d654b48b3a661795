# SPDX-License-Identifier: LGPL-2.1-or-later
"""The model in `make test`: a fixed number of examples, the same each time; `python -m tests.model` runs more."""

import random
from pathlib import Path

import pytest

from tests.model.bugs import BUGS, Bug, find
from tests.model.machine import example, explore, quiet
from tests.model.script import replay

EXAMPLES = 120
"""Of hypothesis, 12 to 60 rules each."""
PLAIN = 200
"""Of random numbers, at half the price."""
SEED = 20_261_101
CASES = Path(__file__).parent / "cases"
"""Lists of rules that broke an invariant once; see `tests.model.script`."""


def test_the_invariants_hold_whatever_hypothesis_thinks_of() -> None:
    explore(EXAMPLES)


def test_the_invariants_hold_in_random_examples() -> None:
    generator = random.Random(SEED)
    with quiet():
        for _ in range(PLAIN):
            example(generator)


@pytest.mark.parametrize("case", sorted(CASES.glob("*.rules")), ids=lambda case: case.stem)
def test_the_invariants_hold_in_what_was_found_before(case: Path) -> None:
    with quiet():
        replay(case, frozenset())


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_found(bug: Bug) -> None:
    with quiet():
        assert find(bug), bug.what
