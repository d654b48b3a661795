# SPDX-License-Identifier: LGPL-2.1-or-later
"""Draw a timeline in the terminal: a line for each row, with its begin, its duration and a bar."""

from collections.abc import Iterable, Iterator

from khoctl.figures import format_seconds
from khoctl.layout import fit_page
from khoctl.standstills import describe_standstills
from khoctl.timeline_rows import known_rows, select_rows
from khod.history.model import ClockSource, RowKind, Timeline, TimelineRow
from khod.text import printable, shorten

DEFAULT_WIDTH = 80
"""Columns where the output is not a terminal."""
MIN_BAR, MIN_NAME = 10, 20
MAX_NAME = 44
"""Columns of a bar and of a name; what is left of a line after a name is the bar's."""
TIME_COLUMNS = 11
PART, CHILD, WAIT = "#", "=", "."
"""What the bars are made of."""
SOURCES = {ClockSource.tsc: "the TSC", ClockSource.ptp: "a PTP clock", ClockSource.wall: "the wall clock"}
NO_ROWS = "Nothing is known of its times."
STOPPED = "Producers were stopped, from `freeze` until they had answered `restore`:"


def draw_timeline(timeline: Timeline, width: int | None = None) -> Iterator[str]:
    """Yield the lines of a timeline, none of them longer than `width` columns."""
    width = width or DEFAULT_WIDTH
    yield from _wrap([_describe_blackout(timeline)], width)
    if not timeline.rows:
        yield NO_ROWS
    else:
        yield ""
        yield from _draw_rows(timeline, width)
    if timeline.standstills:
        yield ""
        yield from _wrap([STOPPED, *(f"  {line}" for line in describe_standstills(timeline.standstills))], width)
    notes = [f"systemd-analyze time: {printable(line)}" for line in timeline.analyze.splitlines()]
    notes += [f"Not known: {printable(sentence)}" for sentence in timeline.unknown]
    if notes:
        yield ""
        yield from _wrap(notes, width)


def _describe_blackout(timeline: Timeline) -> str:
    if timeline.blackout_seconds is None:
        return "Blackout: not known."
    measured = format_seconds(timeline.blackout_seconds, timeline.error_seconds)
    by = f", bridged by {SOURCES[timeline.source]}" if timeline.source else ""
    return f"Blackout: {measured}, from the first `freeze` to the last `finish`{by}."


def _draw_rows(timeline: Timeline, width: int) -> Iterator[str]:
    """Yield the rows with a head; the rows within another one follow it, the slowest of them alone."""
    drawn = [one.row for one in select_rows(known_rows(timeline))]
    shown = [(row, f"{'  ' if row.parent else ''}{_name_row(row)}") for row in drawn]
    left = width - 2 * TIME_COLUMNS - 4
    name_columns = max(MIN_NAME, min(MAX_NAME, max([len(name) for _, name in shown] + [0]), left - MIN_BAR - 2))
    bar_columns = left - name_columns - 2
    total = max([row.begin + row.seconds for row in drawn if not row.parent] + [0.0])
    yield f"{'begin':>{TIME_COLUMNS}}  {'duration':>{TIME_COLUMNS}}"
    for row, name in shown:
        yield _draw_row(row, shorten(name, name_columns).ljust(name_columns), bar_columns, total)


def _name_row(row: TimelineRow) -> str:
    error = format_seconds(row.seconds, row.error_seconds).partition("± ")[2]
    name = printable(row.name) + (f" (± {error})" if error else "")
    return name + (f": {printable(row.detail)}" if row.detail else "")


def _draw_row(row: TimelineRow, name: str, columns: int, total: float) -> str:
    times = f"{row.begin:>{TIME_COLUMNS - 2}.3f} s  {row.seconds:>{TIME_COLUMNS - 2}.3f} s"
    bar = _draw_bar(row, columns, total) if columns >= MIN_BAR else ""
    return f"{times}  {name}  {bar}".rstrip()


def _draw_bar(row: TimelineRow, columns: int, total: float) -> str:
    """Return a bar on the scale of the blackout; a row before the first `freeze` has none."""
    if row.begin < 0 or total <= 0:
        return ""
    first = min(columns - 1, int(row.begin / total * columns))
    last = min(columns, max(first + 1, round((row.begin + row.seconds) / total * columns)))
    mark = WAIT if row.kind is RowKind.wait else CHILD if row.parent else PART
    return " " * first + mark * (last - first)


def _wrap(lines: Iterable[str], width: int) -> Iterator[str]:
    for line in lines:
        yield from fit_page(line, width).split("\n")
