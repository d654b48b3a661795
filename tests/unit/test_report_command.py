# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl report: its forms from a database, without khod; a FILE is complete or not there."""

import json
import os
import stat
import threading
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from khod.engine.history import HISTORY_FILE
from khod.errors import Exit
from tests.unit import attempts
from tests.unit.histories import fill
from tests.unit.khods import DEADLINE, NOBODY, Answer, Khod, cli, khoctl, public_directory

FORMS = ("--html", "--svg", "--chrome-trace")


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A history of one attempt."""
    path = tmp_path_factory.mktemp("history") / "history.db"
    fill(path, attempts.orderly_attempt())
    return path


def report(database: Path, *words: str | Path) -> Answer:
    """Run `khoctl report` where no khod listens."""
    return cli(Path("/nonexistent"), "report", "--db", database, *words)


def refused(ended: Answer, path: str | Path, *words: str) -> None:
    assert (ended.code, ended.out) == (Exit.usage, "")
    assert ended.err.count("\n") == 1
    assert all(word in ended.err for word in (str(path), "cannot be written", "Give a file", *words))


def is_whole(form: str, content: str) -> bool:
    """Whether a file has the whole report; raises where it is cut off."""
    if form == "--chrome-trace":
        return bool(json.loads(content)["traceEvents"])
    return ET.fromstring(content).tag.removeprefix("{http://www.w3.org/2000/svg}") in ("html", "svg")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("run", [(), (attempts.RUN,), (attempts.RUN[:6],)], ids=["last", "run", "prefix"])
def test_a_form_is_written_to_its_file(database: Path, tmp_path: Path, form: str, run: tuple[str, ...]) -> None:
    ended = report(database, *run, form, tmp_path / "made")
    assert ended == Answer(Exit.done, "", "")
    assert is_whole(form, (tmp_path / "made").read_text())
    assert os.listdir(tmp_path) == ["made"]


def test_json_goes_to_standard_output(database: Path) -> None:
    ended = report(database, "--json")
    assert (ended.code, ended.err) == (Exit.done, "")
    assert json.loads(ended.out)["attempt"]["summary"]["run"] == attempts.RUN


@pytest.mark.parametrize("form", FORMS)
def test_a_dash_is_standard_output(database: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In UTF-8, whatever the terminal's characters are."""
    monkeypatch.setenv("LC_ALL", "C")
    ended = khoctl(Path("/nonexistent"), "report", "--db", database, form, "-")
    assert (ended.code, ended.err) == (Exit.done, "")
    assert is_whole(form, ended.out)
    assert ("±" in ended.out) is (form != "--chrome-trace")


@pytest.mark.parametrize(
    "words", [(), ("--html", "a", "--svg", "b"), ("--json", "--html", "a"), ("--svg", "-", "--chrome-trace", "-")]
)
def test_exactly_one_form_is_written(database: Path, words: tuple[str, ...]) -> None:
    ended = report(database, *words)
    assert ended.code == Exit.usage
    assert "Give exactly one form of the report" in ended.err
    assert "--chrome-trace FILE" in ended.err


def test_an_unknown_run_is_refused_and_nothing_written(database: Path, tmp_path: Path) -> None:
    ended = report(database, "ffff", "--html", tmp_path / "made")
    assert ended.code == Exit.usage
    assert "ffff" in ended.err
    assert os.listdir(tmp_path) == []


def test_without_khod_and_database_khod_is_missed(tmp_path: Path) -> None:
    ended = cli(tmp_path / "nobody", "report", "--html", tmp_path / "made")
    assert ended.code == Exit.unreachable
    assert os.listdir(tmp_path) == []


def test_a_file_that_cannot_be_written_is_named(database: Path, tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    refused(report(database, "--html", tmp_path / "directory"), tmp_path / "directory", "EISDIR")
    refused(report(database, "--html", tmp_path / "none" / "made"), tmp_path / "none" / "made", "ENOENT")
    refused(report(database, "--html", tmp_path / "loop"), tmp_path / "loop", "ELOOP")
    refused(report(database, "--html", "/proc/made"), "/proc/made", "E")
    refused(report(database, "--html", "/dev/full"), "/dev/full", "ENOSPC")
    refused(report(database, "--html", tmp_path / ("x" * 300)), "xxx", "ENAMETOOLONG")
    refused(report(database, "--html", "a\0b"), r"a\x00b", "null")
    assert sorted(os.listdir(tmp_path)) == ["directory", "loop"]


def test_what_was_there_stays_until_all_is_written(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "made"
    made.write_text("before")

    def fail(_source: str, _target: str) -> None:
        assert made.read_text() == "before"
        raise OSError(28, "")

    monkeypatch.setattr(os, "rename", fail)
    refused(report(database, "--html", made), made, "ENOSPC")
    assert made.read_text() == "before"
    assert os.listdir(tmp_path) == ["made"]


def test_a_file_keeps_its_mode_and_a_link_its_target(database: Path, tmp_path: Path) -> None:
    (tmp_path / "made").write_text("before")
    (tmp_path / "made").chmod(0o640)
    (tmp_path / "link").symlink_to("made")
    assert report(database, "--svg", tmp_path / "link").code == Exit.done
    assert (tmp_path / "link").is_symlink()
    assert is_whole("--svg", (tmp_path / "made").read_text())
    assert stat.S_IMODE((tmp_path / "made").stat().st_mode) == 0o640


def test_a_fifo_is_written_to(database: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "fifo").read_text()))
    reader.start()
    assert report(database, "--svg", tmp_path / "fifo").code == Exit.done
    reader.join(DEADLINE)
    assert is_whole("--svg", read[0])
    assert (tmp_path / "fifo").is_fifo()


def test_khod_gives_the_same_report_but_not_to_everyone(database: Path) -> None:
    """Who asked, and the command lines, are for root and the group kho."""
    with public_directory() as directory:
        (directory / "state").mkdir()
        (directory / "state" / HISTORY_FILE).write_bytes(database.read_bytes())
        khod = Khod(directory)
        try:
            asked = khod.khoctl("report", "--html", "-")
            other = khoctl(khod.socket, "report", "--html", "-", user=NOBODY)
        finally:
            khod.close()
    assert asked == report(database, "--html", "-")
    assert (other.code, other.err) == (Exit.done, "")
    for secret in ("alice", "root=/dev/vda1"):
        assert secret in asked.out
        assert secret not in other.out
    assert other.out.count("not recorded, or not shown to this user") == 3
