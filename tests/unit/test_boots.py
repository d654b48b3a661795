# SPDX-License-Identifier: LGPL-2.1-or-later
"""How boots ended, from a journal in a list; tests/lab/test_assessment.py reads a real one."""

import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from khod.systemd.boots import JOURNAL_STOPPED, MAX_BOOTS, UNIT_STARTED, BootEnd, read_boot_ends

Entry = dict[str, Any]
BOOTS = [uuid.UUID(int=number + 1) for number in range(9)]
AT = datetime(2026, 11, 26, 12, tzinfo=UTC)


def boot(number: int, *entries: Entry) -> list[Entry]:
    """The entries of one boot: journald reads the kernel's first."""
    return [{"_BOOT_ID": BOOTS[number], "__REALTIME_TIMESTAMP": AT, **entry} for entry in entries]


def kernel(text: str) -> Entry:
    return {"_TRANSPORT": "kernel", "MESSAGE": text}


def started(unit: str) -> Entry:
    return {"MESSAGE_ID": uuid.UUID(UNIT_STARTED), "UNIT": unit, "MESSAGE": f"Reached target {unit}."}


STOPPED: Entry = {"MESSAGE_ID": uuid.UUID(JOURNAL_STOPPED), "MESSAGE": "Journal stopped"}


class Journal:
    """A journal in a list, read as sd_journal_seek_cursor(3) and its like say."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = [{**entry, "__CURSOR": str(at)} for at, entry in enumerate(entries)]
        self.match: dict[str, str] = {}
        self.at = 0.0
        self.closed = False

    def add_match(self, **match: str) -> None:
        self.match |= match

    def flush_matches(self) -> None:
        self.match = {}

    def seek_head(self) -> None:
        self.at = -0.5

    def seek_tail(self) -> None:
        self.at = len(self.entries) - 0.5

    def seek_cursor(self, cursor: str, /) -> None:
        self.at = int(cursor) + 0.5  # the step back finds the entry itself

    def _matches(self, entry: Entry) -> bool:
        return all(getattr(entry.get(key), "hex", entry.get(key)) == value for key, value in self.match.items())

    def get_next(self) -> Entry:
        return self._go(entry for entry in self.entries if int(entry["__CURSOR"]) > self.at)

    def get_previous(self) -> Entry:
        return self._go(entry for entry in reversed(self.entries) if int(entry["__CURSOR"]) < self.at)

    def _go(self, ahead: Any) -> Entry:
        found: Entry = next((entry for entry in ahead if self._matches(entry)), {})
        if found:
            self.at = int(found["__CURSOR"])
        return found

    def close(self) -> None:
        self.closed = True


def ends(entries: Sequence[Entry], here: int, until: int) -> list[BootEnd]:
    journal = Journal(entries)
    found = read_boot_ends(str(BOOTS[here]), str(BOOTS[until]), lambda: journal)
    assert journal.closed
    return found


HERE = boot(2, kernel("Linux version 7.3.4 (lab)"))
BEFORE = boot(0, kernel("Linux version 7.3.4 (lab)"), kernel("Command line: kho=on"))


def test_a_shutdown_into_the_kexec_ends_in_order() -> None:
    entries = [*BEFORE, *boot(0, started("kexec.target"), {"MESSAGE": "Shutting down."}, STOPPED), *HERE]
    (found,) = ends(entries, 2, 0)
    assert (found.boot_id, found.in_order, found.target) == (BOOTS[0].hex, True, "kexec.target")
    assert (found.release, found.run, found.last_message) == ("7.3.4", "", "Journal stopped")
    assert found.last_at == AT.timestamp()


def test_a_journal_without_its_last_entry_was_cut_off() -> None:
    (found,) = ends([*BEFORE, *boot(0, {"MESSAGE": "in the\nmiddle\x1b"}), *HERE], 2, 0)
    assert (found.in_order, found.target, found.last_message) == (False, "", "in the middle?")


def test_a_journald_that_was_restarted_in_between_is_no_shutdown() -> None:
    (found,) = ends([*BEFORE, *boot(0, STOPPED, {"MESSAGE": "later"}), *HERE], 2, 0)
    assert not found.in_order


def test_a_next_kernel_that_ran_is_found_between_the_two() -> None:
    line = "Command line: kho=on khod.run=0123456789ab"
    between = boot(1, kernel("Linux version 7.2.12 (x)"), kernel(line), {"MESSAGE": "up"})
    found = ends([*BEFORE, *boot(0, STOPPED), *between, *HERE], 2, 0)
    assert [(end.boot_id, end.in_order) for end in found] == [(BOOTS[1].hex, False), (BOOTS[0].hex, True)]
    assert (found[0].release, found[0].run) == ("7.2.12", "0123456789ab")


def test_the_search_has_an_end() -> None:
    entries = [entry for number in range(9) for entry in boot(number, {"MESSAGE": "up"})]
    assert len(ends(entries, 8, 0)) == MAX_BOOTS


def test_a_volatile_journal_has_nothing() -> None:
    assert ends(HERE, 2, 0) == []
    assert ends([], 2, 0) == [], "nor has one that does not know this boot"


def test_an_entry_without_fields_is_read_too() -> None:
    (found,) = ends([*boot(0, {"MESSAGE": b"\xff", "UNIT": ["a", "b"], "__REALTIME_TIMESTAMP": None}), *HERE], 2, 0)
    assert (found.last_at, found.in_order) == (0.0, False)
