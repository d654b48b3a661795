# SPDX-License-Identifier: LGPL-2.1-or-later
"""The log of a run: runs/RUN.jsonl, one JSON line for each thing seen, by the khods of both kernels.

A line is written whole or, where the disk is full or khod is killed, cut short: what cannot be read is counted, and the
rest is used. Lines of a kind that a newer khod has added are left out.
"""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from khod import values
from khod.history.model import Arrival, ClockReading, ColdBoot, Departure, RunBegun, RunEnd, RunLog, RunTarget
from khod.model import Check, Event

DIRECTORY = "runs"
MAX_LOG_BYTES = 64 << 20
"""Bytes that are read of one log: a thousand producers write two."""
KEPT_LOGS = 16
MAX_KEPT_ENTRIES = 100_000
MAX_NUMBER = 1 << 63
"""Every number of a log is less, and finite: more is damage, with which nothing can be computed or stored."""
SINGLE = {
    "begun": RunBegun,
    "target": RunTarget,
    "departure": Departure,
    "arrival": Arrival,
    "cold_boot": ColdBoot,
    "end": RunEnd,
}
"""Kinds of which the last line counts: the key of the line and the field of RunLog."""
LISTS = {"event": ("events", Event), "check": ("checks", Check), "reading": ("readings", ClockReading)}
"""Kinds of which every line counts, with their field."""
KINDS: dict[type, str] = {kind: key for key, kind in SINGLE.items()} | {kind: key for key, (_, kind) in LISTS.items()}
Entry = RunBegun | RunTarget | Departure | Arrival | ColdBoot | RunEnd | Event | Check | ClockReading


def log_path(state: Path, run: str) -> Path:
    """Return the path of a run's log below khod's state directory; ValueError where `run` is not a run's id."""
    if not run.isalnum():
        raise ValueError(f"not the id of a run: {run!r}")
    return state / DIRECTORY / f"{run}.jsonl"


def append_entries(path: Path, entries: Iterable[Entry]) -> None:
    """Append a line for each entry: all of them, or none and OSError.

    They are not synced: the jump's own sync does that.
    """
    lines = b"".join(encode_entry(entry) for entry in entries)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":  # the last write was cut short
            lines = b"\n" + lines
        try:
            while lines:
                lines = lines[os.write(fd, lines) :]
        except OSError:  # the disk is full
            os.ftruncate(fd, size)
            raise
    finally:
        os.close(fd)


class LogWriter:
    """Writes the logs below khod's state directory. It is used by one thread.

    Entries that the disk does not take are kept, MAX_KEPT_ENTRIES at most, and written with the next ones.
    """

    def __init__(self, state: Path) -> None:
        self._state = state
        self._kept: dict[str, list[Entry]] = {}

    def append(self, run: str, entries: Iterable[Entry]) -> None:
        """Append to the log of a run, as far as the disk takes it."""
        kept = [*self._kept.pop(run, []), *entries]
        try:
            append_entries(log_path(self._state, run), kept)
        except OSError:
            self._kept[run] = kept[:MAX_KEPT_ENTRIES]

    def finish(self, run: str, entries: Iterable[Entry]) -> list[Entry]:
        """Append as above; return what the log does not have after that, which is then kept no more."""
        self.append(run, entries)
        return self._kept.pop(run, [])


def list_runs(state: Path) -> list[str]:
    """Return the runs that have a log, the oldest first."""
    logs = sorted((state / DIRECTORY).glob("*.jsonl"), key=lambda path: path.stat().st_mtime)
    return [path.stem for path in logs]


def drop_old_logs(state: Path) -> None:
    """Remove all but the KEPT_LOGS newest logs: the attempts made of them are in the database."""
    with suppress(OSError):
        for run in list_runs(state)[:-KEPT_LOGS]:
            log_path(state, run).unlink()


def encode_entry(entry: Entry) -> bytes:
    """Return the line of one entry."""
    return json.dumps({KINDS[type(entry)]: entry}, default=values.encode_value).encode() + b"\n"


def read_log(path: Path) -> RunLog:
    """Read a log; OSError where it cannot be read at all."""
    log = RunLog(run=path.stem)
    with open(path, "rb") as file:
        content = file.read(MAX_LOG_BYTES)
    for line in content.splitlines():
        try:
            _add_line(log, LINES.decode(line.decode()))
        except (ValueError, TypeError, AttributeError, RecursionError):
            log.damaged_lines += bool(line)
    return log


def read_log_with(path: Path, unwritten: Iterable[Entry]) -> RunLog:
    """Read a log, and add entries that the disk did not take; without the file those alone are the log."""
    try:
        log = read_log(path)
    except OSError:
        log = RunLog(run=path.stem)
    return add_entries(log, unwritten)


def add_entries(log: RunLog, entries: Iterable[Entry]) -> RunLog:
    """Add entries to a log that was read, or to an empty one; return it."""
    for entry in entries:
        key = KINDS[type(entry)]
        if key in SINGLE:
            setattr(log, key, entry)
        else:
            getattr(log, LISTS[key][0]).append(entry)
    return log


def _bounded_int(text: str) -> int:
    number = int(text)
    if abs(number) >= MAX_NUMBER:
        raise ValueError("a number that is too large")
    return number


def _bounded_float(text: str) -> float:
    number = float(text)
    if not abs(number) < MAX_NUMBER:  # nor is NaN
        raise ValueError("a number that is not finite, or too large")
    return number


LINES = json.JSONDecoder(parse_int=_bounded_int, parse_float=_bounded_float, parse_constant=_bounded_float)


def _add_line(log: RunLog, line: dict[str, Any]) -> None:
    for key, value in line.items():
        kind = SINGLE.get(key) or LISTS.get(key, ("", None))[1]
        if kind is not None:
            add_entries(log, [values.decode_value(kind, value, may_lack=values.ANY_FIELD)])
