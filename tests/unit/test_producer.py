"""The client library, its producers as processes of their own, beside khods that are killed."""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from khod.errors import Exit
from khod.producers.barrier import Verb
from tests.unit.actors import follow
from tests.unit.khods import DEADLINE, REPOSITORY, Answer, Khod, reply
from tests.unit.luo import System

HELD = "what it holds"
PEER = """
import json, os, sys, threading
from pathlib import Path
from khod import producer

producer.AGAIN = 0.02
name, path, timeout, after, waits = sys.argv[1:]
table = os.memfd_create("table")
os.pwrite(table, b"what it holds", 0)

def handler(step):
    found = {name: os.pread(fd, 100, 0).decode() for name, fd in step.files.items()}
    print(json.dumps([step.verb, found]), flush=True)
    if step.verb in waits.split():
        sys.stdin.readline()
    return {"table": table} if step.verb == "prepare" else None

verbs = ("prepare", "freeze", "thaw", "cancel", "restore", "finish")
made = producer.Producer(
    name, **dict.fromkeys(verbs, handler), timeout=float(timeout), after=after.split(), socket=Path(path)
)
made.start()
print(json.dumps(["started", {}]), flush=True)
threading.Event().wait()
"""
"""A producer that says what it is told, and at the verbs in `waits` waits for a line before it answers."""


