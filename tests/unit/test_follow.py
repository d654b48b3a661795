# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whoever watches a handover stays through the jump: monitor, wait and status --watch, and what ends them."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from khoctl import follow, session
from khod.engine.status import PHASE_TEXT
from khod.errors import Exit, Unreachable
from khod.model import Event, Phase, Status
from tests.unit.images import CPIO, bzimage
from tests.unit.khods import DEADLINE, REPOSITORY, Khod, Terminal, call, cli
from tests.unit.test_operator import LAST, Answers, Replies, fake, model
from tests.unit.test_render import status

JUMPS = {
    "verified": ({}, Exit.done),
    "degraded": ({"lose": True}, Exit.degraded),
    "cold_boot": ({"cold": True}, Exit.degraded),
}
"""The faults of the simulated kernel by what its jump comes to, and the exit code for that."""


@pytest.fixture
def khod(tmp_path: Path) -> Iterator[Khod]:
    (tmp_path / "vmlinuz").write_bytes(bzimage())
    (tmp_path / "initrd").write_bytes(CPIO)
    made = Khod(tmp_path)
    yield made
    made.close()


class Watcher:
    """A khoctl as a process, whose lines are read one by one; it heeds an interrupt, whatever is inherited."""

    def __init__(self, khod: Khod, *words: str) -> None:
        command = ["env", "--default-signal=INT", sys.executable, "-m", "khoctl", f"--socket={khod.socket}", *words]
        pipe = subprocess.PIPE
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        # Without a buffer: communicate() does not return what a buffer has read ahead of a line.
        self.process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=pipe, stderr=pipe, bufsize=0)

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode()

    def until(self, text: str) -> str:
        """Read to the line that has this text."""
        while text not in (line := self.line()):
            assert line, f"it has ended before {text!r}: {self.end()}"
        return line

    def end(self) -> tuple[int, str, str]:
        """Its exit code, and the rest of what it said."""
        out, err = self.process.communicate(timeout=DEADLINE)
        return self.process.returncode, out.decode(), err.decode()


@contextmanager
def watching_khod(khod: Khod, *words: str) -> Iterator[Watcher]:
    made = Watcher(khod, *words)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.wait(DEADLINE)


def jump(khod: Khod, **faults: object) -> None:
    """Take the simulated host into its next kernel."""
    for name, value in faults.items():
        khod.kernel.set_fault(name, value)
    files = [os.open(khod.directory / name, os.O_RDONLY) for name in ("vmlinuz", "initrd")]
    with khod.connect() as operator:
        call(operator, "Kexec", files=files, kernel={"image": 0, "initrds": [1]}, now=True)  # nobody answers
    for fd in files:
        os.close(fd)


@pytest.mark.parametrize("outcome", JUMPS)
def test_a_monitor_stays_through_the_jump_and_ends_with_the_verdict(khod: Khod, outcome: str) -> None:
    faults, code = JUMPS[outcome]
    with watching_khod(khod, "monitor", "--json") as monitor:
        assert json.loads(monitor.line())["phase"] == "idle"
        jump(khod, **faults)
        away = json.loads(monitor.until(follow.IN_JUMP))
        back = json.loads(monitor.until(follow.OTHER_BOOT))
        ended, out, _err = monitor.end()
    assert (away["phase"], away["kind"]) == ("executing", "note")
    assert back["at"] >= away["at"]
    last = json.loads(out.splitlines()[-1])
    assert (ended, last["phase"], last["exit_code"]) == (code, outcome, code)


@contextmanager
def once_it_waits(monkeypatch: pytest.MonkeyPatch, do: Callable[[], object]) -> Iterator[None]:
    """Do something in a thread as soon as a khoctl of this process waits for its next event."""
    waits, right = threading.Event(), follow.Link.wait_event

    def wait_event(link: follow.Link, seconds: float | None) -> Event | None:
        waits.set()
        return right(link, seconds)

    def act() -> None:
        assert waits.wait(DEADLINE)
        do()

    monkeypatch.setattr(follow.Link, "wait_event", wait_event)
    acting = threading.Thread(target=act)
    acting.start()
    yield
    acting.join(DEADLINE)
    assert not acting.is_alive()


@pytest.mark.parametrize("outcome", JUMPS)
def test_who_waits_learns_the_verdict_in_one_line(khod: Khod, monkeypatch: pytest.MonkeyPatch, outcome: str) -> None:
    faults, code = JUMPS[outcome]
    assert khod.khoctl("activate").code == Exit.done
    with once_it_waits(monkeypatch, lambda: jump(khod, **faults)):
        ended = khod.khoctl("wait", khod.record.run[:6], "--timeout", str(DEADLINE))
    (line,) = ended.out.splitlines()
    assert (ended.code, line.partition("  ")[0]) == (code, outcome.replace("_", " "))
    assert follow.IN_JUMP in ended.err


