# SPDX-License-Identifier: LGPL-2.1-or-later
"""The journal's lines of one handover, of the kernel before the jump and of the one after it, through journalctl(1).

Lines of one boot are ordered by its monotonic clock, and the first boot's stand before the second's, whatever the wall
clock says: it may have been set back between them.
"""

import json
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from khod.errors import Failed, errno_text
from khod.history.model import AttemptRecord
from khod.text import one_line

UNIT = "kho-handover.service"
HOOK, HOOK_UNIT = "hook", "kho-hook-{}.service"
SLACK_SECONDS = 1.0
"""What the journal's times may differ from khod's: a line is stamped when journald has read it."""
KERNEL = "kernel"
FIELDS = ("MESSAGE", "PRIORITY", "SYSLOG_IDENTIFIER", "_COMM", "_TRANSPORT", "_SOURCE_MONOTONIC_TIMESTAMP")
BYTE_VALUES = range(256)


@dataclass(frozen=True)
class LogLine:
    """One line: `at` is in seconds since the epoch, `monotonic` in seconds of its boot's CLOCK_MONOTONIC.

    `boot` is 1 for the kernel before the jump and 2 for the one after it, `source` is kernel or the program, and
    `priority` that of syslog(3).
    """

    at: float
    monotonic: float
    boot: int
    source: str
    priority: int
    text: str


@dataclass(frozen=True)
class RunLines:
    """All lines of one handover, in order, and the boots of which the journal has none."""

    run: str
    lines: list[LogLine]
    missing: list[int] = field(default_factory=list)


def read_run(attempt: AttemptRecord) -> RunLines:
    """Return the lines of a handover; raise Failed if journalctl cannot be asked."""
    summary = attempt.summary
    boots = [summary.first_boot_id]
    if summary.last_boot_id not in ("", summary.first_boot_id):
        boots.append(summary.last_boot_id)
    hooks = sorted({event.producer.name for event in attempt.events if event.producer and event.producer.kind == HOOK})
    lines, missing = list[LogLine](), list[int]()
    for number, boot_id in enumerate(boots, 1):
        words = match_lines(summary.run, boot_id, hooks)
        if number == 1:
            words.append(f"--since=@{summary.began_at - SLACK_SECONDS:.6f}")
        if number == len(boots):
            words.append(f"--until=@{summary.ended_at + SLACK_SECONDS:.6f}")
        found = sorted(_read_lines(words, number), key=lambda line: line.monotonic)
        lines += found
        if not found:
            missing.append(number)
    return RunLines(summary.run, lines, missing)


def match_lines(run: str, boot_id: str, hooks: Iterable[str]) -> list[str]:
    """Return the words by which journalctl selects the lines of one boot: khod's, its hooks', and the kernel's.

    khod itself writes what hooks print. Their units have what PID 1 says of them, and what their commands log.
    """
    boot = f"_BOOT_ID={boot_id.replace('-', '')}"
    units = [UNIT, *(HOOK_UNIT.format(name.replace("@", "\\x40")) for name in hooks)]
    of_units = (f"{field}={unit}" for unit in units for field in ("_SYSTEMD_UNIT", "UNIT"))
    words = list[str]()
    for match in (f"KHO_RUN={run}", f"_TRANSPORT={KERNEL}", *of_units):
        words += ["+", boot, match]
    return words[1:]


def _read_lines(words: list[str], number: int) -> Iterator[LogLine]:
    for row in _run_journalctl(words).split(b"\n"):
        if row.startswith(b"{"):  # it says "-- No entries --", too
            yield _parse_line(json.loads(row), number)


def _run_journalctl(words: list[str]) -> bytes:
    command = ["journalctl", "--no-pager", "--all", "--output=json", f"--output-fields={','.join(FIELDS)}", *words]
    try:
        ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)  # noqa: S603
    except OSError as error:
        raise Failed(f"journalctl cannot be run: {errno_text(error)}") from None
    if ended.returncode:
        said = one_line(ended.stderr.decode(errors="replace")) or f"journalctl exited with {ended.returncode}"
        raise Failed(f"The journal cannot be read: {said}", remedy="Run it as root, or as a member of systemd-journal.")
    return ended.stdout


def _parse_line(entry: dict[str, Any], number: int) -> LogLine:
    """Convert an entry; a kernel's line has the time at which the kernel wrote it, not that of journald."""
    received, at = int(entry["__MONOTONIC_TIMESTAMP"]), int(entry["__REALTIME_TIMESTAMP"])
    is_kernel = entry.get("_TRANSPORT") == KERNEL
    written = int(entry.get("_SOURCE_MONOTONIC_TIMESTAMP") or received) if is_kernel else received
    source = KERNEL if is_kernel else _text_of(entry.get("SYSLOG_IDENTIFIER") or entry.get("_COMM"))
    return LogLine(
        at=(at - received + written) / 1e6,
        monotonic=written / 1e6,
        boot=number,
        source=source,
        priority=int(entry.get("PRIORITY", 6)),
        text=_text_of(entry.get("MESSAGE")),
    )


def _text_of(value: Any) -> str:
    """Return a field's text: journalctl prints what is not UTF-8 as a list of bytes, and a repeated field as a list."""
    if isinstance(value, list) and all(isinstance(item, int) and item in BYTE_VALUES for item in value):
        return bytes(value).decode(errors="surrogateescape")
    if isinstance(value, list):
        return _text_of(value[0])
    return "" if value is None else str(value)
