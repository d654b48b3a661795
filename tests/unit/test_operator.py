# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an operator meets at khoctl: interrupts, a khod that hangs or dies, a jump, questions, clocks."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import khod.client.handover
from khoctl import progress, render, session
from khoctl.commands import handover, watching
from khod.errors import Exit
from khod.model import Event, Phase, Producer
from tests.unit.images import CPIO, bzimage
from tests.unit.khods import DEADLINE, REPOSITORY, Khod, Terminal, cli, wait_readable
from tests.unit.test_render import status

LAST = "last"
"""In a reply: after this one the connection ends."""

Answers = dict[str, Any] | Iterator[dict[str, Any] | bytes | None] | None
Replies = Callable[[str, int], Answers]
"""A method's short name and how often it was called before, to the parameters. None: hang up; bytes: just these."""


def model(value: object) -> Any:
    return json.loads(render.as_json(value))


class Fake:
    """A khod of our own: it answers what the test says. `silent` methods are taken and not answered."""

    def __init__(self, path: Path, replies: Replies, silent: tuple[str, ...] = ()) -> None:
        self.calls: list[str] = []
        self._replies, self._silent = replies, silent
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(ConnectionError):
            text = b""
            while data := connection.recv(1 << 16):
                *calls, text = (text + data).split(b"\0")
                for call in map(json.loads, calls):
                    method = call["method"].rpartition(".")[2]
                    self.calls.append(method)
                    if method in self._silent:
                        continue
                    found = self._replies(method, self.calls.count(method) - 1)
                    for parameters in found if isinstance(found, Iterator) else (found,):
                        if parameters is None:
                            return
                        if isinstance(parameters, bytes):
                            connection.sendall(parameters)
                            continue
                        last = parameters.pop(LAST, False)
                        reply = {"parameters": parameters, **({"continues": True} if call.get("more") else {})}
                        connection.sendall(json.dumps(reply).encode() + b"\0")
                        if last:
                            return

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()


@contextmanager
def fake(path: Path, replies: Replies, *silent: str) -> Iterator[Fake]:
    made = Fake(path, replies, silent)
    try:
        yield made
    finally:
        made.close()


def in_phase(phase: Phase, boots: tuple[str, ...] = ("one",)) -> Callable[[str, int], dict[str, Any] | None]:
    """A khod in this phase, in the first boot at the first call of Status and so on, that dies at every operation."""

    def replies(method: str, before: int) -> dict[str, Any] | None:
        if method == "Status":
            return {"status": model(replace(status(phase), boot_id=boots[min(before, len(boots) - 1)]))}
        if method == "Monitor":
            return {"event": model(Event(1.0, phase, "", "run"))}
        return None

    return replies


@pytest.mark.parametrize("words", [("status",), ("check",), ("producers",), ("dt", "list"), ("abort",), ("monitor",)])
def test_a_khod_that_hangs_is_named_and_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.setattr(khod.client.handover, "SLOW_SECONDS", 0.01)
    everything = ("Status", "Check", "Producers", "Snapshots", "Abort", "Monitor")
    with fake(tmp_path / "socket", in_phase(Phase.idle), *everything):
        ended = cli(tmp_path / "socket", *words, "--timeout", "2")
    assert ended.code == Exit.unreachable
    assert ended.out == ""
    assert f"Still waiting for khod (process {os.getpid()})" in ended.err
    assert "khod has not answered within 2 s" in ended.err


def test_an_operation_may_take_long_while_khod_answers_and_ends_where_it_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SLOW_SECONDS", 0.01)
    monkeypatch.setattr(khod.client.handover, "ANSWER_SECONDS", 3.0)
    hung = threading.Event()

    def replies(method: str, before: int) -> dict[str, Any] | None:
        if method == "Status" and before == 3:
            hung.wait(DEADLINE)
        return in_phase(Phase.preparing)(method, before)

    with fake(tmp_path / "socket", replies, "Activate") as made:
        ended = cli(tmp_path / "socket", "activate")
        hung.set()
    assert ended.code == Exit.unreachable
    assert "khod has not answered within 3 s" in ended.err
    assert made.calls.count("Status") == 4