def test_a_status_that_is_watched_stays_through_the_jump(khod: Khod) -> None:
    with watching_khod(khod, "status", "--watch", "--json") as watched:
        assert json.loads(watched.line())["phase"] == "idle"
        jump(khod)
        watched.until(follow.IN_JUMP)
        ended, out, _err = watched.end()
    last = json.loads(out.splitlines()[-1])
    assert (ended, last["phase"], last["summary"]) == (Exit.done, "verified", PHASE_TEXT[Phase.verified][0])


def test_on_a_terminal_a_watched_status_counts_the_seconds_of_the_jump(khod: Khod) -> None:
    terminal = Terminal(khod, "status", "--watch", columns=200, environment={"NO_COLOR": "1"})
    terminal.until("No handover is under way.")
    assert khod.khoctl("activate").code == Exit.done
    terminal.until("active")
    khod.end(signal.SIGKILL)
    terminal.until(f"{follow.AWAY} (")
    with again(khod):
        terminal.until("rolled back")
        terminal.send("\x03")
        assert terminal.end() == session.INTERRUPTED


@contextmanager
def again(khod: Khod) -> Iterator[Khod]:
    """The next khod in the same boot, as systemd starts it."""
    khod.hear_out()
    made = Khod(khod.directory)
    yield made
    made.close()


def test_a_khod_that_is_started_again_is_no_jump(khod: Khod) -> None:
    with watching_khod(khod, "monitor", "--json") as monitor:
        monitor.line()
        assert khod.khoctl("activate").code == Exit.done
        monitor.until('"active"')
        khod.end(signal.SIGKILL)
        monitor.until(follow.AWAY)
        with again(khod) as next_khod:
            monitor.until(follow.SAME_BOOT)
            next_khod.ask("Activate")
            monitor.until('"active"')
            monitor.process.send_signal(signal.SIGINT)
            assert monitor.end()[0] == session.INTERRUPTED


def test_a_handover_that_was_rolled_back_is_waited_for_and_said(khod: Khod, monkeypatch: pytest.MonkeyPatch) -> None:
    """The status of the host is then that of before the handover, whose exit code says nothing of this one."""
    assert khod.khoctl("activate").code == Exit.done
    with once_it_waits(monkeypatch, lambda: khod.ask("Abort")):
        aborted = khod.khoctl("wait", "--timeout", str(DEADLINE))
    assert (aborted.code, aborted.out) == (Exit.failed, "rolled back  The handover was aborted.\n")


def test_a_khod_that_does_not_come_back_is_given_up(khod: Khod) -> None:
    with watching_khod(khod, "monitor", "--timeout", "0.5") as monitor:
        monitor.line()
        assert khod.khoctl("activate").code == Exit.done
        monitor.until("active ")
        khod.end(signal.SIGKILL)
        code, out, err = monitor.end()
    assert code == Exit.unreachable
    assert follow.AWAY in out
    assert "khod has not come back within 0.5 s" in err


def test_an_interrupt_ends_the_wait_for_a_host_in_the_jump(khod: Khod) -> None:
    with watching_khod(khod, "monitor") as monitor:
        monitor.line()
        assert khod.khoctl("activate").code == Exit.done
        monitor.until("active ")
        khod.end(signal.SIGKILL)
        monitor.until(follow.AWAY)
        monitor.process.send_signal(signal.SIGINT)
        code, _out, err = monitor.end()
    assert (code, err) == (session.INTERRUPTED, "")


def test_without_a_handover_nobody_waits(khod: Khod) -> None:
    ended = khod.khoctl("wait")
    assert (ended.code, len(ended.out.splitlines())) == (Exit.done, 1)
    assert PHASE_TEXT[Phase.idle][0] in ended.out
    assert khod.khoctl("wait", "--json").json["phase"] == "idle"


def test_a_handover_that_is_not_under_way_is_not_waited_for(khod: Khod) -> None:
    assert khod.khoctl("activate").code == Exit.done
    assert khod.record.run != "0000"
    refused = khod.khoctl("wait", "0000")
    assert (refused.code, "No handover 0000 is under way" in refused.err) == (Exit.refused, True)
    for nonsense in ("", "no-run"):
        assert khod.khoctl("wait", nonsense).code == Exit.usage


def test_a_wait_ends_at_its_time_limit(khod: Khod) -> None:
    assert khod.khoctl("activate").code == Exit.done
    late = khod.khoctl("wait", "--timeout", "0.2")
    assert late.code == Exit.unreachable
    assert "It is not over within 0.2 s" in late.err


def event(phase: Phase, *, last: bool = False) -> dict[str, Any]:
    return {"event": model(Event(1.0, phase, "", "abc")), LAST: last}


