# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl history, from a khod on the simulated kernel and from a file, and who is shown what."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from khoctl.runs import load_attempt
from khod.engine.history import HISTORY_FILE
from khod.errors import Exit, UsageError
from khod.history.trial import trial_digest
from khod.model import Event, Finding, Phase
from tests.unit.histories import INITRD, KERNEL, SECRET, attempt, degraded, fill, opened, run_of
from tests.unit.images import CPIO, bzimage
from tests.unit.khods import NOBODY, Answer, Khod, call, cli, public_directory, until

HOSTILE = '<script>alert(1)</script>\n"\x1b[2J\x1b]0;owned\x07\u202e\r`now`'
ATTEMPTS = [
    attempt(1),
    attempt(2, Phase.cold_boot, reason=HOSTILE),
    attempt(3, Phase.idle, reason="Producer db did not answer `freeze` within 10 s"),
]


@pytest.fixture(scope="module")
def khod() -> Iterator[Khod]:
    with public_directory() as directory:
        (directory / "state").mkdir()
        fill(directory / "state" / HISTORY_FILE, *ATTEMPTS)
        khod = Khod(directory)
        yield khod
        khod.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    fill(tmp_path / "copy.db", *ATTEMPTS)
    return tmp_path / "copy.db"


def both(khod: Khod, file: Path, *words: str) -> Answer:
    """The answer of khod and of the file, which must be the same."""
    asked = khod.khoctl("history", *words)
    assert cli(Path("/nowhere"), "history", *words, "--db", file) == asked
    return asked


def test_the_list_is_the_same_from_khod_and_from_its_file(khod: Khod, file: Path) -> None:
    lines = both(khod, file).out.splitlines()
    assert lines[0].split()[:2] == ["RUN", "BEGUN"]
    assert [line.split()[0] for line in lines[1:]] == [run_of(number)[:8] for number in (3, 2, 1)]
    assert "rolled back" in lines[1]
    assert "cold boot" in lines[2]
    assert "1.5 s ± 0.3 s" in lines[3]
    assert "root (khoctl, process 1)" in lines[3]


def test_the_list_as_json(khod: Khod, file: Path) -> None:
    found = both(khod, file, "--json", "-n", "2").json
    assert [item["run"] for item in found["attempts"]] == [run_of(3), run_of(2)]
    assert (found["more"], found["note"]) == (True, "")
    assert found["attempts"][1]["reason"] == HOSTILE


def test_older_ones_are_mentioned(khod: Khod, file: Path) -> None:
    found = both(khod, file, "-n", "1")
    assert len(found.out.splitlines()) == 2
    assert "-n N" in found.err


