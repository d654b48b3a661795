# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod's history where the database cannot be used: a note, and never an error of a handover."""

import asyncio
import logging
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from khod.concurrency.worker import Worker
from khod.config import Config, HistorySettings, Settings
from khod.engine.history import HISTORY_FILE, HistoryService
from khod.errors import Failed, UsageError
from khod.history.database import Database
from khod.history.model import RowKind, Timeline, TimelineRow
from khod.history.set_aside import Fault, SetAside
from khod.history.trial import ImageTrial, Past, trial_digest
from khod.model import Phase
from tests.unit.harness import Host
from tests.unit.histories import INITRD, KERNEL, attempt, fill, opened, run_of

LOCK = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.read()
"""


def make_service(path: Path, settings: Settings, **options: Any) -> HistoryService:
    return HistoryService(path, settings, Worker("history", "The history database"), **options)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / HISTORY_FILE


@pytest.fixture
def service(path: Path) -> Iterator[HistoryService]:
    service = make_service(path, Settings())
    yield service
    service.close()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another process that has the database locked."""
    process = subprocess.Popen([sys.executable, "-c", LOCK, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == b"locked\n"
    yield
    process.stdin.close()
    process.wait()
    process.stdout.close()


def exists(path: Path) -> bool:
    return path.exists()


def damage(path: Path) -> None:
    """Spoil one page near the end of a file, and cut the last one off."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size - 8 * 4096)
        file.write(b"\xff" * 4096)
        file.truncate(size - 4096)


@contextmanager
def mounted(path: Path, options: str) -> Iterator[None]:
    """A file system of its own at `path`."""
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "khod-test", str(path)], check=True)
    yield
    subprocess.run(["umount", "-l", str(path)], check=True)


def make_readonly(path: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(path)], check=True)


def fill_disk(path: Path) -> Path:
    """Write until there is no room left; the file that fills it."""
    with suppress(OSError), (path / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    assert os.statvfs(path).f_bavail == 0
    return path / "filler"


async def runs(service: HistoryService) -> list[str]:
    return [summary.run for summary in (await service.page("", 10)).attempts]


async def test_what_is_remembered_is_listed(service: HistoryService, path: Path) -> None:
    assert not exists(path)  # it is made by the first call
    for number in range(3):
        await service.remember(attempt(number))
    page = await service.page("", 2)
    assert ([found.run for found in page.attempts], page.more, page.note) == ([run_of(2), run_of(1)], True, "")
    rest = await service.page(run_of(1), 2)
    assert ([found.run for found in rest.attempts], rest.more) == ([run_of(0)], False)
    assert await service.attempt(run_of(1)[:6]) == attempt(1)
    assert [found.run for found in await service.chain("boot-2")] == [run_of(1), run_of(0)]
    assert await service.counts() == {Phase.verified: 3}


async def test_the_bounds_of_the_configuration_hold_from_the_next_attempt_on(path: Path) -> None:
    settings = Settings()
    service = make_service(path, settings)
    for number in range(3):
        await service.remember(attempt(number))
    settings.current = replace(Config(), history=HistorySettings(keep=1))
    assert len(await runs(service)) == 3
    await service.remember(attempt(3))
    assert await runs(service) == [run_of(3)]
    service.close()


async def test_a_locked_database_costs_no_more_than_the_deadline(path: Path) -> None:
    """The other process holds the lock until each call has returned: it is the deadline that ends the wait."""
    fill(path, attempt(1))
    service = make_service(path, Settings(), deadline=0.05)
    with locked(path):
        await service.remember(attempt(2))
        assert "may be missing" in (await service.page("", 10)).note
        for asked in (service.attempt(), service.chain(""), service.trial(""), service.acknowledge("5a5a5a", "root")):
            with pytest.raises(Failed):
                await asked
        assert await service.counts() is None
    service.close()


async def test_a_database_that_is_unlocked_again_is_used(path: Path) -> None:
    fill(path, attempt(1))
    service = make_service(path, Settings())
    with locked(path):
        await service.remember(attempt(2))
        assert "locked" in (await service.page("", 10)).note
    await service.remember(attempt(3))
    assert await runs(service) == [run_of(3), run_of(1)]
    assert (await service.page("", 10)).note == ""
    service.close()


async def test_a_full_disk_keeps_what_is_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with mounted(tmp_path / "full", "size=256k"):
        path = tmp_path / "full" / HISTORY_FILE
        service = make_service(path, Settings())
        await service.remember(attempt(1))
        filler = fill_disk(tmp_path / "full")
        with caplog.at_level(logging.WARNING):
            await service.remember(attempt(2, events=5000))
        assert run_of(2) in caplog.text
        page = await service.page("", 10)
        assert [found.run for found in page.attempts] == [run_of(1)]
        assert run_of(2) in page.note
        filler.unlink()
        await service.remember(attempt(2))
        assert await runs(service) == [run_of(2), run_of(1)]
        service.close()


async def test_a_full_disk_without_a_database(tmp_path: Path) -> None:
    with mounted(tmp_path / "full", "size=4k"):
        service = make_service(tmp_path / "full" / HISTORY_FILE, Settings())
        await service.remember(attempt(1))
        assert (await service.page("", 10)).note
        service.close()


async def test_a_file_system_that_is_read_only_can_be_read(tmp_path: Path) -> None:
    with mounted(tmp_path / "fixed", "size=1m"):
        path = tmp_path / "fixed" / HISTORY_FILE
        fill(path, attempt(1))
        make_readonly(path.parent)
        service = make_service(path, Settings())
        await service.remember(attempt(2))
        page = await service.page("", 10)
        assert [found.run for found in page.attempts] == [run_of(1)]
        assert run_of(2) in page.note
        service.close()


async def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    service = make_service(tmp_path / "file" / HISTORY_FILE, Settings())
    await service.remember(attempt(1))
    assert "ENOTDIR" in (await service.page("", 10)).note
    service.close()


async def test_a_database_that_cannot_be_read(service: HistoryService, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_path: Path) -> None:
        raise PermissionError(13, "Permission denied", "history.db")

    monkeypatch.setattr("khod.history.opening.judge_file", refuse)
    await service.remember(attempt(1))
    assert "EACCES" in (await service.page("", 10)).note


async def test_damage_that_comes_while_khod_runs_is_set_aside(
    service: HistoryService, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    announced: list[SetAside] = []
    monkeypatch.setattr("khod.engine.announcements.announce_set_aside", announced.append)
    for number in range(40):
        await service.remember(attempt(number, events=400))
    damage(path)
    await service.remember(attempt(40))
    assert [aside.fault for aside in announced] == [Fault.damaged]
    page = await service.page("", 100)
    assert "set aside" in page.note
    assert page.attempts[0].run == run_of(40)
    assert len(page.attempts) > 30


async def test_a_database_that_is_removed_is_made_again(service: HistoryService, path: Path) -> None:
    await service.remember(attempt(1))
    os.unlink(path)
    await service.remember(attempt(2))
    assert [found.run for found in opened(path).list_attempts()] == [run_of(2)]


async def test_it_is_not_opened_while_producers_are_stopped(path: Path) -> None:
    stopped = True
    service = make_service(path, Settings(), is_stopped=lambda: stopped)
    await service.remember(attempt(1))
    assert "while producers are stopped" in (await service.page("", 10)).note
    assert not exists(path)
    stopped = False
    await service.remember(attempt(1))
    stopped = True
    assert await runs(service) == [run_of(1)]  # once it is open, it is read
    service.close()


async def test_an_error_of_khods_own_is_a_note(service: HistoryService, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Database, "add_attempt", fail)
    await service.remember(attempt(1))
    assert run_of(1) in (await service.page("", 10)).note


async def test_what_does_not_exist_is_a_usage_error(service: HistoryService) -> None:
    for asked in (service.attempt(), service.attempt("x"), service.acknowledge("x", "root")):
        with pytest.raises(UsageError):
            await asked


async def test_an_image_is_tried_again_after_its_acknowledgement(service: HistoryService, path: Path) -> None:
    pair = trial_digest([KERNEL, INITRD])
    await service.remember(attempt(1, Phase.cold_boot, reason="reset"))
    assert (await service.trial(pair)).reason == "reset"
    assert await service.acknowledge(run_of(1), "root (khoctl)") == [run_of(1)]
    assert (await service.trial(pair)).failures == 0
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT acknowledged_by FROM trials").fetchall() == [("root (khoctl)",)]


async def test_the_past_has_the_times_of_the_last_handover(service: HistoryService, path: Path) -> None:
    """A rollback has none, and a handover that cannot be read has none either; the trial is known all the same."""
    assert (await service.past("")).timeline == Timeline()
    timed = Timeline([TimelineRow(RowKind.kernel, "kernel", 1.0, 2.5)])
    await service.remember(attempt(1))
    await service.remember(replace(attempt(2, Phase.degraded), timeline=timed))
    await service.remember(attempt(3, Phase.idle))
    assert (await service.past("")).timeline == timed
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE attempts SET document = x'00' WHERE run = ?", (run_of(2),))
    assert await service.past("") == Past(ImageTrial(""))


async def test_the_engine_has_its_history_beside_its_record(host: Host) -> None:
    engine = host.engine()
    await engine.history.remember(attempt(1))
    assert (host.directory / "state" / HISTORY_FILE).exists()
    engine.history.close()


async def test_calls_at_the_same_time_are_answered_one_after_the_other(service: HistoryService) -> None:
    await asyncio.gather(*(service.remember(attempt(number)) for number in range(8)))
    assert set(await runs(service)) == {run_of(number) for number in range(8)}
