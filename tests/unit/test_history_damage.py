# SPDX-License-Identifier: LGPL-2.1-or-later
"""A history database that is damaged, foreign, newer, locked, or cut off in the middle of a write."""

import itertools
import os
import random
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from khod.errors import UsageError
from khod.history.database import Bounds, Database
from khod.history.model import AttemptRecord
from khod.history.opening import VERSION_AND_ID, open_database, open_for_reading
from khod.history.set_aside import Fault, list_set_aside, set_aside
from khod.history.tables import APPLICATION_ID, VERSION
from tests.unit.histories import attempt, fill, opened, run_of
from tests.unit.killed import run_killed

PAGE = 4096
ATTEMPTS = 40
AT = 1_795_737_600.0
AT_NAME = "20261127T000000Z"


def bulky(number: int) -> AttemptRecord:
    """An attempt of up to three pages, of which nothing can be compressed."""
    words = random.Random(number)
    return replace(attempt(number), trees=[words.randbytes(40).hex() for _ in range(number % 7 * 20)])


MADE = {run_of(number): bulky(number) for number in range(ATTEMPTS)}


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("sound") / "history.db"
    fill(path, *MADE.values())
    return path.read_bytes()


def readable(database: Database) -> set[str]:
    """The runs that are not named as damaged; each must be read as it was written."""
    sound = {summary.run for summary in database.list_attempts() if not summary.damage}
    assert all(database.read_attempt(run) == MADE[run] for run in sound)
    return sound


def open_damaged(directory: Path, content: bytes) -> tuple[int, Fault | None]:
    """Open such a file, offline and then as khod does; how many attempts are readable, and why it was set aside."""
    directory.mkdir()
    path = directory / "history.db"
    path.write_bytes(content)
    try:
        reader, _ = open_for_reading(path)
        offline = readable(reader)
        reader.close()
    except UsageError:
        offline = set()
    assert path.read_bytes() == content
    database, aside = open_database(path, lambda: AT)
    assert readable(database) == offline
    database.add_attempt(attempt(900))
    assert database.read_attempt(run_of(900)) == attempt(900)
    database.close()
    if aside is not None:
        assert aside.path.name == f"history.db.{aside.fault.value}-{AT_NAME}"
        assert aside.path.read_bytes() == content
        assert list_set_aside(path) == [aside]
    return len(offline), None if aside is None else aside.fault


