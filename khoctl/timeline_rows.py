# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rows of a timeline that are drawn."""

import math
from dataclasses import dataclass, replace

from khoctl.figures import format_seconds
from khod.history.model import Timeline, TimelineRow

MAX_CHILDREN = 8
"""The rows drawn below one parent: the slowest; the others share a row."""
ROUNDING_SECONDS = 1e-6
"""A child may seem to begin so much before its parent."""
NO_PARENT = -1


@dataclass(frozen=True)
class DrawnRow:
    """One row, and the time that is written to it."""

    row: TimelineRow
    time: str


def known_rows(timeline: Timeline) -> list[TimelineRow]:
    """Return the rows whose numbers are finite: a database from elsewhere may have others."""
    return [row for row in timeline.rows if all(map(math.isfinite, (row.begin, row.seconds, row.error_seconds)))]


def select_rows(rows: list[TimelineRow]) -> list[DrawnRow]:
    """Return what is drawn: each parent, then its MAX_CHILDREN slowest children, then all its others in one row.

    A step that was tried twice has two rows: a child belongs to the last one that began before it. A row whose parent
    is missing is drawn as a parent.
    """
    parents = [row for row in rows if not row.parent]
    children: dict[int, list[TimelineRow]] = {}
    for row in rows:
        if row.parent:
            children.setdefault(_find_parent(row, parents), []).append(row)
    drawn = [_draw_own(row) for row in children.get(NO_PARENT, [])]
    for number, parent in enumerate(parents):
        drawn += [_draw_own(parent), *_select_children(children.get(number, []))]
    return drawn


def _find_parent(child: TimelineRow, parents: list[TimelineRow]) -> int:
    named = [number for number, parent in enumerate(parents) if parent.name == child.parent]
    before = [number for number in named if parents[number].begin <= child.begin + ROUNDING_SECONDS]
    return [NO_PARENT, *named[:1], *before][-1]


def _select_children(children: list[TimelineRow]) -> list[DrawnRow]:
    slowest = sorted(children, key=lambda row: row.seconds, reverse=True)
    shown, others = slowest[:MAX_CHILDREN], slowest[MAX_CHILDREN:]
    drawn = [_draw_own(row) for row in sorted(shown, key=lambda row: row.begin)]
    if others:
        begin = min(row.begin for row in others)
        end = max(row.begin + row.seconds for row in others)
        span = replace(others[0], name=f"{len(others)} more", begin=begin, seconds=end - begin, error_seconds=0.0)
        drawn.append(DrawnRow(replace(span, detail=""), f"≤ {format_seconds(others[0].seconds)}"))
    return drawn


def _draw_own(row: TimelineRow) -> DrawnRow:
    return DrawnRow(row, format_seconds(row.seconds, row.error_seconds))
