# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rows of a timeline that are drawn."""

import math
from dataclasses import dataclass, replace

from khoctl.figures import format_seconds
from khod.history.model import Timeline, TimelineRow

MAX_CHILDREN = 8
"""The rows drawn below one parent: the slowest; the others share a row."""


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

    A row whose parent is missing is drawn as a parent.
    """
    parents = {row.name for row in rows if not row.parent}
    drawn = []
    for row in rows:
        if row.parent not in parents:
            drawn.append(_draw_own(row))
            drawn += [] if row.parent else _select_children([child for child in rows if child.parent == row.name])
    return drawn


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