def test_a_database_that_is_cut_off_anywhere_gives_what_is_left(tmp_path: Path, content: bytes) -> None:
    assert open_damaged(tmp_path / "sound", content) == (ATTEMPTS, None)
    assert open_damaged(tmp_path / "0", b"") == (0, Fault.empty)
    for size in (1, 100):
        assert open_damaged(tmp_path / str(size), content[:size]) == (0, Fault.damaged)
    counts = []
    for size in range(PAGE, len(content), PAGE):
        count, fault = open_damaged(tmp_path / str(size), content[:size])
        assert fault is Fault.damaged
        counts.append(count)
    assert counts == sorted(counts)  # the rows lie one after the other
    assert counts[0] == 0
    assert counts[-1] > ATTEMPTS - 5
    assert counts[len(counts) // 2] > ATTEMPTS // 4


@pytest.mark.parametrize("filling", [b"\0", b"\xff"])
def test_a_bad_page_costs_what_lies_in_it(tmp_path: Path, content: bytes, filling: bytes) -> None:
    lost = []
    for page in range(len(content) // PAGE):
        bad = content[: page * PAGE] + filling * PAGE + content[(page + 1) * PAGE :]
        count, fault = open_damaged(tmp_path / str(page), bad)
        assert fault is not None or count < ATTEMPTS  # SQLite finds it, or a digest does
        lost.append(ATTEMPTS - count)
    # Without the header nothing says that it was ours, and the root of a table leads to all of its rows.
    everything = [page for page, count in enumerate(lost) if count == ATTEMPTS]
    assert everything == [0, 1]
    assert max(lost[2:]) <= PAGE // 500  # the rows of one page, none of which is smaller


def with_header(content: bytes, *, version: int = VERSION, application: int = APPLICATION_ID) -> bytes:
    header = bytearray(content)
    VERSION_AND_ID.pack_into(header, 0, version, application)
    return content[:60] + bytes(header[60:64]) + content[64:68] + bytes(header[68:72]) + content[72:]


@pytest.mark.parametrize(
    ("version", "application", "fault"),
    [
        (VERSION + 1, APPLICATION_ID, Fault.newer),
        (0x7FFFFFFF, APPLICATION_ID, Fault.newer),
        (VERSION, 0, Fault.foreign),
        (VERSION, 0x12345678, Fault.foreign),
    ],
)
def test_what_is_newer_or_foreign_is_left_as_it_is(
    tmp_path: Path, content: bytes, version: int, application: int, fault: Fault
) -> None:
    changed = with_header(content, version=version, application=application)
    assert changed != content
    assert open_damaged(tmp_path / "made", changed) == (0, fault)


def test_a_version_of_no_tables_is_damage(tmp_path: Path, content: bytes) -> None:
    """Its tables are there already, so the steps to them fail; they are taken over all the same."""
    assert open_damaged(tmp_path / "made", with_header(content, version=0)) == (ATTEMPTS, Fault.damaged)


def test_a_table_that_is_missing_is_damage(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "history.db"
    path.write_bytes(content)
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TABLE trials")
    connection.close()
    assert open_damaged(tmp_path / "made", path.read_bytes()) == (ATTEMPTS, Fault.damaged)


def test_a_directory_in_its_place_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "history.db"
    (path / "inside").mkdir(parents=True)
    database, aside = open_database(path, lambda: AT)
    assert aside is not None
    assert aside.fault is Fault.foreign
    assert (aside.path / "inside").is_dir()
    database.add_attempt(attempt(1))
    with pytest.raises(UsageError):
        open_for_reading(aside.path)


def test_a_fifo_in_its_place_does_not_block(tmp_path: Path) -> None:
    path = tmp_path / "history.db"
    os.mkfifo(path)
    _, aside = open_database(path, lambda: AT)
    assert aside is not None


def test_its_journals_are_set_aside_with_it(tmp_path: Path) -> None:
    path = tmp_path / "history.db"
    for ending in ("", "-journal", "-wal", "-shm"):
        Path(f"{path}{ending}").write_text(ending)
    _, aside = open_database(path, lambda: AT)
    assert aside is not None
    for ending in ("", "-journal", "-wal", "-shm"):
        assert Path(f"{aside.path}{ending}").read_text() == ending
        assert ending == "" or not Path(f"{path}{ending}").exists()


def test_two_in_the_same_second_have_names_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "history.db"
    found = []
    for number in range(3):
        path.write_text(str(number))
        found.append(set_aside(path, Fault.foreign, AT))
    assert [aside.path.read_text() for aside in found] == ["0", "1", "2"]
    assert {aside.path for aside in list_set_aside(path)} == {aside.path for aside in found}


def test_a_new_database_that_was_not_finished_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "history.db.new").write_text("half")
    (tmp_path / "history.db.new-journal").write_text("half")
    database, aside = open_database(tmp_path / "history.db")
    assert aside is None
    database.add_attempt(attempt(1))
    assert [entry.name for entry in tmp_path.iterdir()] == ["history.db"]
    assert (tmp_path / "history.db").stat().st_mode & 0o777 == 0o600


def kill_everywhere(prepare: Callable[[], Callable[[], object]], after: Callable[[], None]) -> int:
    """Kill the work at each of its system calls in turn, and look at what is left with `after`; how many there were."""
    for stops in itertools.count(1):
        if not run_killed(prepare, stops):
            return stops - 1
        after()
    raise AssertionError


def test_a_kill_at_any_call_leaves_the_old_attempt_or_the_new_one(tmp_path: Path) -> None:
    source, path = tmp_path / "sound.db", tmp_path / "history.db"
    old, new, other = bulky(6), replace(bulky(6), trees=["corrected"] * 3000), bulky(5)
    fill(source, other, old)
    found = []

    def prepare() -> Callable[[], object]:
        for name in os.listdir(tmp_path):
            if name != source.name:
                (tmp_path / name).unlink()
        shutil.copyfile(source, path)
        database = opened(path)
        return lambda: database.add_attempt(new, Bounds(100, 100, 1 << 30))

    def look() -> None:
        for _ in range(2):  # offline, which changes nothing, and again
            reader, damage = open_for_reading(path)
            offline = reader.read_attempt(old.summary.run)
            assert (damage, reader.read_attempt(other.summary.run)) == ("", other)
        database, aside = open_database(path)
        assert aside is None
        found.append(database.read_attempt(old.summary.run))
        assert found[-1] == offline
        assert found[-1] in (old, new)
        assert database.read_attempt(other.summary.run) == other
        database.close()

    assert kill_everywhere(prepare, look) > 20
    # Not each of them in order: a child has the heap of this process, which grows, so that of two runs one may ask for
    # memory once more before it commits.
    assert (found[0], found[-1]) == (old, new)


def test_a_kill_at_any_call_of_its_making_leaves_nothing_to_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "history.db"
    found = []

    def prepare() -> Callable[[], object]:
        for name in os.listdir(tmp_path):
            (tmp_path / name).unlink()
        return lambda: opened(path).add_attempt(attempt(1))

    def look() -> None:
        database, aside = open_database(path)
        assert aside is None
        found.append(len(database.list_attempts()))
        database.close()

    assert kill_everywhere(prepare, look) > 50
    assert (found[0], found[-1], {*found}) == (0, 1, {0, 1})  # as above
