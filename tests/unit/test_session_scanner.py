# SPDX-License-Identifier: LGPL-2.1-or-later
"""The scanner as a program, and what khod makes of its answers."""

import errno
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from khod.abi.liveupdate import LIVEUPDATE
from khod.producers import session_scanner
from khod.producers.session_holders import find_sessions, scan_others
from khod.producers.session_scan import LINK, HeldSession, HoldingProcess, SessionScan, scan_processes
from khod.producers.session_scanner import SCANNER_SOCKET, ask_scanner, serve_scans
from khod.values import encode_value
from tests.unit.khods import DEADLINE, REPOSITORY
from tests.unit.test_session_holders import Proc, Silent

NO_PID = 1 << 30
"""More than any kernel gives a process (PID_MAX_LIMIT): the program asks the kernel that runs this test."""
PROCESS = HoldingProcess(12, "db", ("system.slice", "db.service"))
FOUND = HeldSession("db", [PROCESS], incoming=False)


@pytest.fixture
def proc(tmp_path: Path) -> Proc:
    return Proc(tmp_path / "host")


@contextmanager
def serving(path: Path, serve: Callable[[socket.socket], object]) -> Iterator[str]:
    """A scanner's socket; `serve` has the first connection, which is closed after it."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def accept() -> None:
            connection, _ = listener.accept()
            with connection:
                serve(connection)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield str(path)
        thread.join()


@contextmanager
def answering(path: Path, answer: bytes) -> Iterator[str]:
    with serving(path, lambda connection: connection.sendall(answer)) as served:
        yield served


def encoded(scan: SessionScan) -> bytes:
    return json.dumps(scan, default=encode_value).encode()


def ask(proc: Proc, path: Path, answer: bytes) -> SessionScan:
    with answering(path, answer) as served:
        return ask_scanner(proc, served)


@contextmanager
def running(root: Path, path: Path) -> Iterator[str]:
    """The program, its socket passed as systemd passes it."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.setblocking(False)
        program = [sys.executable, "-m", "khod.producers.session_scanner", str(root)]
        command = ["bash", "-c", f'exec "$0" "$@" 3<&{listener.fileno()}', *program]
        process = subprocess.Popen(command, pass_fds=[listener.fileno()], cwd=REPOSITORY)
        try:
            yield str(path)
            assert process.poll() is None, "it stays"
        finally:
            process.kill()
            process.wait()


