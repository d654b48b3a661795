# SPDX-License-Identifier: LGPL-2.1-or-later
"""How the boots before this one ended, as far as the journal kept them: in order, or cut off.

What systemd promises (sd-messages.h): the MESSAGE_IDs. journald writes its last entry when systemd-shutdown ends it,
after every unit has stopped and before the disks are unmounted; so nothing of the jump itself is in a journal.
"""

import re
from collections.abc import Callable
from datetime import datetime
from typing import Any, Protocol

import systemd.journal

from khod.dataclass import dataclass
from khod.kernel.mark import run_mark
from khod.text import one_line

JOURNAL_STOPPED = "d93fb3c9c24d451a97cea615ce59c00b"
UNIT_STARTED = "39f53479d3a045ac8e11786248231fbf"
TARGETS = ("kexec.target", "reboot.target", "poweroff.target", "halt.target", "soft-reboot.target")
MAX_BOOTS = 4
"""How many boots back the search goes."""
MAX_LAST = 200
"""The number of entries, from the end of a boot, among which its end is looked for."""
MAX_FIRST = 50
"""The number of the kernel's first entries among which its release and its command line are looked for."""
MAX_BACK = 8
"""Entries that the first step back from the begin of a boot may still find in that boot."""
MAX_CHARACTERS = 120
RELEASE = re.compile(r"Linux version (?P<release>\S+)")
CMDLINE = re.compile(r"(?:Kernel c|C)ommand line: (?P<cmdline>.*)")
Entry = dict[str, Any]


class JournalReader(Protocol):
    """What is used of systemd.journal.Reader."""

    def add_match(self, **match: str) -> None:
        """Show only entries with this value of a field."""

    def flush_matches(self) -> None:
        """Show every entry again."""

    def seek_head(self) -> None:
        """Go before the first entry."""

    def seek_tail(self) -> None:
        """Go behind the last entry."""

    def seek_cursor(self, cursor: str, /) -> None:
        """Go to the entry with this cursor."""

    def get_next(self) -> Entry:
        """Return the next entry; an empty one at the end."""

    def get_previous(self) -> Entry:
        """Return the entry before; an empty one at the begin."""

    def close(self) -> None:
        """Close the files."""


@dataclass(frozen=True)
class BootEnd:
    """The end of one boot: when its journal ends (seconds since the epoch), and with which message.

    `in_order` says whether journald was ended by a shutdown. `target` is the target that the shutdown reached
    (kexec.target, reboot.target, …), "" if none is among the last entries. `release` is the kernel's, `run` the
    handover that led to this boot by the mark on its command line; "" where the journal does not have them.
    """

    boot_id: str
    last_at: float
    last_message: str
    in_order: bool
    target: str = ""
    release: str = ""
    run: str = ""


def read_boot_ends(
    here: str, until: str, open_journal: Callable[[], JournalReader] = systemd.journal.Reader
) -> list[BootEnd]:
    """Return how the boots before the boot `here` ended, the last one first, back to the boot `until`.

    At most MAX_BOOTS. An empty list if the journal does not have them, as where it is volatile. Blocks as long as the
    disk does; raises OSError.
    """
    reader = open_journal()
    try:
        found: list[BootEnd] = []
        at = here
        while len(found) < MAX_BOOTS and _plain(at) != _plain(until) and (at := _boot_before(reader, at)):
            found.append(_read_end(reader, at))
        return found
    finally:
        reader.close()


def _plain(boot_id: str) -> str:
    """Return a boot id as the journal has it, without dashes."""
    return boot_id.replace("-", "")


def _boot_before(reader: JournalReader, boot_id: str) -> str:
    """Return the id of the boot before this one, "" if there is none, or if this one is not in the journal."""
    _match_boot(reader, boot_id)
    reader.seek_head()
    first = reader.get_next()
    reader.flush_matches()
    if not first:
        return ""
    reader.seek_cursor(first["__CURSOR"])
    for _step in range(MAX_BACK):
        entry = reader.get_previous()
        if not entry:
            break
        if (found := _text(entry, "_BOOT_ID")) != _plain(boot_id):
            return found
    return ""


def _match_boot(reader: JournalReader, boot_id: str, **also: str) -> None:
    reader.flush_matches()
    reader.add_match(_BOOT_ID=_plain(boot_id), **also)


def _read_end(reader: JournalReader, boot_id: str) -> BootEnd:
    _match_boot(reader, boot_id)
    reader.seek_tail()
    last: list[Entry] = []
    while len(last) < MAX_LAST and (entry := reader.get_previous()):
        last.append(entry)
    started = [_text(entry, "UNIT") for entry in last if _text(entry, "MESSAGE_ID") == UNIT_STARTED]
    _match_boot(reader, boot_id, _TRANSPORT="kernel")
    reader.seek_head()
    first: list[str] = []
    while len(first) < MAX_FIRST and (entry := reader.get_next()):
        first.append(_text(entry, "MESSAGE"))
    reader.flush_matches()
    return BootEnd(
        boot_id=boot_id,
        last_at=_realtime(last[0]) if last else 0.0,
        last_message=one_line(_text(last[0], "MESSAGE"), MAX_CHARACTERS) if last else "",
        in_order=bool(last) and _text(last[0], "MESSAGE_ID") == JOURNAL_STOPPED,
        target=next((unit for unit in started if unit in TARGETS), ""),
        release=_first_match(RELEASE, "release", first),
        run=run_mark(_first_match(CMDLINE, "cmdline", first)),
    )


def _first_match(pattern: re.Pattern[str], group: str, lines: list[str]) -> str:
    return next((found[group] for line in lines if (found := pattern.match(line))), "")


def _text(entry: Entry, field: str) -> str:
    """Return a field as text: the reader makes ids of some, bytes of what is not UTF-8, and lists of repeated ones."""
    value = entry.get(field, "")
    if isinstance(value, list):
        value = value[0] if value else ""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    found: str = getattr(value, "hex", None) or str(value)
    return found


def _realtime(entry: Entry) -> float:
    at = entry.get("__REALTIME_TIMESTAMP")
    return at.timestamp() if isinstance(at, datetime) else 0.0
