# SPDX-License-Identifier: LGPL-2.1-or-later
"""Versions in order: the examples of the Version Format Specification (UAPI.10), as it prints them."""

import itertools

import pytest

from khoctl.boot.versions import compare_versions

EXAMPLES = """\
11 == 11
systemd-123 == systemd-123
bar-123 < foo-123
123a > 123
123.a > 123
123.a < 123.b
123a > 123.a
11\N{GREEK SMALL LETTER ALPHA} == 11\N{GREEK SMALL LETTER BETA}
B < a
'' < 0
0. > 0
0.0 > 0
0 > ~
'' > ~
1_ == 1
_1 == 1
1_ < 1.2
1_2_3 > 1.3.3
1+ == 1
+1 == 1
1+ < 1.2
1+2+3 > 1.3.3
"""
CHAIN = "122.1 < 123~rc1-1 < 123 < 123-a < 123-a.1 < 123-1 < 123-1.1 < 123^post1 < 123.a-1 < 123.1-1 < 123a-1 < 124-1"


@pytest.mark.parametrize("example", EXAMPLES.splitlines())
def test_the_specification_s_examples(example: str) -> None:
    left, sign, right = (word.replace("''", "") for word in example.split(" "))
    order = {"<": -1, "==": 0, ">": 1}[sign]
    assert compare_versions(left, right) == order
    assert compare_versions(right, left) == -order


def test_each_of_the_specification_s_chain_is_older_than_all_to_its_right() -> None:
    chain = CHAIN.split(" < ")
    for (low, older), (high, newer) in itertools.product(enumerate(chain), repeat=2):
        assert compare_versions(older, newer) == (low > high) - (low < high)


@pytest.mark.parametrize(("older", "newer"), [("_.A", "0.."), ("A", "_0^"), ("^", "^0"), ("a.b", "a.0")])
def test_no_number_is_older_than_zero(older: str, newer: str) -> None:
    """As `systemd-analyze compare-versions` has it: a numeric segment is newer than another one or none."""
    assert compare_versions(older, newer) == -1
    assert compare_versions(newer, older) == 1


def test_a_number_longer_than_int_takes() -> None:
    assert compare_versions("1" * 5000, "1" * 4999 + "2") == -1
    assert compare_versions("0" * 5000 + "1", "1") == 0