@contextmanager
def scanning(proc: Proc, path: Path) -> Iterator[str]:
    """The scanner of a host in a directory, in this process."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            with suppress(OSError):  # the listener is shut down
                serve_scans(proc, listener)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield str(path)
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def read_answer(path: str) -> bytes:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(DEADLINE)
        connection.connect(path)
        return connection.makefile("rb").read()


def test_the_program_answers_each_connection(proc: Proc, tmp_path: Path) -> None:
    """It does not look for /dev/liveupdate, which its unit hides."""
    proc.process(NO_PID, "db", "/system.slice/db.service", f"{LINK} db", "/dev/zero")
    proc.host_path(LIVEUPDATE).rmdir()
    with running(proc.root, tmp_path / "socket") as path:
        first = json.loads(read_answer(path))
        proc.process(NO_PID + 1, "other", "", f"{LINK} other")
        second = json.loads(read_answer(path))
    assert first == {
        "sessions": [
            {
                "name": "db",
                "processes": [{"pid": NO_PID, "command": "db", "units": ["system.slice", "db.service"]}],
                "incoming": None,
            }
        ],
        "unseen": "",
    }
    assert [held["name"] for held in second["sessions"]] == ["db", "other"]


def test_the_program_goes_on_where_nobody_waits_for_its_answer(proc: Proc, tmp_path: Path) -> None:
    proc.process(NO_PID, "db", "/system.slice/db.service", f"{LINK} db")
    with running(proc.root, tmp_path / "socket") as path:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(path)
        assert json.loads(read_answer(path))["sessions"]


def test_khod_learns_what_the_program_found(proc: Proc, tmp_path: Path) -> None:
    """The same as where it looks itself, also of names that are no UTF-8."""
    proc.behind = {"long": "n" * 60, "6.19": ""}
    proc.incoming = {"came"}
    proc.process(12, "db", "/system.slice/db.service", f"{LINK} db", f"{LINK} came", "long")
    proc.process(13, "vmm", "", f"{LINK} db", "6.19", f"{LINK} \udcff")
    with scanning(proc, tmp_path / "socket") as path:
        scan = ask_scanner(proc, path)
    assert scan == scan_processes(proc)
    assert {(held.name, held.incoming, len(held.processes)) for held in scan.sessions} == {
        ("db", False, 2),
        ("came", True, 1),
        ("n" * 60, False, 1),
        ("", False, 1),
        ("\udcff", False, 1),
    }


def test_a_long_answer_goes_out_to_a_slow_reader(proc: Proc, tmp_path: Path) -> None:
    for pid in range(1, 3000):
        proc.process(pid, "db", "/system.slice/db.service", f"{LINK} db{pid}")
    with scanning(proc, tmp_path / "socket") as path:
        scan = ask_scanner(proc, path)
    assert len(scan.sessions) == 2999
    assert len(encoded(scan)) > 200_000, "more than a socket's buffer"


def test_what_the_program_may_not_look_at_is_said(proc: Proc, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    proc.process(12, "db", "/system.slice/db.service", f"{LINK} db")

    def refused(path: str) -> list[str]:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(proc, "list_directory", refused)
    with scanning(proc, tmp_path / "socket") as path:
        scan = ask_scanner(proc, path)
    assert scan.sessions == []
    assert "/proc" in scan.unseen


def test_without_luo_nobody_is_asked(proc: Proc) -> None:
    proc.host_path(LIVEUPDATE).rmdir()
    assert ask_scanner(proc, "/nonexistent") == SessionScan()


@pytest.mark.parametrize("listens", [False, True])
def test_where_nobody_listens_nothing_is_seen(proc: Proc, tmp_path: Path, listens: bool) -> None:
    path = tmp_path / "socket"
    if listens:  # and ended without taking the socket away
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    scan = ask_scanner(proc, str(path))
    assert scan.sessions == []
    assert os.strerror(errno.ECONNREFUSED if listens else errno.ENOENT) in scan.unseen
    assert "kho-sessions.socket" in scan.unseen


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\0\xff",
        b"null",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b'{"sessions": [], "unseen": 5}',
        b'{"sessions": [{}], "unseen": ""}',
        b'{"sessions": [{"name": "db", "processes": [], "incoming": null}], "unseen": ""}',
        encoded(SessionScan([FOUND]))[:-1],
        encoded(SessionScan([FOUND])) * 2,
        encoded(SessionScan([FOUND])).replace(b"12", b"true"),
        encoded(SessionScan([FOUND])).replace(b"12", b"9" * 10_000),
        encoded(SessionScan([FOUND])).replace(b"false", b"0"),
        encoded(SessionScan([FOUND])).replace(b"system.slice", rb"\udcff.service"),
    ],
    ids=lambda answer: answer[:30].decode(errors="replace"),
)
def test_an_answer_that_is_none_shows_nothing(proc: Proc, tmp_path: Path, answer: bytes) -> None:
    assert ask(proc, tmp_path / "socket", encoded(SessionScan([FOUND]))) == SessionScan([FOUND])
    scan = ask(proc, tmp_path / "second", answer)
    assert scan.sessions == []
    assert "cannot be read" in scan.unseen


def test_an_answer_without_an_end_shows_nothing(proc: Proc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_scanner, "MAX_ANSWER_BYTES", 1 << 20)

    def serve(connection: socket.socket) -> None:
        with suppress(ConnectionError):
            while True:
                connection.sendall(b" " * (1 << 16))

    with serving(tmp_path / "socket", serve) as path:
        scan = ask_scanner(proc, path)
    assert "cannot be read" in scan.unseen


@pytest.mark.parametrize("begun", [False, True])
def test_a_scanner_that_does_not_end_is_waited_for_no_longer_than_that(proc: Proc, tmp_path: Path, begun: bool) -> None:
    """Also where it goes on byte by byte."""
    asked = threading.Event()

    def serve(connection: socket.socket) -> None:
        with suppress(ConnectionError):
            while not asked.wait(0.001):
                if begun:
                    connection.sendall(b" ")

    with serving(tmp_path / "socket", serve) as path:
        scan = ask_scanner(proc, path, 0.1)
        asked.set()
    assert scan == SessionScan(unseen=f"kho-sessions.socket ({path}): no answer within 0.1 s")


def test_the_check_goes_on_without_an_answer(proc: Proc, tmp_path: Path) -> None:
    """The sessions of a scanner that was killed in the middle of its answer are not known."""
    with answering(tmp_path / "socket", encoded(SessionScan([FOUND]))[:5]) as path:
        seen = find_sessions(proc, systemd=Silent(), scanner=lambda calls: ask_scanner(calls, path))
    assert seen.sessions == ()
    assert "cannot be read" in seen.unseen


def test_what_khod_itself_has_open_is_not_another_s(proc: Proc) -> None:
    """The scanner does not know which process khod is."""
    khod = HoldingProcess(os.getpid(), "khod", ("system.slice", "kho-handover.service"))
    scan = SessionScan(
        [HeldSession("shared", [khod, PROCESS], None), HeldSession("own", [khod], None), FOUND], "not all"
    )
    assert scan_others(proc, lambda _calls: scan) == SessionScan(
        [HeldSession("shared", [PROCESS], None), FOUND], "not all"
    )


def test_the_units_are_those_that_khod_asks() -> None:
    listener = (REPOSITORY / "systemd/kho-sessions.socket").read_text()
    service = (REPOSITORY / "systemd/kho-sessions.service").read_text()
    assert f"ListenStream={SCANNER_SOCKET}\n" in listener
    assert f"-m {session_scanner.__name__}\n" in service
    khod = (REPOSITORY / "systemd/kho-handover.service").read_text().splitlines()
    assert not [line for line in khod if "CAP_SYS_PTRACE" in line and not line.startswith("#")]


def test_its_import_makes_no_call_that_its_unit_forbids() -> None:
    """uname(2), which platform.machine() makes, is not in SystemCallFilter=."""
    forbid = "import os\ndef refused(): raise PermissionError\nos.uname = refused\n"
    subprocess.run([sys.executable, "-c", f"{forbid}import {session_scanner.__name__}"], check=True)
