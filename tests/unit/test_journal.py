# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a record in the journal has: text, priority, and fields to search by."""

import ast
import asyncio
import fcntl
import json
import os
import re
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from khod.abi import memfd
from khod.engine import announcements, journal
from khod.engine.journal_fields import PHASE_IDS, Message, Priority, event_fields
from khod.handover.record import Record
from khod.history.model import ColdBoot
from khod.history.set_aside import Fault, SetAside
from khod.model import Begun, Event, EventKind, Finding, FindingSeverity, FindingSource, Phase, Producer, StepTiming
from khod.systemd import journal_record
from tests.unit.khods import REPOSITORY
from tests.unit.unread import GOES_ON, send_until_it_blocks

CATALOG = REPOSITORY / "systemd/catalog/khod.catalog"
IDENTIFIER = re.compile(r"[0-9a-f]{32}")

RECORD = Record(begun=Begun(1.0, "root (khoctl, process 7)", "vmlinuz"), timings=(StepTiming("freeze", 1.0, 0.25),))


def written(event: Event, *, entered: bool = False) -> tuple[str, dict[str, Any]]:
    return event_fields(event, entered=entered, record=RECORD)


def about(answer: str, *, waiting: bool = False) -> Event:
    told = Producer("db", "hook", 0, "freeze", answer, 1.5, waiting, None)
    kind = EventKind.producer_waits if waiting else EventKind.producer_answered
    return Event(
        1.0, Phase.freezing, f"db: freeze: {answer}", "run", told, kind=kind, duration=None if waiting else 1.5
    )


def test_a_phase_that_is_entered_has_its_message_id_once() -> None:
    entered = Event(1.0, Phase.frozen, "freeze took 0.250 s", "run")
    assert written(entered, entered=True)[1]["MESSAGE_ID"] == PHASE_IDS[Phase.frozen]
    assert "MESSAGE_ID" not in written(entered)[1]


def test_a_record_says_who_began_the_handover_and_what_a_step_took() -> None:
    ended = Event(
        1.0, Phase.frozen, "freeze took 0.250 s", "run", kind=EventKind.step_ended, step="freeze", duration=0.25
    )
    found = written(ended, entered=True)[1]
    assert found["KHO_EVENT"] == "step_ended"
    assert (found["KHO_STEP"], found["KHO_DURATION_USEC"]) == ("freeze", "250000")
    assert (found["KHO_INITIATOR"], found["KHO_IMAGE"]) == ("root (khoctl, process 7)", "vmlinuz")
    assert "KHO_INITIATOR" not in written(Event(1.0, Phase.idle, "khod started", ""))[1]


def test_the_record_of_the_end_says_who_had_begun_and_how_long_the_producers_stood_still() -> None:
    _, found = event_fields(
        Event(1.0, Phase.verified, "all arrived", "run"), entered=True, record=replace(RECORD, blackout_seconds=1.25)
    )
    assert (found["KHO_RUN"], found["KHO_INITIATOR"]) == ("run", "root (khoctl, process 7)")
    assert found["KHO_BLACKOUT_USEC"] == "1250000"


@pytest.mark.parametrize(
    ("event", "priority", "message"),
    [
        (about("ready"), Priority.info, None),
        (about("not yet: a checkpoint", waiting=True), Priority.info, None),
        (about("no luck"), Priority.warning, Message.refusal),
        (replace(about("stuck"), phase=Phase.rolling_back), Priority.err, Message.refusal),
        (Event(1.0, Phase.frozen, "eth0 came", "run", kind=EventKind.device), Priority.notice, Message.device),
    ],
)
def test_a_no_is_a_warning_and_is_found_by_its_message_id(
    event: Event, priority: Priority, message: Message | None
) -> None:
    text, found = written(event)
    assert text == f"{event.phase.value.replace('_', ' ')}: {event.message}"
    assert (found["PRIORITY"], found.get("MESSAGE_ID")) == (priority, message and message.identifier)
    if event.producer is not None:
        assert (found["KHO_PRODUCER"], found["KHO_VERB"]) == ("db", "freeze")
        assert found["KHO_DURATION_USEC"] == "1500000"


