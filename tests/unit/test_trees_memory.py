# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where a tree's memory lies, held against one range after the other merged the slow way."""

import random
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from khod.region import Region
from khod.trees import memory
from khod.trees.memory import MemoryMap, summarise_ranges
from tests.unit.trees import MIB, PAGE, mem

Ranges = Sequence[tuple[int, int]]
TOP = 1 << 64


def view(*ranges: tuple[int, int]) -> memoryview:
    return memoryview(mem(*ranges))


def merged(ranges: Ranges) -> list[tuple[int, int]]:
    """Pages [first, last), as v3's kho_alloc_mem_cache() grows, sorts and joins them: those that touch are one."""
    found: list[tuple[int, int]] = []
    for first, last in sorted((a // PAGE, min(-(-(a + size) // PAGE), TOP // PAGE)) for a, size in ranges):
        if found and first <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], last)
        else:
            found.append((first, last))
    return found


def by_hand(ranges: Ranges, scratch: Sequence[Region]) -> dict[str, object]:
    runs = merged(ranges)
    holes = [(b[0] - a[1], a[1]) for a, b in pairwise(runs)]
    size, at = max(holes, default=(0, 0), key=lambda hole: hole[0])
    regions = [(area.addr // PAGE, -(-(area.addr + area.size) // PAGE)) for area in scratch]
    return {
        "ranges": len(ranges),
        "bytes": sum(size for _, size in ranges),
        "merged": len(runs),
        "merged_bytes": PAGE * sum(last - first for first, last in runs),
        "hole": Region(at * PAGE, size * PAGE) if holes else None,
        "in_scratch": PAGE * sum(max(0, min(b, d) - max(a, c)) for a, b in runs for c, d in regions),
        "beyond": sum(addr + size > TOP for addr, size in ranges),
    }


def told(found: MemoryMap | None, wanted: dict[str, object]) -> dict[str, object]:
    assert found is not None
    return {name: getattr(found, name) for name in wanted}


@pytest.fixture(params=["numpy", "plain"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to add up, from the first range on."""
    monkeypatch.setattr(memory, "FAST_FROM", 0)
    if request.param == "plain":
        monkeypatch.setitem(sys.modules, "khod.trees.merge_numpy", None)
    return str(request.param)


SHAPES: dict[str, Callable[[random.Random], Ranges]] = {
    "pages of a ring buffer": lambda c: [(0x1000 * c.randrange(4096), 0x1000) for _ in range(500)],
    "heads and pages": lambda c: [(0x1000 * c.randrange(900) + 64 * c.randrange(60), 64) for _ in range(500)],
    "unaligned": lambda c: [(c.randrange(1 << 22), c.randrange(1, 1 << 13)) for _ in range(300)],
    "long": lambda c: [(c.randrange(1 << 34), c.randrange(1, 1 << 20)) for _ in range(300)],
    "all over the machine": lambda c: [(c.randrange(1 << 46), 0x1000) for _ in range(300)],
    "empty ones": lambda c: [(c.randrange(1 << 22), c.choice([0, 0x1000])) for _ in range(100)],
    "past the end": lambda c: [(TOP - c.randrange(1, 1 << 16), c.randrange(1 << 17)) for _ in range(50)],
    "huge": lambda c: [(c.randrange(TOP), c.randrange(TOP)) for _ in range(50)],
    "one": lambda c: [(c.randrange(1 << 40), 1)],
}


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(8))
def test_the_sum_is_what_merging_one_by_one_gives(shape: str, seed: int) -> None:
    chance = random.Random(f"{shape} {seed}")
    ranges = SHAPES[shape](chance)
    scratch = [Region(chance.randrange(1 << 22), chance.randrange(1, 1 << 20))]
    cut = chance.randrange(len(ranges) + 1)
    wanted = by_hand(ranges, scratch)
    assert told(summarise_ranges([view(*ranges[:cut]), view(*ranges[cut:])], scratch), wanted) == wanted


@pytest.mark.usefixtures("engine")
def test_that_of_many_is_the_same() -> None:
    """More than numpy is imported for, as 10 MiB of v3 tree have them."""
    chance = random.Random(1)
    pages = chance.sample(range(0x100000, 0x180000), 200_000)
    wanted = by_hand(ranges := [(PAGE * page, PAGE) for page in pages], ())
    assert told(summarise_ranges([view(*ranges)]), wanted) == wanted


def test_without_numpy_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "FAST_FROM", 0)
    monkeypatch.delitem(sys.modules, "khod.trees.merge_numpy", raising=False)
    monkeypatch.setitem(sys.modules, "numpy", None)
    found = summarise_ranges([view((0, PAGE))])
    assert found is not None
    assert found.merged_bytes == PAGE


ranges_ = st.lists(st.tuples(st.integers(0, 64 * PAGE), st.integers(0, 4 * PAGE)), min_size=1, max_size=30)


@given(ranges_, st.integers(1, 90))
def test_the_columns_add_up_to_the_pages(ranges: Ranges, width: int) -> None:
    found = summarise_ranges([view(*ranges)], width=width)
    assert found is not None
    pages = (found.end - found.start) // PAGE
    edges = [pages * column // len(found.density) for column in range(len(found.density) + 1)]
    columns = [b - a for a, b in pairwise(edges)]
    total = sum(density * column for density, column in zip(found.density, columns, strict=True))
    assert round(total * PAGE) == found.merged_bytes
    assert all(0 <= density <= 1 for density in found.density)


def test_a_column_is_both_only_where_memory_lies_over_scratch() -> None:
    scratch = [Region(0x2000, 0x1000), Region(0x5000, 0x1000)]
    found = summarise_ranges([view((0x3000, 0x1000), (0x5000, 0x1000), (0xF000, 0x1000))], scratch, width=7)
    assert found is not None
    assert (found.start, found.end) == (0x2000, 0x10000)
    assert found.scratch == (True, True, False, False, False, False, False)
    assert found.clash == (False, True, False, False, False, False, False)
    assert found.in_scratch == 0x1000


def test_what_the_kernel_passes_over_does_not_count() -> None:
    assert summarise_ranges([]) is None
    assert summarise_ranges([view((0, MIB))[:-1], memoryview(b"")]) is None
