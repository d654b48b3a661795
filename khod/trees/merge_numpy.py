# SPDX-License-Identifier: LGPL-2.1-or-later
"""The merge of `khod.trees.memory` with numpy, for the hundreds of thousands of ranges of a large trace buffer."""

import os
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # starting its threads would take longer than all of this

import numpy as np

MAP = 1 << 24
"""The maximum span of a map with a byte for each page (64 GiB of memory, 16 MiB here).

Marking pages is ten times as fast as sorting.
"""
Array = Any


def merge_ranges(whole: Sequence[memoryview], shift: int, long: int) -> tuple[Array, Array, Array, int, int] | None:
    """Merge `mem` properties in pages of 1 << shift bytes; return None if a range may exceed 64 bits.

    If a range has more than `long` pages, the ranges are sorted instead of marked. The result is: the first and the
    last page (exclusive) of each merged range, the number of merged pages before each and in total, the index of the
    range after the largest hole (0: none), and the bytes requested.
    """
    count = sum(len(raw) for raw in whole) >> 4
    firsts, lasts = np.empty(count, np.uint64), np.empty(count, np.uint64)
    mask, bits = np.uint64((1 << shift) - 1), np.uint64(shift)
    at = size = 0
    for raw in whole:
        numbers = np.frombuffer(raw, np.uint64)
        addrs, sizes = numbers[::2], numbers[1::2]
        most = int(sizes.max())
        if int(addrs.max()) + most + int(mask) >> 64 or most * count >> 64:
            return None
        size += int(sizes.sum())
        part = slice(at, at := at + len(addrs))
        np.right_shift(addrs, bits, out=firsts[part])
        np.add(addrs, sizes, out=lasts[part])
    lasts += mask
    lasts >>= bits
    starts, ends = _merge_runs(firsts, lasts, long)
    below = np.concatenate((np.zeros(1, np.uint64), (ends - starts).cumsum()))
    hole = int(np.argmax(starts[1:] - ends[:-1])) + 1 if len(starts) > 1 else 0
    return starts, ends, below, hole, size


def _merge_runs(firsts: Array, lasts: Array, long: int) -> tuple[Array, Array]:
    """Merge ranges that overlap or touch."""
    low, high = firsts.min(), lasts.max()
    pages = lasts - firsts
    longest = int(pages.max())
    if int(high - low) > MAP or longest > long or not pages.all():
        return _merge_sorted(firsts, lasts)
    used = np.zeros(int(high - low) + 2, np.bool_)  # an unused page before and after
    firsts -= low
    for page in range(longest):
        if page:
            longer = pages > page
            firsts, pages = firsts[longer], pages[longer]
        firsts += np.uint64(1)
        used[firsts] = True
    edges = np.flatnonzero(used[1:] != used[:-1]).view(np.uint64)
    edges += low
    return edges[::2], edges[1::2]


def _merge_sorted(firsts: Array, lasts: Array) -> tuple[Array, Array]:
    """Merge by sorting starts and ends separately: a new range begins where all earlier ones have ended."""
    if int(lasts.max()) >> 32 == 0:
        firsts, lasts = firsts.astype(np.uint32), lasts.astype(np.uint32)  # half the time to sort
    firsts.sort()
    lasts.sort()
    apart = firsts[1:] > lasts[:-1]
    return np.append(firsts[:1], firsts[1:][apart]), np.append(lasts[:-1][apart], lasts[-1:])