def test_pages_are_put_together(khod: Khod, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("khod.client.history.PAGE_ATTEMPTS", 1)
    assert [item["run"] for item in khod.khoctl("history", "--json").json["attempts"]] == [
        run_of(number) for number in (3, 2, 1)
    ]


def test_a_hostile_reason_stays_text(khod: Khod, file: Path) -> None:
    for words in ((), ("show", run_of(2))):
        out = both(khod, file, *words).out
        assert "<script>" in out
        assert not any(char in out for char in "\x1b\x07\u202e\r")
        assert r"\n" in out


def test_the_table_fits_80_columns(khod: Khod, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = khod.khoctl("history").out.splitlines()
    assert max(map(len, lines)) <= 80
    assert all(line.strip() for line in lines)


def test_an_attempt_is_shown(khod: Khod, file: Path) -> None:
    page = both(khod, file, "show", run_of(1)[:5]).out
    for text in ("verified", run_of(1), KERNEL.digest, INITRD.name, SECRET, "7.3.5", "event 2", "WARN"):
        assert text.lower() in page.lower()
    assert both(khod, file, "show", run_of(1), "--json").json["summary"]["run"] == run_of(1)


def test_an_ambiguous_run_names_the_candidates(tmp_path: Path) -> None:
    runs = ("ab01", "ab02")
    fill(
        tmp_path / "h.db",
        *(replace(attempt(1), summary=replace(attempt(1).summary, run=run)) for run in runs),
    )
    refused = cli(Path("/nowhere"), "history", "show", "ab", "--db", tmp_path / "h.db")
    assert refused.code == Exit.usage
    assert all(run in refused.err for run in runs)
    with pytest.raises(UsageError):
        load_attempt("ab", tmp_path / "h.db")
    assert load_attempt(None, tmp_path / "h.db").summary.run == "ab02"


def test_an_unknown_run_is_refused(khod: Khod, file: Path) -> None:
    refused = both(khod, file, "show", "ffff")
    assert refused.code == Exit.usage
    assert "'ffff'" in refused.err


def test_the_chain(khod: Khod, file: Path) -> None:
    assert cli(Path("/nowhere"), "history", "chain", "--json", "--db", file).json[0]["run"] == run_of(1)
    assert khod.khoctl("history", "chain", "--json").json == []  # no handover led to this boot
    assert "was not reached" in khod.khoctl("history", "chain").out


def test_an_acknowledgement(khod: Khod) -> None:
    path = khod.directory / "state" / HISTORY_FILE
    assert opened(path).read_trial(trial_digest([KERNEL, INITRD])).failures == 1
    done = khod.khoctl("history", "ack", run_of(2), "--json")
    assert (done.code, done.json) == (Exit.done, {"acknowledged": [run_of(2)]})
    assert opened(path).read_trial(trial_digest([KERNEL, INITRD])).failures == 0
    again = khod.khoctl("history", "ack", run_of(2))
    assert again.code == Exit.usage


def test_others_may_not_acknowledge(khod: Khod) -> None:
    with khod.connect_as(NOBODY) as client:
        assert call(client, "Acknowledge", image=run_of(2))["error"] == "io.kho.Handover.Refused"


def test_others_see_neither_who_asked_nor_command_lines(khod: Khod) -> None:
    with khod.connect_as(NOBODY) as client:
        answers = [
            call(client, "History"),
            call(client, "Attempt", run=run_of(1)),
            call(client, "Chain"),
        ]
    assert answers[1]["parameters"]["attempt"]["origin"]["release"] == "7.3.4"
    assert [item["run"] for item in answers[0]["parameters"]["attempts"]] == [run_of(n) for n in (3, 2, 1)]
    for answer in answers:
        text = json.dumps(answer)
        assert "hunter2" not in text
        assert "process 1" not in text


def test_root_sees_them_also_while_others_ask(khod: Khod) -> None:
    with khod.connect_as(NOBODY) as other, khod.connect() as root:
        for client, shown in ((other, False), (root, True)) * 3:
            assert ("hunter2" in json.dumps(call(client, "Attempt", run=run_of(1)))) is shown


@pytest.mark.parametrize("limit", [0, -1, 501, 1 << 70])
def test_a_limit_that_is_none_is_refused(khod: Khod, limit: int) -> None:
    with khod.connect_as(NOBODY) as client:
        assert call(client, "History", limit=limit)["error"] == "io.kho.Handover.UsageError"


def test_an_attempt_of_a_thousand_producers_comes_in_one_answer() -> None:
    large = attempt(9, events=0)
    events = [Event(float(at), Phase.frozen, f"producer-{at % 1000} is ready " + "." * 300, "") for at in range(8000)]
    made = replace(large, summary=replace(large.summary, run="f" * 12), events=events)
    with public_directory() as directory:
        (directory / "state").mkdir()
        fill(directory / "state" / HISTORY_FILE, made)
        own = Khod(directory)
        assert len(own.khoctl("history", "show", "f", "--json").json["events"]) == 8000
        own.close()


def test_without_any_attempt(tmp_path: Path) -> None:
    khod = Khod(tmp_path)
    assert khod.khoctl("history").out == "No attempts: no handover has ended yet.\n"
    assert khod.khoctl("history", "show", "a").code == Exit.usage
    khod.close()


def test_what_was_set_aside_is_named_until_it_is_removed(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    path = tmp_path / "state" / HISTORY_FILE
    path.write_bytes(b"no database" * 1000)
    khod = Khod(tmp_path)
    khod.khoctl("history")
    (aside,) = path.parent.glob(f"{HISTORY_FILE}.foreign-*")
    for _ in range(2):
        assert str(aside) in khod.khoctl("history").err
        assert str(aside) in khod.khoctl("history", "--json").json["note"]
    aside.unlink()
    assert khod.khoctl("history").err == ""
    khod.close()


def test_a_file_that_is_no_history_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"x" * 5000, None):
        path = tmp_path / "file"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        refused = cli(Path("/nowhere"), "history", "--db", path)
        assert refused.code == Exit.usage
        assert str(path) in refused.err


def test_degraded_has_its_reason(tmp_path: Path) -> None:

    fill(tmp_path / "h.db", degraded(1, Finding.of_producer("db", "its reason")))
    assert "producer db: its reason" in cli(Path("/nowhere"), "history", "--db", tmp_path / "h.db").out


def test_what_khod_does_is_remembered(tmp_path: Path) -> None:
    """A rollback in a boot that a handover has reached is a rollback, whatever that handover came to."""
    (tmp_path / "vmlinuz").write_bytes(bzimage())
    (tmp_path / "initrd").write_bytes(CPIO)
    khod = Khod(tmp_path)

    def attempts() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = khod.khoctl("history", "--json").json["attempts"]
        return found

    def roll_back(count: int) -> None:
        assert khod.khoctl("activate").code == khod.khoctl("abort").code == Exit.done
        until(lambda: len(attempts()) == count, khod.process)

    roll_back(1)
    images = ("--image", tmp_path / "vmlinuz", "--initrd", tmp_path / "initrd")
    khod.khoctl("kexec", *images, "--now", "--no-block")
    khod.word("READY=1")  # of the next khod
    until(lambda: len(attempts()) == 2, khod.process)
    roll_back(3)
    assert [found["outcome"] for found in attempts()] == ["idle", "verified", "idle"]
    (link,) = khod.khoctl("history", "chain", "--json").json
    assert link == attempts()[1]
    khod.close()


def test_without_khod_the_file_is_named() -> None:
    answer = cli(Path("/nowhere"), "history")
    assert answer.code == Exit.unreachable
    assert "--db /var/lib/khod/history.db" in answer.err