def test_what_happens_is_seen_while_khod_is_asked_whether_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was asked in the blackout and had no time to answer: the jump that came was taken for a khod that died."""
    monkeypatch.setattr(progress, "SLOW_SECONDS", 0.01)
    asked = threading.Event()

    def events() -> Iterator[dict[str, Any] | None]:
        yield {"event": model(Event(1.0, Phase.idle, "", "run"))}
        asked.wait(DEADLINE)
        yield {"event": model(Event(2.0, Phase.executing, "execute began", "run"))}
        yield None

    def replies(method: str, before: int) -> Answers:
        if method == "Monitor":
            return events()
        if method == "Status" and before == 1:
            asked.set()
            return None
        if method == "Kexec":
            asked.wait(DEADLINE)
            return None
        return in_phase(Phase.idle, ("one", "one", "two"))(method, before)

    with fake(tmp_path / "socket", replies):
        ended = cli(tmp_path / "socket", "kexec")
    assert ended.code == Exit.done, ended.err
    assert "execute began" in ended.err
    assert "The host jumped" in ended.err


def test_an_operation_ends_for_the_operator_when_the_time_given_is_over(tmp_path: Path) -> None:
    with fake(tmp_path / "socket", in_phase(Phase.preparing), "Activate"):
        ended = cli(tmp_path / "socket", "activate", "--timeout", "0.1")
    assert ended.code == Exit.unreachable
    assert "The handover continues in the background" in ended.err
    assert "khoctl abort" in ended.err


@pytest.mark.parametrize("flags", [(), ("--json",), ("--now", "--json")], ids=str)
def test_a_jump_is_no_failure(tmp_path: Path, flags: tuple[str, ...]) -> None:
    with fake(tmp_path / "socket", in_phase(Phase.executing, ("one", "two"))):
        ended = cli(tmp_path / "socket", "kexec", *flags)
    assert ended.code == Exit.done
    assert "The host jumped" in ended.err
    if "--json" in flags:
        assert (ended.json["phase"], ended.json["exit_code"]) == ("executing", 0)


@pytest.mark.parametrize("flags", [(), ("--json",)], ids=str)
def test_a_khod_killed_on_the_way_is_no_jump(tmp_path: Path, flags: tuple[str, ...]) -> None:
    with fake(tmp_path / "socket", in_phase(Phase.executing)):
        ended = cli(tmp_path / "socket", "kexec", *flags)
    assert ended.code == Exit.unreachable
    assert "khod ended while the host was on its way" in ended.err
    assert "khoctl verify" in ended.err


def test_a_khod_killed_earlier_is_said_as_that(tmp_path: Path) -> None:
    with fake(tmp_path / "socket", in_phase(Phase.loading)):
        ended = cli(tmp_path / "socket", "kexec", "--json")
    assert (ended.code, ended.json["what"]) == (Exit.unreachable, "khod closed the connection")


def test_the_clocks_of_a_watched_status_go_on_without_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(watching, "can_repaint", lambda _stream: True)

    def replies(method: str, before: int) -> dict[str, Any] | None:
        if method == "Status":
            return {"status": model(replace(status(Phase.idle), summary=f"{before} s"))} if before < 4 else None
        return in_phase(Phase.idle)(method, before)

    with fake(tmp_path / "socket", replies) as made:
        ended = cli(tmp_path / "socket", "status", "--watch")
    assert made.calls.count("Monitor") == 1
    assert [f"{second} s" in ended.out for second in range(5)] == [True, True, True, True, False]
    assert ended.out.count(watching.CLEAR) == 4


@pytest.fixture
def blocked(tmp_path: Path) -> Iterator[Khod]:
    """A khod with a producer that prepares until somebody writes to the FIFO."""
    os.mkfifo(tmp_path / "fifo")
    hooks = tmp_path / "root/etc/kho/producers.d"
    hooks.mkdir(parents=True)
    (hooks / "db.toml").write_text(f'prepare = ["cat", "{tmp_path / "fifo"}"]\ncancel = ["true"]\n')
    made = Khod(tmp_path)
    yield made
    made.close()


def test_an_interrupt_ends_khoctl_at_once_and_khod_goes_on(blocked: Khod) -> None:
    command = ["env", "--default-signal=INT", sys.executable, "-m", "khoctl", f"--socket={blocked.socket}", "activate"]
    with subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) as activate:
        assert activate.stderr is not None
        assert "preparing" in activate.stderr.readline()
        activate.send_signal(signal.SIGINT)
        said = activate.stderr.read()
    assert activate.returncode == session.INTERRUPTED
    assert blocked.ask("Status")["status"]["phase"] == "preparing", "nobody has let the producer go on"
    assert "The handover continues in the background. To see: khoctl status. To stop it: khoctl abort" in " ".join(
        said.split()
    )
    assert blocked.khoctl("abort").code == Exit.done


@pytest.mark.parametrize(("answer", "code", "phase"), [("y", Exit.failed, "idle"), ("n", 130, "preparing")])
def test_an_interrupt_on_a_terminal_offers_to_abort(blocked: Khod, answer: str, code: int, phase: str) -> None:
    terminal = Terminal(blocked, "activate")
    terminal.until("preparing")
    terminal.send("\x03")
    terminal.until("the handover goes on (preparing). Abort it? [y/N] ")
    terminal.send(f"{answer}\n")
    assert terminal.end() == code
    assert blocked.ask("Status")["status"]["phase"] == phase
    assert blocked.khoctl("abort").code == Exit.done


def test_an_operation_may_be_left_to_khod(blocked: Khod) -> None:
    ended = blocked.khoctl("activate", "--no-block")
    assert ended.code == Exit.done
    assert ended.out.startswith("preparing")
    assert blocked.khoctl("abort").code == Exit.done
    assert blocked.khoctl("dt", "show").code == Exit.refused, "it was not activated"


def test_what_is_refused_is_said_also_where_the_operation_is_left_to_khod(blocked: Khod) -> None:
    ended = blocked.khoctl("kexec", "--no-block")
    assert ended.code != Exit.done
    assert "--image" in ended.err


@pytest.fixture
def images(tmp_path: Path) -> tuple[str, ...]:
    (tmp_path / "vmlinuz").write_bytes(bzimage())
    (tmp_path / "initrd").write_bytes(CPIO)
    return "--image", str(tmp_path / "vmlinuz"), "--initrd", str(tmp_path / "initrd")


def test_a_terminal_is_asked_before_anyone_is_told_and_a_no_changes_nothing(
    blocked: Khod, images: tuple[str, ...]
) -> None:
    terminal = Terminal(blocked, "kexec", *images)
    terminal.until("Begin the handover? [y/N] ")
    assert "tell db to prepare" in terminal.said
    assert "the point of no return" in terminal.said
    terminal.send("\n")
    assert terminal.end() == Exit.refused
    assert "Nothing was changed" in terminal.said
    found = blocked.ask("Status")["status"]
    assert (found["phase"], [one["phase"] for one in found["producers"]]) == ("idle", [""])


@pytest.mark.parametrize(("flags", "asked"), [((), True), (("--yes",), False), (("-y",), False)], ids=str)
def test_a_yes_begins_the_handover_and_may_be_given_beforehand(
    blocked: Khod, images: tuple[str, ...], flags: tuple[str, ...], asked: bool
) -> None:
    terminal = Terminal(blocked, "kexec", *images, *flags)
    if asked:
        terminal.until("Begin the handover? [y/N] ")
        terminal.send("y\n")
    terminal.until("preparing")
    assert ("Begin the handover?" in terminal.said) is asked
    assert blocked.khoctl("abort").code == Exit.done
    assert terminal.end() == Exit.failed


def test_a_terminal_is_not_asked_while_anyone_is_frozen(khod_: Khod, images: tuple[str, ...]) -> None:
    assert khod_.khoctl("activate").code == Exit.done
    terminal = Terminal(khod_, "kexec", *images, "--load-only")
    assert terminal.end() == Exit.done
    assert "Begin the handover?" not in terminal.said
    assert khod_.loaded


def test_a_terminal_is_not_asked_about_what_would_be_refused(khod_: Khod, images: tuple[str, ...]) -> None:
    (khod_.directory / "vmlinuz").write_bytes(bzimage()[:-0x1000])
    terminal = Terminal(khod_, "kexec", *images, "--json")
    assert terminal.end() == Exit.refused
    assert '"where": "check image"' in terminal.said
    assert "Begin the handover?" not in terminal.said


def test_without_a_terminal_nobody_is_asked(khod_: Khod, images: tuple[str, ...]) -> None:
    assert khod_.khoctl("kexec", *images, "--load-only").code == Exit.done
    assert khod_.loaded


@pytest.fixture
def khod_(tmp_path: Path) -> Iterator[Khod]:
    made = Khod(tmp_path)
    yield made
    made.close()


def test_without_khod_the_kernel_itself_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"sys/kernel/kho/active": "1\n", "sys/kernel/kexec_loaded": "0\n"}
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    said = handover.kernel_says(tmp_path)
    assert "in the active phase, the producers may be frozen (/sys/kernel/kho/active)" in said
    assert "no image is loaded (/sys/kernel/kexec_loaded)" in said
    (tmp_path / "sys/kernel/kho/active").write_text("0\n")
    (tmp_path / "sys/kernel/kexec_loaded").write_text("1\n")
    assert "not in the active phase" in handover.kernel_says(tmp_path)
    assert "an image is loaded" in handover.kernel_says(tmp_path)
    assert handover.kernel_says(tmp_path / "sys") == ""
    monkeypatch.setattr(handover, "kernel_says", lambda: "The kernel itself says: this.")
    ended = cli(tmp_path / "socket", "status", "--json")
    assert (ended.code, "The kernel itself says: this." in ended.json["remedy"]) == (Exit.unreachable, True)


def test_progress_says_how_many_are_ready_and_how_long_the_others_have(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = progress.ProgressView(quiet=False)
    shown.expected = 3
    now = 100.0
    monkeypatch.setattr("khoctl.progress.time.monotonic", lambda: now)
    shown.show_event(Event(0.0, Phase.idle, "", ""))
    for name, answer, limit in (("a", "ready", 60.0), ("b", "no: busy", 60.0), ("db", "", 30.0)):
        told = Producer(name, "hook", 0, "prepare", answer, 0.0, answer == "", None, limit)
        shown.show_event(Event(1.0, Phase.preparing, "", "", told))
    now += 1.4
    assert shown.summary().strip() == "prepare: 1 of 3 ready, 1.4 s of 30 s"
    assert render.producer_text(told).endswith("0.00 s of 30 s")


def test_a_producer_s_deadline_is_known_while_it_is_told(blocked: Khod) -> None:
    hooks = blocked.directory / "root/etc/kho/producers.d/db.toml"
    hooks.write_text(f"{hooks.read_text()}timeout = 17\n")
    assert blocked.khoctl("activate", "--no-block").code == Exit.done
    (found,) = blocked.ask("Status")["status"]["producers"]
    assert (found["waiting"], found["limit"]) == (True, 17.0), "it comes before deadlines.prepare"
    assert blocked.khoctl("abort").code == Exit.done


def test_a_producer_that_is_waited_for_is_listed_alone(blocked: Khod) -> None:
    (blocked.directory / "root/etc/kho/producers.d/cache.toml").write_text('after = ["db"]\n')
    assert "No producer is waited for." in blocked.khoctl("producers", "--waiting").out
    assert blocked.khoctl("activate", "--no-block").code == Exit.done
    assert [one["name"] for one in blocked.khoctl("producers", "list", "--waiting", "--json").json] == ["db"]
    assert [one["name"] for one in blocked.khoctl("producers", "--slow", "--json").json] == ["db", "cache"]
    assert blocked.khoctl("abort").code == Exit.done


def test_a_phase_is_waited_for_by_its_name(khod_: Khod) -> None:
    assert khod_.khoctl("wait", "idle").code == Exit.done
    refused = khod_.khoctl("wait", "ready")
    assert refused.code == Exit.usage
    assert "One of: idle, preparing" in refused.err
    assert khod_.khoctl("wait", "loaded", "--timeout", "0.2").code == Exit.unreachable


def test_a_dry_run_of_kexec_is_the_plan(khod_: Khod, images: tuple[str, ...]) -> None:
    dry = khod_.khoctl("kexec", *images, "--hold", "--dry-run")
    assert (dry.code, dry.out.splitlines()[-1]) == (Exit.done, "Nothing was touched.")
    assert khod_.ask("Status")["status"]["phase"] == "idle"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("help",), "Commands:"),
        (("help", "kexec"), "--dry-run"),
        (("dt", "diff", "-h"), "A tree; the last that left."),
        (("producers", "retry", "-h"), "The producer, as khoctl producers lists it."),
    ],
    ids=str,
)
def test_help_is_there_by_its_name_and_explains_each_argument_once(
    tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    ended = cli(tmp_path / "socket", *words)
    assert (ended.code, ended.out.count(said)) == (Exit.done, 1)


def test_what_happens_before_a_refusal_is_no_beginning(tmp_path: Path) -> None:
    """A producer registers while khod still checks: khoctl waits on, and khod's answer is the refusal."""

    def event(message: str) -> bytes:
        told = {"seconds": 1.0, "phase": "idle", "message": message, "run": "", "producer": None, "words": None}
        told |= {"kind": "note", "step": "", "duration": None, "at": 0.0, "boot_id": ""}
        return json.dumps({"parameters": {"event": told}, "continues": True}).encode() + b"\0"

    with socket.socket(socket.AF_UNIX) as bound, ThreadPoolExecutor(1) as pool:
        bound.bind(str(tmp_path / "socket"))
        bound.listen()
        bound.settimeout(DEADLINE)
        asking = pool.submit(cli, tmp_path / "socket", "activate", "--no-block")
        calling, _address = bound.accept()
        watcher, _address = bound.accept()
        with calling, watcher:
            assert b"Monitor" in watcher.recv(4096)
            watcher.sendall(event(""))
            assert b"Activate" in calling.recv(4096)
            watcher.sendall(event("producer kv registered"))
            assert not wait_readable(bound.fileno(), 0.5), "it asks for the status, as once it has begun"
            watcher.sendall(event("device vda added"))
            no = {"error": "io.kho.Handover.Refused", "parameters": {"what": "No", "where": "", "remedy": ""}}
            calling.sendall(json.dumps(no).encode() + b"\0")
            ended = asking.result(DEADLINE)
    assert ended.code == Exit.refused, ended