class PeerProcess:
    """A producer on the library, as a process."""

    def __init__(
        self, system: System, name: str, *, timeout: float = DEADLINE, after: str = "", waits: str = ""
    ) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, "-c", PEER, name, str(system.directory / "socket"), str(timeout), after, waits],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.held: set[str] = set()
        self._said: queue.Queue[tuple[str, dict[str, str]]] = queue.Queue()
        threading.Thread(target=self._hear, daemon=True).start()

    def _hear(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            verb, found = json.loads(line)
            self._said.put((verb, found))

    def next(self) -> tuple[str, dict[str, str]]:
        """What it says next: a verb, or `started`."""
        verb, found = self._said.get(timeout=DEADLINE)
        if verb != "started":
            follow(self.held, Verb(verb))
        return verb, found

    def hears(self, wanted: str) -> dict[str, str]:
        """Wait until it is told a verb; the files that came with it."""
        while (said := self.next())[0] != wanted:
            pass
        return said[1]

    def go_on(self) -> None:
        """Let it answer what it waits in."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE)


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    made = System(tmp_path)
    yield made
    made.close()


@pytest.fixture
def peer(system: System) -> Iterator[Callable[..., PeerProcess]]:
    made: list[PeerProcess] = []

    def start(name: str, **options: Any) -> PeerProcess:
        made.append(PeerProcess(system, name, **options))
        made[-1].hears("started")
        return made[-1]

    yield start
    for each in made:
        each.kill()


def begin(khod: Khod, method: str, **parameters: object) -> socket.socket:
    """Call a method of khod's and do not wait for the answer, which comes in the socket."""
    client = khod.connect()
    call = {"method": f"io.kho.Handover.{method}", "parameters": parameters}
    client.sendall(json.dumps(call).encode() + b"\0")
    return client


def begin_kexec(khod: Khod, system: System) -> socket.socket:
    client = khod.connect()
    files = [os.open(system.directory / name, os.O_RDONLY) for name in ("vmlinuz", "initrd")]
    call = {"method": "io.kho.Handover.Kexec", "parameters": {"image": 0, "initrd": 1}}
    socket.send_fds(client, [json.dumps(call).encode() + b"\0"], files)
    for fd in files:
        os.close(fd)
    return client


def kexec(khod: Khod, system: System) -> Answer:
    return khod.khoctl("kexec", *system.images)


def at_rest(khod: Khod, system: System) -> None:
    """Nothing of a handover is left anywhere."""
    assert khod.khoctl("status", "--json").json["phase"] == "idle"
    assert (khod.active, khod.loaded) == (False, False)
    assert khod.record.producers == ()
    assert system.luo.outgoing == {}
    assert system.kept == {}


# khod is killed

STEPS = [
    "preparing: prepare",
    "preparing: one: prepare: told",
    "preparing: one: prepare: ready",
    "preparing: two: prepare: ready",
    "prepared: ",
    "freezing: freeze",
    "freezing: one: freeze: told",
    "freezing: one: freeze: ready",
    "freezing: two: freeze: ready",
    "frozen: ",
    "activating: ",
    "active: ",
    "loading: ",
    "loaded: ",
    "executing: ",
]
BACK = [
    "rolling back: Producer last",
    "rolling back: two: thaw: told",
    "rolling back: two: thaw: ready",
    "rolling back: one: thaw: ready",
    "rolling back: two: cancel: told",
    "rolling back: one: cancel: ready",
    "idle: everything is back",
]


@pytest.mark.parametrize("dies_at", [*STEPS, *BACK])
def test_a_khod_killed_anywhere_is_followed_by_one_that_puts_everything_back(
    system: System, peer: Callable[..., PeerProcess], dies_at: str
) -> None:
    dies_at = dies_at.replace("rolling back", "rolling_back")
    if dies_at.startswith(("rolling_back", "idle")):
        system.hook("last", 'after = ["two"]\nfreeze = ["sh", "-c", "echo no room >&2; exit 1"]')
    first = system.khod(dies_at=dies_at)
    peers = [peer("one"), peer("two", after="one")]
    with begin_kexec(first, system):
        first.died()
    second = system.khod()
    at_rest(second, system)
    (system.directory / "root/etc/kho/producers.d/last.toml").unlink(missing_ok=True)
    assert second.khoctl("activate").code == Exit.done, "and the next one finds everyone"
    assert sorted(len(tokens) for tokens in system.luo.outgoing.values()) == [1, 1]
    assert second.khoctl("abort").code == Exit.done
    at_rest(second, system)
    for each in peers:
        told = [each.next()[0]]
        while told.count("freeze") < 1 or told[-1] != "cancel":
            told.append(each.next()[0])
        assert each.held == set(), told


def test_a_peer_whose_process_died_with_khod_is_not_waited_for(
    system: System, peer: Callable[..., PeerProcess]
) -> None:
    first = system.khod(dies_at="active: ")
    lives, dead = peer("lives"), peer("dead", timeout=600)
    with begin(first, "Activate"):
        first.died()
    dead.kill()
    second = system.khod()
    at_rest(second, system)
    assert [found["name"] for found in second.khoctl("producers", "--json").json] == ["lives"]
    lives.hears("thaw")
    lives.hears("cancel")


def test_a_peer_that_dies_while_a_new_khod_waits_for_it_holds_nobody_up(
    system: System, peer: Callable[..., PeerProcess]
) -> None:
    first = system.khod(dies_at="active: ")
    stopped = peer("stopped", timeout=600)
    with begin(first, "Activate"):
        first.died()
    stopped.process.send_signal(signal.SIGSTOP)
    second = system.khod(ready=False)
    second.word("Waiting for stopped")
    stopped.kill()
    second.word("READY=1")
    at_rest(second, system)


def test_a_peer_that_lives_and_does_not_come_back_is_named_and_can_be_put_back_later(
    system: System, peer: Callable[..., PeerProcess]
) -> None:
    first = system.khod(dies_at="active: ")
    well, stopped = peer("well"), peer("stopped", timeout=0.5)
    with begin(first, "Activate"):
        first.died()
    stopped.process.send_signal(signal.SIGSTOP)
    second = system.khod()
    shown = second.khoctl("status", "--json")
    assert (shown.code, shown.json["phase"]) == (Exit.not_rolled_back, "failed")
    assert "stopped" in shown.json["last_error"]
    assert "well" not in shown.json["last_error"]
    assert (second.active, second.loaded) == (False, False)
    well.hears("cancel")
    assert well.held == set()
    assert second.khoctl("abort").code == Exit.not_rolled_back
    stopped.process.send_signal(signal.SIGCONT)
    stopped.hears("cancel")
    assert second.khoctl("abort").code == Exit.done
    at_rest(second, system)
    assert stopped.held == set()


RESUME = '[policy]\nafter_daemon_died = "resume"\n'


@pytest.mark.parametrize("carries", [False, True])
@pytest.mark.parametrize("last", ["active", "loaded"])
def test_with_policy_resume_what_was_preserved_before_khod_died_arrives(
    system: System, peer: Callable[..., PeerProcess], last: str, carries: bool
) -> None:
    system.configure(RESUME)
    system.carries = carries
    first = system.khod()
    before = peer("one")
    assert (
        first.khoctl("activate") if last == "active" else first.khoctl("kexec", "--load-only", *system.images)
    ).code == Exit.done
    before.hears("freeze")
    first.end(signal.SIGKILL)
    second = system.khod()
    assert second.khoctl("status", "--json").json["phase"] == last
    assert list(system.luo.outgoing.values()) == [[0]]
    assert (kexec(second, system) if last == "active" else second.khoctl("kexec")).code == Exit.done
    assert before.held == {"prepared", "frozen"}
    before.kill()
    after = peer("one")
    second.word("READY=1")
    verified = second.khoctl("verify", "--json")
    assert (verified.code, verified.json["phase"]) == (Exit.done, "verified")
    assert verified.json["verdict"]["arrived"].count("one") == 1
    assert after.hears("finish") == {}
    assert system.luo.unclaimed == set()
    at_rest_after_a_jump(second, system)


def at_rest_after_a_jump(khod: Khod, system: System) -> None:
    assert khod.record.producers == ()
    assert (system.luo.outgoing, system.luo.unclaimed, system.kept) == ({}, set(), {})
    assert khod.khoctl("check").code == Exit.done


def test_with_policy_resume_a_peer_that_does_not_come_back_is_a_veto(
    system: System, peer: Callable[..., PeerProcess]
) -> None:
    system.configure(RESUME)
    first = system.khod()
    well, dead = peer("well"), peer("dead")
    assert first.khoctl("activate").code == Exit.done
    first.end(signal.SIGKILL)
    dead.kill()
    second = system.khod()
    assert second.khoctl("status", "--json").json["phase"] == "active"
    refused = kexec(second, system)
    assert refused.code == Exit.refused
    assert "dead" in refused.err
    at_rest(second, system)
    well.hears("cancel")
    assert well.held == set()


def test_with_policy_resume_a_handover_that_was_not_yet_held_is_put_back(
    system: System, peer: Callable[..., PeerProcess]
) -> None:
    system.configure(RESUME)
    first = system.khod(dies_at="freezing: one: freeze: ready")
    one = peer("one")
    with begin(first, "Activate"):
        first.died()
    at_rest(system.khod(), system)
    one.hears("cancel")
    assert one.held == set()


# khod is killed in the next kernel


VERIFYING = [
    "verifying: this kernel",
    "verifying: one: restore: told",
    "verifying: one: restore: ready",
    "verifying: one: finish: told",
    "verifying: one: finish: ready",
    "verified: ",
]


@pytest.mark.parametrize("carries", [False, True])
@pytest.mark.parametrize("dies_at", VERIFYING)
def test_a_khod_killed_while_it_verifies_gives_the_files_back_all_the_same(
    system: System, peer: Callable[..., PeerProcess], dies_at: str, carries: bool
) -> None:
    system.carries = carries
    first = system.khod(dies_at=dies_at)
    before = peer("one")
    with begin_kexec(first, system):
        before.hears("freeze")
        before.kill()
        after = PeerProcess(system, "one")
        try:
            first.died()
            second = system.khod()
            verified = second.khoctl("verify", "--json")
            assert (verified.code, verified.json["phase"]) == (Exit.done, "verified"), verified
            assert verified.json["verdict"]["arrived"].count("one") == 1
            assert verified.json["verdict"]["missing"] == []
            assert verified.json["handovers"] == 1
            assert after.hears("restore") == {"table": HELD}
            after.hears("finish")
            at_rest_after_a_jump(second, system)
            assert second.khoctl("activate").code == Exit.done
            after.hears("freeze")
        finally:
            after.kill()
