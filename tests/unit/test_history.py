# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the history database remembers of attempts and of images, and what it forgets."""

import dataclasses
import json
import sqlite3
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from khod.errors import Failed, UsageError
from khod.history import tables
from khod.history.database import DAMAGED, Bounds, Database
from khod.history.documents import (
    MAX_DOCUMENT_BYTES,
    DamagedDocument,
    decode_document,
    encode_document,
    encode_summary,
    row_digest,
)
from khod.history.model import AttemptRecord, ColdBoot
from khod.history.opening import open_database, open_for_reading
from khod.history.trial import counts_against_image, trial_digest
from khod.model import Event, EventKind, Finding, FindingSeverity, FindingSource, Phase
from khod.values import encode_value
from tests.unit.histories import INITRD, KERNEL, attempt, degraded, opened, run_of

LARGE = Bounds(10_000, 10_000, 1 << 30)
PAIR = trial_digest([KERNEL, INITRD])


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return opened(tmp_path / "history.db")


def runs(database: Database) -> list[str]:
    return [summary.run for summary in database.list_attempts()]


def test_an_attempt_comes_back_as_it_was(database: Database) -> None:
    for made in (attempt(1), attempt(2, Phase.cold_boot, reason='<b>"\x1b[2J\n\udc80', events=1000)):
        database.add_attempt(made)
        assert database.read_attempt(made.summary.run) == made
        assert database.list_attempts()[0] == made.summary


def test_a_late_producer_corrects_its_attempt_in_place(database: Database) -> None:
    for number in (1, 2):
        database.add_attempt(attempt(number))
    database.add_attempt(degraded(1, Finding.of_producer("db", "too late")))
    assert runs(database) == [run_of(2), run_of(1)]
    assert database.read_attempt(run_of(1)).summary.outcome is Phase.degraded
    # both were reported, and a counter that falls would read as a restart
    assert database.count_outcomes() == {Phase.verified: 2, Phase.degraded: 1}
    database.add_attempt(degraded(1, Finding.of_producer("db", "too late")))
    assert database.count_outcomes() == {Phase.verified: 2, Phase.degraded: 1}


def test_the_list_comes_in_pages(database: Database) -> None:
    for number in range(7):
        database.add_attempt(attempt(number))
    pages, before = [], ""
    while page := database.list_attempts(before, 3):
        pages.append([summary.run for summary in page])
        before = page[-1].run
    assert pages == [[run_of(n) for n in numbers] for numbers in ([6, 5, 4], [3, 2, 1], [0])]
    assert database.list_attempts("no such run", 3) == []


def test_a_beginning_names_a_run(database: Database) -> None:
    with pytest.raises(UsageError, match="no attempt yet"):
        database.resolve_run()
    for run in ("ab12", "ab13", "ab1", "c"):
        made = attempt(1)
        database.add_attempt(replace(made, summary=replace(made.summary, run=run)))
    assert database.resolve_run() == "c"
    assert database.resolve_run("ab12") == "ab12"
    assert database.resolve_run("ab1") == "ab1"  # a run that also begins others is itself
    for name, named in (("ab", ("ab12", "ab13", "ab1")), ("%", ()), ("_", ()), ("x", ())):
        with pytest.raises(UsageError) as caught:
            database.resolve_run(name)
        assert all(candidate in str(caught.value) for candidate in named)


def test_the_bounds_keep_the_newest(database: Database) -> None:
    for number in range(10):
        database.add_attempt(attempt(number), replace(LARGE, keep=3))
    assert runs(database) == [run_of(number) for number in (9, 8, 7)]
    database.add_attempt(attempt(10), replace(LARGE, days=1))  # 8 and 7 ended more than a day before
    assert runs(database) == [run_of(10), run_of(9)]
    database.add_attempt(attempt(11), replace(LARGE, max_bytes=1))
    assert runs(database) == [run_of(11)]
    assert database.count_outcomes() == {Phase.verified: 12}


def test_the_bytes_stay_within_their_bound(tmp_path: Path) -> None:
    database = opened(tmp_path / "history.db")
    large = 400_000
    for number in range(40):
        made = replace(attempt(number), trees=[f"{number * at}" for at in range(5_000)])
        database.add_attempt(made, replace(LARGE, max_bytes=large))
    assert (tmp_path / "history.db").stat().st_size < large + 100_000  # one attempt is written before one is removed
    assert 1 < len(runs(database)) < 40
    assert runs(database)[0] == run_of(39)


def test_a_clock_that_was_wrong_does_not_reorder(database: Database) -> None:
    for number, at in enumerate((5e9, 0.0, -1.0)):
        made = attempt(number)
        database.add_attempt(replace(made, summary=replace(made.summary, began_at=at, ended_at=at)))
    assert runs(database) == [run_of(2), run_of(1), run_of(0)]


