# SPDX-License-Identifier: LGPL-2.1-or-later
"""An attempt as Chrome trace JSON ("Trace Event Format"), which https://ui.perfetto.dev and chrome://tracing open.

The rows of the timeline are complete events (`ph` is X). A track of the handover has the rows of khod, systemd and the
kernels; each producer and each unit has a track of its own. Viewers accept events of one track only where they lie one
after the other or one within the other, so both ends of a row are rounded, not its length.
"""

import json
from collections.abc import Iterator
from typing import Any

from khoctl.timeline_rows import known_rows
from khod.history.model import AttemptRecord, RowKind, TimelineRow

MICROSECONDS = 1_000_000
HANDOVER, TIMELINE = 1, "timeline"
"""The group and the track of everything else."""
GROUPS = {RowKind.producer: (2, "producers"), RowKind.unit: (3, "units")}
"""The number and the name of the group of tracks (a process of the trace), for kinds with a track for each name."""
Track = tuple[int, str]
"""A group of tracks, and the name of a track in it."""


def write_trace(attempt: AttemptRecord) -> str:
    """Return the trace; its time 0 is the begin of the first row, `otherData.first_freeze_us` that of the blackout."""
    rows = known_rows(attempt.timeline)
    origin = min((row.begin for row in rows), default=0.0)
    tracks = dict.fromkeys([(HANDOVER, TIMELINE), *map(_find_track, rows)])
    threads = {track: number for number, track in enumerate(tracks, 1)}
    trace = {
        "displayTimeUnit": "ms",
        "otherData": {
            "run": attempt.summary.run,
            "outcome": attempt.summary.outcome.name,
            "from": attempt.summary.from_release,
            "to": attempt.summary.to_release,
            "first_freeze_us": round(-origin * MICROSECONDS),
        },
        "traceEvents": [
            *_name_tracks(f"handover {attempt.summary.run}", threads),
            *(_trace_row(row, origin, threads[_find_track(row)]) for row in rows),
        ],
    }
    return json.dumps(trace) + "\n"


def _find_track(row: TimelineRow) -> Track:
    return (GROUPS[row.kind][0], row.name) if row.kind in GROUPS else (HANDOVER, TIMELINE)


def _name_tracks(title: str, threads: dict[Track, int]) -> Iterator[dict[str, Any]]:
    """Return the metadata events that name the groups and the tracks in them."""
    for group, name in ((HANDOVER, title), *GROUPS.values()):
        yield {"ph": "M", "name": "process_name", "pid": group, "tid": 0, "args": {"name": name}}
        yield {"ph": "M", "name": "process_sort_index", "pid": group, "tid": 0, "args": {"sort_index": group}}
    for (group, name), thread in threads.items():
        yield {"ph": "M", "name": "thread_name", "pid": group, "tid": thread, "args": {"name": name}}


def _trace_row(row: TimelineRow, origin: float, thread: int) -> dict[str, Any]:
    begin = round((row.begin - origin) * MICROSECONDS)
    end = round((row.begin + row.seconds - origin) * MICROSECONDS)
    return {
        "ph": "X",
        "name": f"{row.parent}: {row.name}" if row.kind is RowKind.producer else row.name,
        "cat": row.kind.name,
        "pid": _find_track(row)[0],
        "tid": thread,
        "ts": begin,
        "dur": max(0, end - begin),
        "args": {"error_seconds": row.error_seconds, "detail": row.detail},
    }
