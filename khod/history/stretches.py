# SPDX-License-Identifier: LGPL-2.1-or-later
"""Lay stretches of time end to end, in whole microseconds, so that they add up exactly."""

from collections.abc import Iterable

from khod.dataclass import dataclass
from khod.history.model import RowKind, TimelineRow

MICROSECONDS = 10**6


@dataclass(frozen=True)
class Stretch:
    """One row from `begin` to `end`, in seconds of the first kernel's CLOCK_MONOTONIC."""

    kind: RowKind
    name: str
    begin: float
    end: float
    error_seconds: float = 0.0
    parent: str = ""
    detail: str = ""


class Chain:
    """Rows without a gap and without an overlap; times are counted from `zero`."""

    def __init__(self, zero: float) -> None:
        self._zero = zero
        self._reached = 0
        self.rows: list[TimelineRow] = []

    @property
    def reached(self) -> float:
        """Up to which instant there are rows."""
        return self._zero + self._reached / MICROSECONDS

    @property
    def seconds(self) -> float:
        """What the rows from 0 on add up to."""
        return self._reached / MICROSECONDS

    def append(self, stretch: Stretch, children: Iterable[Stretch] = ()) -> None:
        """Append a row and those that lie in it; a wait fills the gap before it, and what overlaps is cut off.

        A stretch that lies within what there are rows for is left out.
        """
        end = self._count(stretch.end)
        begin = min(self._count(stretch.begin), end)
        if end <= self._reached:
            return
        if begin > self._reached:
            self._add(RowKind.wait, f"until {stretch.name}", self._reached, begin)
        begin = max(begin, self._reached)
        self._add(stretch.kind, stretch.name, begin, end, stretch)
        self._reached = end
        for child in children:
            self.add_inside(child, begin, end)

    def add_before(self, stretch: Stretch, children: Iterable[Stretch] = ()) -> None:
        """Add a row of the time before 0, where rows may have gaps between them."""
        begin, end = self._count(stretch.begin), min(self._count(stretch.end), 0)
        if end > begin:
            self._add(stretch.kind, stretch.name, begin, end, stretch)
            for child in children:
                self.add_inside(child, begin, end)

    def add_inside(self, child: Stretch, begin: int, end: int) -> None:
        """Add a row that lies in another one; what stands out is cut off."""
        first, last = max(self._count(child.begin), begin), min(self._count(child.end), end)
        if first <= last:
            self._add(child.kind, child.name, first, last, child)

    def _count(self, instant: float) -> int:
        return round((instant - self._zero) * MICROSECONDS)

    def _add(self, kind: RowKind, name: str, begin: int, end: int, stretch: Stretch | None = None) -> None:
        error, parent, detail = (stretch.error_seconds, stretch.parent, stretch.detail) if stretch else (0.0, "", "")
        seconds = (end - begin) / MICROSECONDS
        self.rows.append(TimelineRow(kind, name, begin / MICROSECONDS, seconds, error, parent, detail))