def found_wrong(database: Database, number: int) -> str:
    """What is said of an attempt whose row is damaged, whether or not its document can be read."""
    try:
        found = database.read_attempt(run_of(number))
    except Failed as error:
        return str(error)
    return f"{found.summary.run}: {found.damage}" if DAMAGED in found.damage else ""


def damage(path: Path, column: str, value: object, number: int) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute(f"UPDATE attempts SET {column} = ? WHERE run = ?", (value, run_of(number)))
    connection.close()


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("digest", b"\0" * 32),
        ("digest", "text"),
        ("document", b"{}"),
        ("document", b"\x78\x9c no stream"),
        ("document", b""),
        ("document", "text"),
        ("document", 7),
        ("summary", b"{}"),
        ("summary", b"[" * 100_000),
        ("summary", 1.5),
    ],
)
def test_a_damaged_row_is_named_and_the_others_are_readable(tmp_path: Path, column: str, value: object) -> None:
    database = opened(tmp_path / "history.db")
    for number in range(3):
        database.add_attempt(attempt(number))
    damage(tmp_path / "history.db", column, value, 1)
    assert [(summary.run, summary.damage) for summary in database.list_attempts()] == [
        (run_of(2), ""),
        (run_of(1), DAMAGED),
        (run_of(0), ""),
    ]
    assert run_of(1) in found_wrong(database, 1)
    assert database.read_attempt(run_of(0)) == attempt(0)


def test_the_chain_ends_at_a_cold_boot(database: Database) -> None:
    for number in range(4):
        database.add_attempt(attempt(number))
    database.add_attempt(attempt(4, Phase.cold_boot))  # to boot 5
    database.add_attempt(attempt(5, Phase.idle))  # rolled back
    for number in (5, 6, 7):
        database.add_attempt(attempt(number) if number > 5 else replace_run(attempt(5), "again"))
    assert [summary.first_boot_id for summary in database.read_chain("boot-8")] == ["boot-7", "boot-6", "boot-5"]
    assert database.read_chain() == database.read_chain("boot-8")
    assert len(database.read_chain("boot-4")) == 4
    assert database.read_chain("boot-5") == []
    assert database.read_chain("another") == []


def test_a_chain_that_bites_its_tail_ends(database: Database) -> None:
    made = attempt(1)
    database.add_attempt(replace(made, summary=replace(made.summary, first_boot_id="x", last_boot_id="x")))
    assert len(database.read_chain("x")) == 1


def replace_run(made: AttemptRecord, run: str) -> AttemptRecord:
    return replace(made, summary=replace(made.summary, run=run))


def test_failures_count_until_a_verified_handover_or_an_acknowledgement(database: Database) -> None:
    assert database.read_trial(PAIR).failures == 0
    for number in (1, 2):
        database.add_attempt(attempt(number, Phase.cold_boot, reason=f"reset {number}"))
    trial = database.read_trial(PAIR)
    assert (trial.failures, trial.run, trial.reason, trial.verified) == (2, run_of(2), "reset 2", False)
    assert trial.at == attempt(2).summary.ended_at
    database.add_attempt(attempt(3))
    assert database.read_trial(PAIR).failures == 0
    assert database.read_trial(PAIR).verified
    database.add_attempt(attempt(4, Phase.cold_boot))
    assert database.read_trial(PAIR).failures == 1
    assert database.acknowledge(run_of(4), 1.0, "root") == [run_of(4)]
    assert database.read_trial(PAIR).failures == 0
    database.add_attempt(attempt(4, Phase.cold_boot))  # written again: it stays acknowledged
    assert database.read_trial(PAIR).failures == 0
    database.add_attempt(attempt(5, Phase.cold_boot))
    assert database.read_trial(PAIR).failures == 1


def test_what_bars_an_image_outlives_the_attempt(database: Database) -> None:
    database.add_attempt(attempt(1, Phase.cold_boot))
    for number in range(2, 6):
        database.add_attempt(attempt(number, Phase.idle), replace(LARGE, keep=1))
    assert database.read_trial(PAIR).run == run_of(1)


def test_a_corrected_verdict_no_longer_counts(database: Database) -> None:
    database.add_attempt(degraded(1, Finding("", "nothing"), arrived=()))
    assert database.read_trial(PAIR).failures == 1
    database.add_attempt(degraded(1, Finding.of_producer("db", "gone")))
    assert database.read_trial(PAIR).failures == 0


@pytest.mark.parametrize("name", [run_of(1), run_of(1)[:6], PAIR, PAIR[:6], KERNEL.digest, INITRD.digest[:8]])
def test_an_image_is_acknowledged_by_any_of_its_names(database: Database, name: str) -> None:
    database.add_attempt(attempt(1, Phase.cold_boot))
    database.add_attempt(attempt(2, Phase.cold_boot))
    assert database.acknowledge(name, 1.0, "root") == [run_of(2), run_of(1)]


