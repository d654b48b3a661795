# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl logs: the lines of both kernels in one order, whatever their clocks say and whatever stands in them."""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from khod.errors import Exit
from khod.model import Event, Phase, Producer
from tests.unit.histories import BEGAN_AT, attempt, fill, run_of
from tests.unit.khods import Answer, cli

BEGAN = BEGAN_AT + 86_400
# Stands for journalctl: notes how it is called, and prints the file of the boot that it is asked for.
JOURNALCTL = """\
#!/bin/sh
cd "$(dirname "$0")"
printf '%s\\n' "$*" >> calls
for word; do
    case "$word" in _BOOT_ID=*) boot=${word#_BOOT_ID=} ;; esac
done
[ -e fails ] && { cat fails >&2; exit 1; }
[ -e "$boot" ] && cat "$boot"
echo '-- No entries --'
"""


def entry(monotonic: float, wall: float, message: Any, **fields: Any) -> dict[str, Any]:
    return {
        "__MONOTONIC_TIMESTAMP": str(round(monotonic * 1e6)),
        "__REALTIME_TIMESTAMP": str(round(wall * 1e6)),
        "MESSAGE": message,
        "SYSLOG_IDENTIFIER": "khod",
        "PRIORITY": "6",
        **fields,
    }


def kernel(monotonic: float, read: float, wall: float, message: str) -> dict[str, Any]:
    """A line that the kernel wrote at `monotonic` and journald read at `read`."""
    source = {"_TRANSPORT": "kernel", "_SOURCE_MONOTONIC_TIMESTAMP": str(round(monotonic * 1e6))}
    return entry(read, wall, message, SYSLOG_IDENTIFIER="kernel", **source)


