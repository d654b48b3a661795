# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where a v3 tree's `mem` lies in physical memory, merged as in the kernel's mem cache on load.

The rules are those of kho_alloc_mem_cache() of the v3 series: each range is extended to whole pages, and ranges that
overlap or touch become one; a property whose length is not a multiple of 16 is ignored. If a range overlaps scratch,
the load fails with EINVAL.
"""

from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from itertools import accumulate, chain, compress, islice, repeat
from operator import add, gt, ne, rshift, sub
from typing import Any

from khod.abi.fdt import KHO_MEM
from khod.dataclass import dataclass
from khod.region import Region

PAGE_SHIFT = 12  # x86-64, and most builds of arm64; with larger pages more ranges would merge
TOP = 1 << (64 - PAGE_SHIFT)
FAST_FROM = 50_000
"""The number of ranges from which importing numpy (0.1 s) costs less than it saves."""
SPARSE = 16
"""Up to this many pages for each range, a map of pages is faster than sorting."""
LONG = 16
"""From this many pages in a range on, marking it page by page is not faster."""


@dataclass(frozen=True)
class Merged:
    """Ranges after the merge: page numbers [firsts[i], lasts[i]) in order; `below[i]` is the pages before the i-th.

    `hole` is the index of the range after the largest hole (0: none), `size` the bytes requested, `beyond` the number
    of ranges that exceed the address space. The sequences may be numpy's.
    """

    firsts: Sequence[int] | Any
    lasts: Sequence[int] | Any
    below: Sequence[int] | Any
    hole: int
    size: int
    beyond: int


@dataclass(frozen=True)
class MemoryMap:
    """The sum of a tree's ranges; sizes and addresses in bytes.

    For each column of [start, end): `density` is from 0 to 1, `scratch` tells whether it has scratch, `clash` whether a
    range overlaps that.
    """

    ranges: int
    bytes: int
    merged: int
    merged_bytes: int
    hole: Region | None
    in_scratch: int
    beyond: int
    start: int
    end: int
    density: tuple[float, ...]
    scratch: tuple[bool, ...]
    clash: tuple[bool, ...]


def summarise_ranges(mems: Sequence[memoryview], scratch: Sequence[Region] = (), width: int = 80) -> MemoryMap | None:
    """Sum up the ranges of `mem`, over `width` columns from the lowest address (also of scratch) to the highest.

    Returns None if there is no range. Lengths that are not a multiple of 16 are ignored, as in the kernel.
    """
    whole = [raw for raw in mems if raw and len(raw) % KHO_MEM.size == 0]
    count = sum(len(raw) for raw in whole) // KHO_MEM.size
    if not count:
        return None
    merged = _merge_numpy(whole, count) or _merge_python(whole)
    pages = [(area.addr >> PAGE_SHIFT, -(-(area.addr + area.size) >> PAGE_SHIFT)) for area in scratch]
    low = min(int(merged.firsts[0]), *(first for first, _ in pages), TOP)
    high = max(int(merged.lasts[-1]), *(last for _, last in pages), low + 1)
    width = max(1, min(width, high - low))
    edges = [low + (high - low) * column // width for column in range(width + 1)]
    covered = [_pages_below(merged, edge) for edge in edges]
    at = merged.hole
    return MemoryMap(
        ranges=count,
        bytes=merged.size,
        merged=len(merged.firsts),
        merged_bytes=_pages_below(merged, TOP) << PAGE_SHIFT,
        hole=_region_of(int(merged.lasts[at - 1]), int(merged.firsts[at])) if at else None,
        in_scratch=sum(_pages_between(merged, first, last) for first, last in pages) << PAGE_SHIFT,
        beyond=merged.beyond,
        start=low << PAGE_SHIFT,
        end=high << PAGE_SHIFT,
        density=tuple((covered[i + 1] - covered[i]) / (edges[i + 1] - edges[i]) for i in range(width)),
        scratch=tuple(any(a < edges[i + 1] and edges[i] < b for a, b in pages) for i in range(width)),
        clash=tuple(
            any(_pages_between(merged, max(a, edges[i]), min(b, edges[i + 1])) for a, b in pages) for i in range(width)
        ),
    )


def _region_of(first: int, last: int) -> Region:
    return Region(first << PAGE_SHIFT, (last - first) << PAGE_SHIFT)


def _pages_below(merged: Merged, page: int) -> int:
    """Return how many pages below `page` are in a range."""
    at = bisect_right(merged.firsts, page)
    return int(merged.below[at]) - max(0, int(merged.lasts[at - 1]) - page) if at else 0


def _pages_between(merged: Merged, first: int, last: int) -> int:
    """Return how many pages of [first, last) are in a range."""
    return _pages_below(merged, last) - _pages_below(merged, first) if first < last else 0


def _merge_numpy(whole: Sequence[memoryview], count: int) -> Merged | None:
    if count < FAST_FROM:
        return None
    try:
        from khod.trees import merge_numpy  # noqa: PLC0415 - numpy is optional, and slow to import
    except ImportError:
        return None
    if (found := merge_numpy.merge_ranges(whole, PAGE_SHIFT, LONG)) is None:
        return None
    starts, ends, below, hole, size = found
    return Merged(starts, ends, below, hole, size, 0)


def _merge_python(whole: Sequence[memoryview]) -> Merged:
    """Merge without numpy: C code passes over half a million numbers at a time, and lists are dropped when read."""
    numbers = [raw.cast("Q") for raw in whole]
    sizes = list(chain.from_iterable(raw[1::2].tolist() for raw in numbers))
    size = sum(sizes)
    addrs = list(chain.from_iterable(raw[::2].tolist() for raw in numbers))
    lasts = list(map(rshift, map(add, map(add, addrs, sizes), repeat((1 << PAGE_SHIFT) - 1)), repeat(PAGE_SHIFT)))
    del sizes  # half a million numbers are 20 MB
    firsts = list(map(rshift, addrs, repeat(PAGE_SHIFT)))
    del addrs
    beyond = sum(map(gt, lasts, repeat(TOP))) if max(lasts) > TOP else 0
    if beyond:
        lasts = list(map(min, lasts, repeat(TOP)))
    starts, ends = _merge_runs(firsts, lasts)
    holes = array("Q", map(sub, islice(starts, 1, None), ends))
    hole = holes.index(max(holes)) + 1 if holes else 0
    return Merged(starts, ends, array("Q", accumulate(map(sub, ends, starts), initial=0)), hole, size, beyond)


def _merge_runs(firsts: list[int], lasts: list[int]) -> "tuple[array[int], array[int]]":
    """Merge ranges that overlap or touch."""
    low, span = min(firsts), max(lasts) - min(firsts)
    pages = list(map(sub, lasts, firsts))
    if span > SPARSE * len(firsts) or max(pages) > LONG or not all(pages):
        return _merge_sorted(firsts, lasts)
    used = bytearray(span + 2)  # an unused page before and after
    before = low - 1
    for page in range(max(pages)):
        if page:
            longer = list(map(gt, pages, repeat(page)))
            firsts, pages = list(compress(firsts, longer)), list(compress(pages, longer))
        deque(map(used.__setitem__, map(sub, firsts, repeat(before - page)), repeat(1)), maxlen=0)
    del firsts, pages, lasts
    edges = array("Q", compress(range(low, low + span + 1), map(ne, used, islice(used, 1, None))))
    return edges[::2], edges[1::2]


def _merge_sorted(firsts: list[int], lasts: list[int]) -> "tuple[array[int], array[int]]":
    """Merge by sorting starts and ends separately: a new range begins where all earlier ones have ended."""
    firsts.sort()
    lasts.sort()
    apart = list(map(gt, islice(firsts, 1, None), lasts))
    starts, ends = compress(islice(firsts, 1, None), apart), compress(lasts, apart)
    return array("Q", chain(firsts[:1], starts)), array("Q", chain(ends, lasts[-1:]))
