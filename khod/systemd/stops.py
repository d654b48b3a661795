# SPDX-License-Identifier: LGPL-2.1-or-later
"""How long each unit took to stop in the boot before, by the journal: what systemd logs when a job begins and ends.

What systemd promises (sd-messages.h): the MESSAGE_IDs, and in `UNIT` the unit they are about. Entries of PID 1 alone
count: `_PID` is journald's own word, which no other process can forge.
"""

import time
import uuid
from collections.abc import Callable
from dataclasses import field
from datetime import datetime
from typing import Any, Protocol

import systemd.journal

from khod.dataclass import dataclass
from khod.history.model import UnitStop
from khod.text import one_line

UNIT_STOPPING = "de5b426a63be47a7b6ac3eaac82e2f6f"
UNIT_STOPPED = "9d1aaa27d60140bd96365438aad20286"
MAX_MESSAGES = 20_000
READ_SECONDS = 20.0
"""How long the journal may be read; a journal on a slow disk is then left where it is."""
MAX_UNIT_CHARACTERS = 256
MAX_DELAY_SECONDS = 5.0
SILENT_SECONDS = 0.25
"""If the journal ends by more before the shutdown did, that is said."""
NO_BOOT = (
    "How long each unit took to stop is not known: the journal has nothing of the boot before. "
    "It is kept over a boot where /var/log/journal is there (Storage= in journald.conf(5))."
)
NO_STOP = (
    "How long each unit took to stop is not known: the journal of the boot before has no message about it. "
    "Messages of the end of a shutdown are lost where journald ends, or the disk with /var, before it."
)
CUT_OFF = "The messages about stopping units were too many, or read too slowly: the first are shown."


class ShutdownJournal(Protocol):
    """What is used of systemd.journal.Reader."""

    def add_match(self, **match: str) -> None:
        """Show only entries with this value of a field; of one field any of the values."""

    def seek_monotonic(self, monotonic: float, bootid: str) -> None:
        """Go to the entry at this CLOCK_MONOTONIC of a boot."""

    def get_next(self) -> dict[str, Any]:
        """Return the next entry; an empty one at the end."""

    def close(self) -> None:
        """Close the files."""


@dataclass(frozen=True)
class Stops:
    """Each unit's stop, and a sentence for each thing that the journal does not tell."""

    stops: list[UnitStop] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Message:
    stopped: bool
    unit: str
    monotonic: float


def _open_system_journal() -> ShutdownJournal:
    reader: ShutdownJournal = systemd.journal.Reader(systemd.journal.LOCAL_ONLY | systemd.journal.SYSTEM_ONLY)
    return reader


def read_stops(
    boot_id: str,
    since: float,
    until: float,
    open_journal: Callable[[], ShutdownJournal] = _open_system_journal,
    now: Callable[[], float] = time.monotonic,
) -> Stops:
    """Return the stops of units between two instants of a boot (its CLOCK_MONOTONIC); raises OSError.

    A unit of which the journal does not say that it has stopped counts as stopping until `until`. Blocks as long as the
    disk does, and reads for READ_SECONDS at most.
    """
    plain = boot_id.replace("-", "")
    reader = open_journal()
    try:
        reader.add_match(_BOOT_ID=plain, _PID="1")
        for message_id in (UNIT_STOPPING, UNIT_STOPPED):
            reader.add_match(MESSAGE_ID=message_id)
        reader.seek_monotonic(since, plain)
        messages, complete = _read_messages(reader, plain, since, until, now)
    finally:
        reader.close()
    if not messages:
        return Stops(unknown=[NO_STOP if _has_boot(plain, open_journal) else NO_BOOT])
    stops, open_units = _pair_messages(messages, until)
    unknown = [] if complete else [CUT_OFF]
    silent = until - max(message.monotonic for message in messages)
    if silent > SILENT_SECONDS:
        unknown.append(f"The journal of the boot before has no message of the last {silent:.1f} s of its shutdown.")
    if open_units:
        count = f"{open_units} unit" + ("" if open_units == 1 else "s")
        unknown.append(f"The journal does not say when {count} had stopped: the whole shutdown is counted for each.")
    return Stops(stops, unknown)


def _read_messages(
    reader: ShutdownJournal, boot_id: str, since: float, until: float, now: Callable[[], float]
) -> tuple[list[_Message], bool]:
    """Return the messages of that time, and whether these are all."""
    deadline = now() + READ_SECONDS
    messages = list[_Message]()
    for _ in range(MAX_MESSAGES):
        entry = reader.get_next()
        found = _parse_entry(entry, boot_id)
        if not entry or (found is not None and found.monotonic > until):
            return messages, True
        if found is not None and found.monotonic >= since:
            messages.append(found)
        if now() > deadline:
            break
    return messages, False


def _parse_entry(entry: dict[str, Any], boot_id: str) -> _Message | None:
    """Return what an entry says; None if it is of another boot, or has not the fields it should have."""
    at, unit, message_id = entry.get("__MONOTONIC_TIMESTAMP"), entry.get("UNIT"), entry.get("MESSAGE_ID")
    if not isinstance(unit, str) or not isinstance(message_id, uuid.UUID):
        return None
    try:
        monotonic, boot = at[0].total_seconds(), at[1].hex  # type: ignore[index]
    except (TypeError, AttributeError, IndexError):
        return None
    if boot != boot_id or message_id.hex not in (UNIT_STOPPING, UNIT_STOPPED):
        return None
    sent = monotonic - _delay_seconds(entry)
    return _Message(message_id.hex == UNIT_STOPPED, one_line(unit, MAX_UNIT_CHARACTERS), sent)


def _delay_seconds(entry: dict[str, Any]) -> float:
    """Return how long after it was sent journald took a message: the kernel stamps it when it is sent."""
    sent, taken = entry.get("_SOURCE_REALTIME_TIMESTAMP"), entry.get("__REALTIME_TIMESTAMP")
    if not isinstance(sent, datetime) or not isinstance(taken, datetime):
        return 0.0
    delay = (taken - sent).total_seconds()
    return delay if 0 <= delay <= MAX_DELAY_SECONDS else 0.0  # else the wall clock was set meanwhile


def _pair_messages(messages: list[_Message], until: float) -> tuple[list[UnitStop], int]:
    """Return the stops, and of how many units only the begin is known; a stop without a begin took no time."""
    stopping: dict[str, float] = {}
    stops = []
    for message in messages:
        if not message.stopped:
            stopping.setdefault(message.unit, message.monotonic)
        elif message.unit in stopping:
            stops.append(UnitStop(message.unit, stopping.pop(message.unit), message.monotonic))
    stops += [UnitStop(unit, began, until) for unit, began in stopping.items()]
    return stops, len(stopping)


def _has_boot(boot_id: str, open_journal: Callable[[], ShutdownJournal]) -> bool:
    """Whether the journal has any entry of a boot."""
    reader = open_journal()
    try:
        reader.add_match(_BOOT_ID=boot_id)
        reader.seek_monotonic(0.0, boot_id)
        return bool(reader.get_next())
    finally:
        reader.close()