@pytest.mark.parametrize(
    ("phase", "entered", "priority"),
    [
        (Phase.preparing, True, Priority.notice),
        (Phase.frozen, True, Priority.info),
        (Phase.executing, True, Priority.notice),
        (Phase.verified, True, Priority.notice),
        (Phase.degraded, True, Priority.err),
        (Phase.degraded, False, Priority.info),
        (Phase.cold_boot, True, Priority.err),
        (Phase.rolling_back, True, Priority.warning),
        (Phase.rolling_back, False, Priority.warning),
        (Phase.failed, True, Priority.crit),
    ],
)
def test_a_priority_says_how_bad_it_is(phase: Phase, entered: bool, priority: Priority) -> None:
    assert written(Event(1.0, phase, "a sentence", "run"), entered=entered)[1]["PRIORITY"] == priority


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What is given to journald."""
    found: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(journal, "_send_record", lambda text, fields: found.append((text, fields)))
    return found


def test_each_finding_has_a_record_up_to_a_number(sent: list[tuple[str, dict[str, Any]]]) -> None:
    lost = Finding("", "page 7 differs", FindingSource.content, "pages", FindingSeverity.changed)
    announcements.announce_findings([Finding.of_producer("db", "gone\n"), lost, *[lost] * 100], "run")
    assert sent[0] == (
        "Verification: producer db: gone\n",
        {
            "PRIORITY": 4,
            "SYSLOG_IDENTIFIER": "khod",
            "CODE_FUNC": "",
            "KHO_RUN": "run",
            "MESSAGE_ID": Message.finding.identifier,
            "KHO_PRODUCER": "db",
            "KHO_FINDING_SOURCE": "producer",
            "KHO_FINDING_SUBJECT": "db",
            "KHO_FINDING_SEVERITY": "lost",
        },
    )
    assert (sent[1][1]["KHO_FINDING_SUBJECT"], sent[1][1]["KHO_FINDING_SEVERITY"]) == ("pages", "changed")
    assert len(sent) == announcements.MAX_FINDINGS + 1
    assert "38 more findings" in sent[-1][0]


def test_a_cold_boot_is_explained_with_its_last_words(sent: list[tuple[str, dict[str, Any]]]) -> None:
    cold = ColdBoot("the next kernel panicked", Phase.executing, last_words=["Kernel panic", "end"], watchdog=False)
    announcements.announce_cold_boot(cold, "run")
    text, found = sent[0]
    assert text.split("\n")[1:] == ["Kernel panic", "end"]
    assert (found["KHO_LAST_PHASE"], found["KHO_WATCHDOG"], found["PRIORITY"]) == ("executing", "0", 3)


def test_an_image_and_a_history_are_named(sent: list[tuple[str, dict[str, Any]]]) -> None:
    announcements.announce_image_barred("vmlinuz", "ab" * 32, "it ended as a cold boot", "run")
    announcements.announce_set_aside(SetAside(Path("/var/lib/khod/history.db.1"), Fault.damaged))
    assert [found["MESSAGE_ID"] for _, found in sent] == [
        Message.image_barred.identifier,
        Message.history_set_aside.identifier,
    ]
    assert sent[0][1]["KHO_IMAGE_DIGEST"] == "ab" * 32
    assert (sent[1][1]["KHO_PATH"], sent[1][1]["KHO_HISTORY_FAULT"]) == ("/var/lib/khod/history.db.1", "damaged")


# The catalogue


def identifiers_in_code() -> Iterator[str]:
    """Every text of khod and khoctl that can only be a MESSAGE_ID of theirs.

    Those of systemd stand in khod/systemd, Zincati's application ID in khod/fleetlock.
    """
    for path in (*(REPOSITORY / "khod").rglob("*.py"), *(REPOSITORY / "khoctl").rglob("*.py")):
        if path.parent in (REPOSITORY / "khod/systemd", REPOSITORY / "khod/fleetlock"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and IDENTIFIER.fullmatch(node.value):
                yield node.value


def test_the_catalogue_has_every_message_and_no_other() -> None:
    in_code = list(identifiers_in_code())
    entries = re.findall(r"^-- (\S+)$", CATALOG.read_text(), re.MULTILINE)
    assert len(entries) == len(set(entries)) == len(Phase) + len(Message)
    assert set(entries) == set(in_code)
    assert len(in_code) == len(set(in_code)), "one MESSAGE_ID stands for two things"


def test_journalctl_takes_the_catalogue(tmp_path: Path) -> None:
    """It compiles it, and finds the entry of each message with its substitutions."""
    place = tmp_path / "usr/lib/systemd/catalog"
    place.mkdir(parents=True)
    (place / CATALOG.name).write_bytes(CATALOG.read_bytes())
    (tmp_path / "var/lib/systemd/catalog").mkdir(parents=True)

    def journalctl(*words: str) -> str:
        command = ["journalctl", f"--root={tmp_path}", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout

    journalctl("--update-catalog")
    listed = journalctl("--list-catalog")
    assert set(IDENTIFIER.findall(listed)) == {*PHASE_IDS.values(), *(message.identifier for message in Message)}
    assert "Producer @KHO_PRODUCER@ failed" in journalctl("--dump-catalog", Message.refusal.identifier)


@pytest.fixture
def journald(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.bind(str(tmp_path / "journald"))
        monkeypatch.setattr(journal_record, "SOCKET", str(tmp_path / "journald"))
        yield made


def test_a_record_is_sent_as_journald_reads_it(journald: socket.socket) -> None:
    journal_record.send_record({"MESSAGE": "one line", "PRIORITY": 6, "LINES": "a\nb"})
    assert journald.recv(4096) == b"MESSAGE=one line\nPRIORITY=6\nLINES\n\x03\0\0\0\0\0\0\0a\nb\n"


def test_a_record_that_is_too_long_for_a_message_is_sent_in_a_file(journald: socket.socket) -> None:
    journal_record.send_record({"MESSAGE": "x" * (4 << 20)})
    text, (fd,), _, _ = socket.recv_fds(journald, 4096, 1)
    assert text == b""
    assert os.pread(fd, 5 << 20, 0) == b"MESSAGE=" + b"x" * (4 << 20) + b"\n"
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == memfd.SEALS
    os.close(fd)


def test_a_host_without_journald_has_no_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_record, "SOCKET", str(tmp_path / "none"))
    journal_record.send_record({"MESSAGE": "text"})


def test_khod_goes_on_while_journald_reads_nothing(journald: socket.socket) -> None:
    prepare = "from khod.systemd import journal_record; journal_record.SOCKET = sys.argv[1]"
    send = 'journal_record.send_record({"MESSAGE": "text"})'
    assert send_until_it_blocks(prepare, send, journald.getsockname()) == GOES_ON


async def settle(journald: socket.socket, path: Path, answer: bytes) -> list[bytes]:
    """Have a record wait to be sent, and settle the journal; return what journald has when it is to write it."""
    found: list[bytes] = []
    may_send = threading.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        call = await reader.readuntil(b"\0")
        assert json.loads(call[:-1])["method"] == "io.systemd.Journal.Synchronize"
        found.append(journald.recv(4096))
        writer.write(answer)

    async with await asyncio.start_unix_server(serve, path):
        journal._queue_for_journald(may_send.wait)
        journal.write_message(Message.refusal, "the last record")
        settling = asyncio.ensure_future(journal.settle_journal())
        asyncio.get_running_loop().call_soon(may_send.set)  # after the first step of `settling`
        await settling
    return found


@pytest.mark.parametrize("answer", [b"{}\0", b"{", b""])
def test_the_journal_is_written_once_journald_has_every_record(
    journald: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    """An answer that does not come ends the wait, not the jump."""
    monkeypatch.setattr("khod.systemd.journald.SOCKET", str(tmp_path / "varlink"))
    if answer != b"{}\0":
        monkeypatch.setattr(journal, "JOURNAL_SECONDS", 0.5)
    journald.setblocking(False)
    (found,) = asyncio.run(settle(journald, tmp_path / "varlink", answer))
    assert b"MESSAGE=the last record\n" in found