def in_boots(*phases: Phase) -> Replies:
    """A host that is in another boot at each question for its status, in these phases; during a handover khod ends."""

    def replies(method: str, before: int) -> Answers:
        at = min(before, len(phases) - 1)
        if method == "Status":
            return {"status": model(replace(status(phases[at]), boot_id=f"boot {at}", exit_code=40 + at))}
        return event(phases[at], last=phases[at] not in follow.ENDED)

    return replies


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Khod is tried without a pause."""
    monkeypatch.setattr(follow, "RETRY_SECONDS", 0.0)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("words", [("monitor",), ("wait",), ("verify",)])
def test_a_khod_that_ends_while_it_verifies_is_waited_for(tmp_path: Path, words: tuple[str, ...]) -> None:
    first = Phase.verifying if words == ("verify",) else Phase.executing
    with fake(tmp_path / "socket", in_boots(first, Phase.verifying, Phase.degraded, Phase.degraded)) as made:
        ended = cli(tmp_path / "socket", *words)
    assert ended.code == 39 + made.calls.count("Status") == 43
    assert "degraded  It stands." in ended.out


@pytest.mark.usefixtures("hasty")
def test_half_an_event_at_the_end_of_a_connection_is_nothing(tmp_path: Path) -> None:
    def replies(method: str, before: int) -> Answers:
        if method == "Monitor" and before == 0:
            return iter((event(Phase.executing), json.dumps({"parameters": event(Phase.failed)}).encode()[:60], None))
        return in_boots(Phase.executing, Phase.verified)(method, before)

    with fake(tmp_path / "socket", replies):
        ended = cli(tmp_path / "socket", "monitor", "--json")
    shown = [json.loads(line) for line in ended.out.splitlines()]
    assert [one["phase"] for one in shown] == ["executing", "executing", "verified", "verified"]
    assert [one.get("message") for one in shown][1] == follow.IN_JUMP
    assert shown[-1]["boot_id"] == "boot 1"


@pytest.mark.usefixtures("hasty")
def test_a_connection_that_nobody_closed_at_the_jump_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a forwarded socket whose host is gone without a word."""
    monkeypatch.setattr(follow, "PROBE_SECONDS", 0.0)

    def replies(method: str, before: int) -> Answers:
        if method == "Monitor" and before == 0:
            return event(Phase.executing)
        return in_boots(Phase.executing, Phase.verified)(method, before)

    with fake(tmp_path / "socket", replies) as made:
        ended = cli(tmp_path / "socket", "wait")
    assert (ended.code, ended.out) == (41, "verified  It stands. Do this.\n")
    assert made.calls.count("Monitor") == 2


@pytest.mark.usefixtures("hasty")
def test_a_host_that_is_reached_by_nobody_after_the_jump_is_given_up(tmp_path: Path) -> None:
    """The forwarding accepts connections, and has nowhere to take them."""

    def replies(method: str, before: int) -> Answers:
        return in_boots(Phase.executing)(method, before) if before == 0 else None

    with fake(tmp_path / "socket", replies):
        ended = cli(tmp_path / "socket", "monitor", "--timeout", "0.3")
    assert ended.code == Exit.unreachable
    assert follow.IN_JUMP in ended.out
    assert "khod has not come back within 0.3 s" in ended.err


@pytest.mark.parametrize("words", [("monitor",), ("wait", "verified"), ("status", "--watch")])
def test_a_khod_that_ends_with_no_handover_under_way_is_not_waited_for(tmp_path: Path, words: tuple[str, ...]) -> None:
    def replies(method: str, before: int) -> Answers:
        return event(Phase.idle, last=True) if method == "Monitor" else in_boots(Phase.idle)(method, before)

    with fake(tmp_path / "socket", replies):
        ended = cli(tmp_path / "socket", *words)
    assert ended.code == Exit.unreachable
    assert "khod closed the connection" in ended.err


@pytest.mark.usefixtures("hasty")
def test_a_status_that_shows_the_end_of_khod_is_as_good_as_an_event(tmp_path: Path) -> None:
    """Here the connection for events is left open."""

    def replies(method: str, before: int) -> Answers:
        if method == "Monitor" and before == 0:
            return iter((event(Phase.loaded), event(Phase.loading)))
        if method == "Status" and before == 1:
            return None
        return in_boots(Phase.loaded, Phase.verified, Phase.verified)(method, before)

    with fake(tmp_path / "socket", replies):
        ended = cli(tmp_path / "socket", "status", "--watch", "--json")
    shown = [json.loads(line) for line in ended.out.splitlines()]
    assert [one.get("message", one["phase"]) for one in shown] == ["loaded", follow.AWAY, "verified"]
    assert ended.code == 42


class EndingLink:
    """A connection to a khod that has ended: what it had sent before can still be read."""

    def __init__(self, *events: Event) -> None:
        self.event, *self._events = events
        self.status = status(Phase.loading)

    def ask_status(self) -> Status:
        raise Unreachable("khod closed the connection")

    def wait_event(self, _seconds: float | None) -> Event:
        if not self._events:
            raise Unreachable("khod closed the connection")
        return self._events.pop(0)

    def close(self) -> None:
        pass


def test_a_question_that_finds_the_end_first_knows_the_phase_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is asked for on another connection than that of the events: which end is seen first is chance."""
    events = [
        Event(float(at), phase, "", "r1") for at, phase in enumerate((Phase.loading, Phase.loaded, Phase.executing))
    ]
    monkeypatch.setattr(follow, "Link", lambda _connect: EndingLink(*events))
    with follow.Follower() as follower:
        follower.refresh_status()
        assert (follower.note.message, follower.note.phase) == (follow.IN_JUMP, Phase.executing)
