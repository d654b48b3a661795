# SPDX-License-Identifier: LGPL-2.1-or-later
"""Small files that ask for much stop at a bound: of what is unpacked, what a tree holds, how often a text is read."""

import pytest

from khoctl.boot import entries, versions
from khod.errors import UsageError
from khod.trees.source import MAX_NAMES, write_dts
from tests.fuzz.bombs import BOMBS, prop
from tests.fuzz.run import start
from tests.unit.images import PACK
from tests.unit.test_fdt import BEGIN, END, STOP, body

UNPACKED = "It unpacks to more than the N bytes allowed"
MANY = "The tree has more than N nodes and properties"
# Each with what is said of it, nothing where it is read, and the most MiB it may take: twice what it does.
ENDS = {
    **{f"kernel of zeros, {method}": (UNPACKED, 64) for method in PACK},
    **{f"initrd of zeros, {method}": (f"{UNPACKED} (the part at byte N)", 64) for method in PACK},
    **{f"code of zeros, {method}": (UNPACKED, 128) for method in PACK},
    "zeros in a zboot": (UNPACKED, 32),
    "zeros in a UKI": (UNPACKED, 32),
    "zeros packed twice": (UNPACKED, 32),
    "an initrd's file of 4 GiB": (f"{UNPACKED} (the part at byte N)", 16),
    "an initrd of 100,000 parts": ("The initrd has more than N parts", 16),
    "blocks of two bytes": ("", 80),
    "a million versions": ("There are more than N versions in it", 32),
    "65,535 sections of a PE file": ("More than N files lie within each other", 80),
    "65,535 sections of an ELF file": ("", 80),
    "200,000 nodes": (MANY, 200),
    "paths longer than all": ("The names and paths of the tree have more than N MiB", 48),
    "names of properties that all differ": ("", 160),
    "names that end each other": ("The names and paths of the tree have more than N MiB", 260),
    "a million strings": ("", 80),
    "a million events": ("", 180),
    "650,000 ranges": ("", 320),
    "blobs that differ everywhere": ("It is neither an FDT nor a structure we know", 64),
    "lines that go on": ("There is no boot loader entry N", 16),
    "a place of 60,000 digits": ("There is no boot loader entry N", 16),
}


def test_every_bomb_has_its_end() -> None:
    assert ENDS.keys() == BOMBS.keys()


@pytest.mark.parametrize("name", ENDS)
def test_a_bomb_stops_at_a_bound(name: str) -> None:
    said, most = ENDS[name]
    report = start("bombs", [list(BOMBS).index(name)]).report()
    assert not report.failures, report.failures[0]
    assert list(report.endings) == ([said] if said else [])
    assert report.grown < most << 20


def test_dtc_is_asked_for_no_more_names_than_it_finds_in_time() -> None:
    """It looks for each in all before it, and so must what knows its layout."""
    names = [b"%04x\0" % name for name in range(MAX_NAMES + 1)]
    trees = [
        body(BEGIN, *[prop(5 * name) for name in range(count)], END, STOP, names=b"".join(names))
        for count in (MAX_NAMES, MAX_NAMES + 1)
    ]
    assert write_dts(trees[0])
    with pytest.raises(UsageError, match=str(MAX_NAMES)):
        write_dts(trees[1])


def test_texts_that_take_longer_the_longer_they_are_are_cut() -> None:
    """Each character of either costs as much as all that come behind it, or before it."""
    assert versions.compare_versions("1." * 9000 + "1", "1." * 9000 + "2") == 0
    assert versions.compare_versions("1." * 8000 + "1", "1." * 8000 + "2") == -1
    assert entries.os_release(f"ID={'x' * 5000}\nA=b")["ID"] == "x" * entries.VALUE