class Journal:
    """A journal below a directory, and the history beside it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.db = directory / "history.db"
        script = directory / "journalctl"
        script.write_text(JOURNALCTL)
        script.chmod(0o755)

    def lay(self, boot: str, *entries: dict[str, Any]) -> None:
        (self.directory / boot).write_text("".join(f"{json.dumps(one)}\n" for one in entries))

    def logs(self, *words: str) -> Answer:
        return cli(self.directory / "socket", "logs", f"--db={self.db}", *words)

    @property
    def calls(self) -> list[list[str]]:
        return [line.split(" ") for line in (self.directory / "calls").read_text().splitlines()]


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    made = Journal(tmp_path)
    hook = Producer("db@1", "hook", 0, "freeze", "ready", 1.0, False, None)
    first = attempt(1)
    fill(made.db, replace(first, events=[Event(1.0, Phase.freezing, "db", run_of(1), hook)]), attempt(2, Phase.idle))
    # journald drops the dashes of a boot's id; those of the attempts here are boot-1, boot-2
    made.lay(
        "boot1",
        entry(100.0, BEGAN, "preparing: begun", KHO_RUN=run_of(1)),
        kernel(100.5, 100.9, BEGAN + 0.9, "kexec_file: loaded"),
        entry(100.7, BEGAN + 0.7, "loaded: it is there"),
    )
    made.lay(
        "boot2",  # its clock was set back an hour
        kernel(0.0, 2.0, BEGAN - 3600 + 2, "Linux version 7.3.5"),
        entry(5.0, BEGAN - 3600 + 5, "verified: all arrived"),
    )
    yield made
    monkeypatch.undo()
    time.tzset()


def test_the_first_boot_s_lines_come_first_whatever_the_clock_says(journal: Journal) -> None:
    ended = journal.logs(run_of(1))
    assert ended.code == Exit.done, ended.err
    assert [line.split("  ", 1)[-1].lstrip() for line in ended.out.splitlines()] == [
        "--- 2026-09-22 ---",
        "preparing: begun",
        "kexec_file: loaded",
        "loaded: it is there",
        "--- jump: 7.3.4 -> 7.3.5 ---",
        "--- 2026-09-22 ---",
        "Linux version 7.3.5",
        "verified: all arrived",
    ]
    assert ended.out.splitlines()[2].split()[:3] == ["14:13:20.500000", "1", "kernel"], "when the kernel wrote it"
    assert ended.out.splitlines()[6].split()[:3] == ["13:13:20.000000", "2", "kernel"]
    assert ended.out.splitlines()[7].split()[:3] == ["13:13:25.000000", "2", "khod"]


def test_each_boot_is_asked_for_its_own_part(journal: Journal) -> None:
    journal.logs(run_of(1))
    first, second = journal.calls
    assert f"--since=@{BEGAN - 1:.6f}" in first
    assert not [word for word in first if word.startswith("--until")]
    assert f"--until=@{BEGAN + 21:.6f}" in second
    assert not [word for word in second if word.startswith("--since")]
    for call, boot in ((first, "_BOOT_ID=boot1"), (second, "_BOOT_ID=boot2")):
        matches = call[call.index(boot) :]
        matches = [word for word in matches if not word.startswith("--")]
        groups = " ".join(matches).split(" + ")
        assert {tuple(group.split()) for group in groups} == {
            (boot, f"KHO_RUN={run_of(1)}"),
            (boot, "_TRANSPORT=kernel"),
            (boot, "_SYSTEMD_UNIT=kho-handover.service"),
            (boot, "UNIT=kho-handover.service"),
            (boot, "_SYSTEMD_UNIT=kho-hook-db\\x401.service"),
            (boot, "UNIT=kho-hook-db\\x401.service"),
        }


def test_a_handover_that_was_rolled_back_has_one_boot_and_is_the_last_one(journal: Journal) -> None:
    ended = journal.logs()
    assert "---" not in ended.out.replace("--- 2026-09-22 ---", "").replace("--- 2026-09-21 ---", "")
    ((*words,),) = journal.calls
    assert f"--since=@{BEGAN + 86_400 - 1:.6f}" in words
    assert f"--until=@{BEGAN + 86_400 + 21:.6f}" in words
    assert "_BOOT_ID=boot2" in words


def test_a_cold_boot_is_no_jump(journal: Journal) -> None:
    fill(journal.db, attempt(3, Phase.cold_boot))
    journal.lay("boot4", entry(5.0, BEGAN, "cold boot: it is"))
    assert "--- cold boot: 7.3.4 -> 7.3.5 ---" in journal.logs(run_of(3)).out


def test_a_volatile_journal_is_named(journal: Journal) -> None:
    (journal.directory / "boot1").unlink()
    ended = journal.logs(run_of(1))
    assert ended.code == Exit.done
    assert ended.out.startswith("--- jump: 7.3.4 -> 7.3.5 ---\n")
    assert "before the jump (boot-1)" in ended.err
    assert "Storage=persistent" in ended.err
    assert journal.logs(run_of(1), "--json").json["missing"] == [1]


def test_what_others_log_moves_no_cursor_and_forges_no_line(journal: Journal) -> None:
    forged = "one\n14:13:21.000000 2 kernel  forged\x1b[2J\u202e"
    journal.lay(
        "boot1",
        entry(1.0, BEGAN, forged),
        entry(2.0, BEGAN, list(b"\xff bytes"), SYSLOG_IDENTIFIER="x\x1b[2J"),
        entry(3.0, BEGAN, None),
        entry(4.0, BEGAN, ["twice", "said"], SYSLOG_IDENTIFIER=None, _COMM="sh"),
    )
    ended = journal.logs(run_of(1))
    lines = ended.out.splitlines()
    assert all(line.isprintable() for line in lines)
    assert lines[2].lstrip().startswith("|  14:13:21.000000 2 kernel  forged\\x1b[2J\\u202e")
    assert "\\xff bytes" in lines[3]
    assert lines[5].endswith("twice")
    assert " sh " in lines[5]


def test_as_json_it_is_one_document(journal: Journal) -> None:
    found = journal.logs(run_of(1), "--json").json
    assert (found["run"], found["missing"]) == (run_of(1), [])
    assert [line["boot"] for line in found["lines"]] == [1, 1, 1, 2, 2]
    assert found["lines"][1] == {
        "at": BEGAN + 0.5,
        "monotonic": 100.5,
        "boot": 1,
        "source": "kernel",
        "priority": 6,
        "text": "kexec_file: loaded",
    }


def test_a_journal_that_cannot_be_read_is_an_error(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    (journal.directory / "fails").write_text("No journal files were opened due to insufficient permissions.\n")
    ended = journal.logs(run_of(1))
    assert ended.code == Exit.failed
    assert "insufficient permissions" in ended.err
    assert "systemd-journal" in ended.err
    monkeypatch.setenv("PATH", "/nowhere")
    assert "ENOENT" in journal.logs(run_of(1)).err


def test_an_attempt_that_does_not_exist_is_named(journal: Journal) -> None:
    ended = journal.logs("ffff")
    assert ended.code == Exit.usage
    assert "ffff" in ended.err
