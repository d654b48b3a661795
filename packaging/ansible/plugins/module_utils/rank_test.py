# Copyright: the khod authors
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The exact one-sided rank test that judges a batch: are its blackouts longer than those of the history?

It is Wilcoxon's rank-sum test, in strata. Ranks are taken within a stratum only, so no host is compared with another
one unless the operator says that they are alike. The distribution is counted, not approximated: the stated error holds
for a batch of one host, too, and with ties. Nothing is assumed of how long a blackout is, or how much it varies.
"""

from __future__ import annotations

from fractions import Fraction
from math import comb

MAX_OLD = 500
"""How many past blackouts of one stratum are used, so that counting takes no longer than a fraction of a second."""


def judge_batch(strata, alpha, margin=0.0):
    """Return whether the new blackouts are worse than the old ones, with the probability that says so.

    `strata` are pairs of lists, the new and the old blackouts in seconds, the newest old one first. An old one counts
    as long as itself times 1 + `margin`. `worse` is None where even the longest blackouts could not be told from chance
    at the level `alpha`, because too little is known of the past.
    """
    ways, observed = {0: 1}, 0
    for new, old in strata:
        if not new or not old:
            continue
        counts, found = _count_rank_sums(new, [value * (1 + margin) for value in old[:MAX_OLD]])
        ways = _add_distributions(ways, counts)
        observed += found
    total = sum(ways.values())
    least = Fraction(ways[max(ways)], total)
    if least > alpha:
        return {"worse": None, "p": None, "least_p": float(least), "alpha": alpha}
    p = Fraction(sum(count for rank_sum, count in ways.items() if rank_sum >= observed), total)
    return {"worse": p <= alpha, "p": float(p), "least_p": float(least), "alpha": alpha}


def _count_rank_sums(new, old):
    """Return how many choices of len(new) values have which sum of ranks, and the sum that was observed.

    Ranks are doubled, so that the mean rank of equal values is a whole number. The polynomial that counts the choices
    is kept in one integer with `width` bits for each coefficient: that is a hundred times as fast as a table.
    """
    ranks = _double_ranks([*new, *old])
    size, width = len(new), comb(len(ranks), len(new)).bit_length() + 1
    polynomials = [1] + [0] * size
    for rank in ranks:
        for chosen in range(size, 0, -1):
            polynomials[chosen] += polynomials[chosen - 1] << (rank * width)
    counts, packed, mask = {}, polynomials[size], (1 << width) - 1
    data = packed.to_bytes((packed.bit_length() + 7) // 8 + 8, "little")
    for rank_sum in range(packed.bit_length() // width + 1):
        first = rank_sum * width
        window = int.from_bytes(data[first // 8 : (first + width) // 8 + 1], "little")
        if count := window >> (first % 8) & mask:
            counts[rank_sum] = count
    return counts, sum(ranks[:size])


def _double_ranks(values):
    """Return twice the rank of each value; equal ones have the mean of their ranks."""
    ordered = sorted(values)
    first, last = {}, {}
    for place, value in enumerate(ordered, 1):
        first.setdefault(value, place)
        last[value] = place
    return [first[value] + last[value] for value in values]


def _add_distributions(one, other):
    """Return the distribution of the sum of two independent rank sums."""
    found = {}
    for first, ways in one.items():
        for second, more in other.items():
            found[first + second] = found.get(first + second, 0) + ways * more
    return found
