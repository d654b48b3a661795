# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rank test that judges a batch, held against enumeration and against its stated error."""

import random
from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations, product
from statistics import NormalDist

import pytest

from tests.unit.collection import load_util

judge_batch = load_util("rank_test").judge_batch
judge_blackouts = load_util("summary").judge_blackouts

SPREAD = 0.05
"""The standard deviation of the simulated blackouts of one host, as a part of their mean."""
ALPHA = 0.01


def mean_ranks(values: Sequence[float]) -> list[Fraction]:
    return [
        Fraction(sum(other < value for other in values)) + Fraction(sum(other == value for other in values) + 1, 2)
        for value in values
    ]


def enumerate_p(strata: Sequence[tuple[list[float], list[float]]]) -> Fraction:
    """Count every choice of new values of every stratum: what the test says without any cleverness."""
    ranks = [mean_ranks([*new, *old]) for new, old in strata]
    observed = sum(
        (sum(found[: len(new)], Fraction(0)) for found, (new, _) in zip(ranks, strata, strict=True)), Fraction(0)
    )
    choices = [
        [sum(chosen, Fraction(0)) for chosen in combinations(found, len(new))]
        for found, (new, _) in zip(ranks, strata, strict=True)
    ]
    sums = [sum(together, Fraction(0)) for together in product(*choices)]
    return Fraction(sum(one >= observed for one in sums), len(sums))


@pytest.mark.parametrize("seed", range(40))
def test_the_probability_is_exact_with_ties_and_strata(seed: int) -> None:
    chance = random.Random(seed)
    digits = chance.choice([0, 1, 6])  # a blackout with whole seconds has many ties
    strata = [
        tuple([round(chance.uniform(1, 5), digits) for _ in range(chance.randint(1, bound))] for bound in (3, 5))
        for _ in range(chance.randint(1, 3))
    ]
    expected = enumerate_p(strata)  # type: ignore[arg-type]
    assert judge_batch(strata, 1.0)["p"] == pytest.approx(float(expected), abs=1e-12)


def test_what_cannot_be_told_from_chance_is_not_judged() -> None:
    found = judge_batch([([9.0], [1.0, 2.0])], ALPHA)
    assert (found["worse"], found["p"]) == (None, None)
    assert found["least_p"] == pytest.approx(1 / 3)
    assert judge_batch([], ALPHA)["worse"] is None


def test_a_large_pooled_history_is_counted() -> None:
    chance = random.Random(1)
    old = [chance.gauss(5, SPREAD * 5) for _ in range(4000)]
    assert judge_batch([([6.0] * 10, old)], ALPHA)["worse"]
    assert judge_batch([([5.0] * 10, old)], ALPHA)["worse"] is False


def test_no_host_is_compared_with_another_one() -> None:
    """One that is ten times as slow as the others always was is as it always was."""
    slow = {"outcome": "verified", "blackout_seconds": 50.0, "past_blackouts": [49.0, 51.0, 50.5]}
    fast = {"outcome": "verified", "blackout_seconds": 5.0, "past_blackouts": [4.9, 5.1, 5.05]}
    found = judge_blackouts({"slow": slow, "fast": fast}, 1.0, 1.0, 0.0)
    assert found["p"] == pytest.approx(13 / 16)


def simulate_roll_out(chance: random.Random, slower: float, *, hosts: int = 200, batch: int = 10, past: int = 5) -> int:
    """Give in which batch a roll-out is stopped, 0 where it is not: hosts differ, each varies around its own mean."""
    for number in range(hosts // batch):
        results = {}
        for host in range(batch):
            mean = chance.uniform(2, 20)
            values = [mean * chance.gauss(1, SPREAD) for _ in range(past + 1)]
            results[f"{host}"] = {
                "outcome": "verified",
                "blackout_seconds": values[0] * (1 + slower),
                "past_blackouts": values[1:],
            }
        if judge_blackouts(results, batch / hosts, ALPHA, 0.0)["worse"]:
            return number + 1
    return 0


@pytest.mark.parametrize("seed", range(20))
def test_a_regression_of_20_percent_is_stopped_in_the_first_batch(seed: int) -> None:
    """With a spread of 5 %, and five handovers of each host before."""
    assert simulate_roll_out(random.Random(seed), 0.2) == 1


def test_twenty_clean_roll_outs_are_not_stopped() -> None:
    assert [simulate_roll_out(random.Random(seed), 0.0) for seed in range(20)] == [0] * 20


def test_the_error_of_a_roll_out_is_what_it_says() -> None:
    """Of 1,000 clean roll-outs, at most as many are stopped as 1 % allows with a margin of four deviations."""
    stopped = sum(simulate_roll_out(random.Random(seed), 0.0, hosts=40, past=3) > 0 for seed in range(1000))
    assert stopped <= 1000 * ALPHA + NormalDist().inv_cdf(0.9999) * (1000 * ALPHA) ** 0.5