@pytest.mark.parametrize("name", ["", "5", run_of(1)[:5], "ff" * 32, "%%%%%%"])
def test_what_names_no_barred_image_is_refused(database: Database, name: str) -> None:
    database.add_attempt(attempt(1, Phase.cold_boot))
    with pytest.raises(UsageError):
        database.acknowledge(name, 1.0, "root")
    assert database.read_trial(PAIR).failures == 1


def test_a_broken_initrd_does_not_bar_its_kernel_with_another_one(database: Database) -> None:
    broken = replace(INITRD, digest="bb" * 32)
    database.add_attempt(attempt(1, Phase.cold_boot, images=(KERNEL, broken)))
    assert database.read_trial(trial_digest([KERNEL, broken])).failures == 1
    assert database.read_trial(PAIR).failures == 0


CONTENT = Finding("", "differs", FindingSource.content, "file", FindingSeverity.changed)


@pytest.mark.parametrize(
    ("made", "counts"),
    [
        (attempt(1, Phase.cold_boot), True),
        (replace(attempt(1, Phase.cold_boot), cold_boot=ColdBoot("reset", is_image_suspect=True)), True),
        (replace(attempt(1, Phase.cold_boot), cold_boot=ColdBoot("power", Phase.frozen)), False),
        (degraded(1, Finding("", "KHO handed it nothing"), arrived=("restored-from-disk",)), True),
        (degraded(1, Finding("", "another way", severity=FindingSeverity.changed), arrived=("x",)), False),
        (degraded(1, Finding("", "KHO handed it nothing"), arrived=()), True),
        (degraded(1, CONTENT), True),
        (degraded(1, replace(CONTENT, severity=FindingSeverity.unknown)), False),
        (degraded(1, Finding("", "did not arrive", subject="x")), False),
        (degraded(1, Finding.of_producer("db", "would not")), False),
        (degraded(1, Finding("", "failed", FindingSource.health, "web")), False),
        (attempt(1), False),
        (attempt(1, Phase.idle), False),
        (attempt(1, Phase.failed), False),
    ],
)
def test_what_counts_against_an_image(made: AttemptRecord, counts: bool) -> None:
    assert counts_against_image(made) is counts


def test_a_field_that_is_added_later_gets_its_default() -> None:
    made = attempt(1)
    text = json.loads(json.dumps(made, default=encode_value))
    optional = {field.name for field in dataclasses.fields(made) if field.default is not dataclasses.MISSING}
    for name in optional | {"trees"}:
        del text[name]
    del text["summary"]["damage"], text["verdict"]["checks"], text["events"][0]["kind"]
    text["field_of_a_newer_khod"] = {"x": 1}
    assert decode_document(json.dumps(text).encode()) == made


@pytest.mark.parametrize("text", [b"{", b"", b"{}", b'{"summary": 3}', zlib.compress(b"{}"), zlib.compress(b"x")[:5]])
def test_what_is_no_document_is_refused(text: bytes) -> None:
    with pytest.raises(DamagedDocument):
        decode_document(text)


def test_a_bomb_is_not_unpacked() -> None:
    with pytest.raises(DamagedDocument, match="too large"):
        decode_document(zlib.compress(b"{" + b" " * (MAX_DOCUMENT_BYTES * 4)))


def test_an_attempt_that_is_too_large_loses_events_of_producers_first() -> None:
    waits = Event(1.0, Phase.frozen, "x" * 1000, "", kind=EventKind.producer_waits)
    noted = Event(1.0, Phase.frozen, "noted", "", kind=EventKind.note)
    found = decode_document(encode_document(replace(attempt(1), events=[noted, *([waits] * 8000)])))
    assert found.events == [noted]
    assert "8000 events left out" in found.damage
    small = replace(attempt(1), events=[noted, waits])
    assert decode_document(encode_document(small)) == small


def test_the_digest_covers_run_summary_and_document() -> None:
    made = attempt(1)
    parts = "r", encode_summary(made.summary), encode_document(made)
    digests = {row_digest("s", *parts[1:]), row_digest("r", b"", parts[2]), row_digest("r", parts[1], b"")}
    assert row_digest(*parts) not in digests


def test_a_database_of_an_earlier_version_is_brought_to_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "history.db"
    opened(path).add_attempt(attempt(1))
    added = (*tables.STEPS, ("ALTER TABLE trials ADD COLUMN added TEXT", "CREATE TABLE later (x)"))
    monkeypatch.setattr(tables, "STEPS", added)
    monkeypatch.setattr(tables, "VERSION", len(added))
    database, aside = open_database(path)
    assert aside is None
    assert database.read_attempt(run_of(1)) == attempt(1)
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (len(added),)
        connection.execute("SELECT x FROM later")


def test_a_reader_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "history.db"
    opened(path).add_attempt(attempt(1))
    before = path.read_bytes()
    database, damage_text = open_for_reading(path)
    assert (damage_text, database.read_attempt(run_of(1))) == ("", attempt(1))
    database.close()
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["history.db"]
