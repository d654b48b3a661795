# SPDX-License-Identifier: LGPL-2.1-or-later
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
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from khod.errors import Exit, Refused, Unreachable, UsageError
from khod.model import Phase
from khod.producer import CalledOff, Producer, Step, Veto
from khod.producers.barrier import Verb
from tests.unit.actors import follow
from tests.unit.khods import DEADLINE, REPOSITORY, Answer, Khod, reply, until
from tests.unit.luo import Hand, System, Watch, begin, memfd

HELD = "what it holds"
PEER = """
import json, os, sys, threading
from pathlib import Path
from khod import producer
from khod.errors import KhoError

producer.RETRY_SECONDS = 0.02
name, path, timeout, after, waits = sys.argv[1:]
table = os.memfd_create("table")
os.pwrite(table, b"what it holds", 0)

def say(word, found):
    os.write(1, json.dumps([word, found]).encode() + b"\\n")  # in one piece: there are two threads

def handler(step):
    found = {name: os.pread(fd, 100, 0).decode() for name, fd in step.files.items()}
    say(step.verb, found)
    if step.verb in waits.split():
        sys.stdin.readline()
    return {"table": table} if step.verb == "prepare" else None

verbs = ("prepare", "freeze", "thaw", "cancel", "restore", "finish")
made = producer.Producer(
    name, **dict.fromkeys(verbs, handler), timeout=float(timeout), after=after.split(), socket=Path(path)
)
while True:
    try:
        made.start()
        break
    except KhoError:
        threading.Event().wait(producer.RETRY_SECONDS)  # as a unit that is started again
say("started", {})
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
        self.told: list[str] = []
        self.came: dict[str, str] = {}
        """What it was given back last."""
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
        if verb == "restore":
            self.came = found
        self.told.append(verb)
        return verb, found

    def hears(self, wanted: str) -> dict[str, str]:
        """Wait until it is told a verb; the files that came with it."""
        while (said := self.next())[0] != wanted:
            pass
        return said[1]

    def heard(self, wanted: str) -> None:
        """Wait until it was told a verb, which may have been long ago."""
        while wanted not in self.told:
            self.next()

    def go_on(self) -> None:
        """Let it answer what it waits in."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE)


@pytest.fixture
def peer(system: System) -> Iterator[Callable[..., PeerProcess]]:
    made: list[PeerProcess] = []

    def start(name: str, *, wait: bool = True, **options: Any) -> PeerProcess:
        made.append(PeerProcess(system, name, **options))
        if wait:
            made[-1].hears("started")
        return made[-1]

    yield start
    for each in made:
        each.kill()


def begin_kexec(khod: Khod, system: System, **more: object) -> socket.socket:
    """Begin a handover and do not wait for it."""
    files = [os.open(system.directory / name, os.O_RDONLY) for name in ("vmlinuz", "initrd")]
    client = begin(khod, "Kexec", files=files, kernel={"image": 0, "initrds": [1]}, **more)
    for fd in files:
        os.close(fd)
    return client


def kexec(khod: Khod, system: System) -> Answer:
    return khod.khoctl("kexec", *system.images)


def at_rest(khod: Khod, system: System) -> None:
    """Nothing of a handover is left anywhere."""
    assert khod.khoctl("status", "--json").json["phase"] == "idle"
    assert (khod.active, khod.loaded) == (False, False)
    until(lambda: khod.record.producers == (), khod.process)  # it says so before it has written it
    assert system.emptied()


# khod is killed

STEPS = [
    "preparing: every producer is told",
    "preparing: one: prepare: ready",
    "prepared: ",
    "freezing: one: freeze: told",
    "freezing: one: freeze: ready",
    "frozen: ",
    "activating: ",
    "active: ",
    "loading: ",
    "loaded: ",
    "executing: ",
]
BACK = [
    "rolling_back: Producer last",
    "rolling_back: two: thaw: ready",
    "rolling_back: two: cancel: told",
    "rolling_back: one: cancel: ready",
    "idle: Rolled back.",
]


@pytest.mark.parametrize("dies_at", [*STEPS, *BACK])
def test_a_khod_killed_anywhere_is_followed_by_one_that_puts_everything_back(
    system: System, peer: Callable[..., PeerProcess], dies_at: str
) -> None:
    if dies_at in BACK:
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
        each.heard("freeze")
        each.hears("cancel")
        assert each.held == set(), each.told


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
    well, stopped = peer("well"), peer("stopped", timeout=3.0)
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
    watch = Watch(second)
    stopped.process.send_signal(signal.SIGCONT)
    watch.until("producer stopped registered")
    watch.close()
    assert second.khoctl("abort").code == Exit.done
    at_rest(second, system)
    stopped.hears("cancel")
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
    system.mortal.append(before.kill)
    system.jump(second, *(["--now"] if last == "loaded" else []))
    assert before.held == {"prepared", "frozen"}
    third = system.khod()
    after = peer("one")
    after.heard("finish")
    verified = third.khoctl("verify", "--json")
    assert (verified.code, verified.json["phase"]) == (Exit.done, "verified")
    assert verified.json["verdict"]["arrived"].count("one") == 1
    assert after.came == {"table": HELD}
    at_rest_after_a_jump(third, system)


def at_rest_after_a_jump(khod: Khod, system: System) -> None:
    until(lambda: khod.record.producers == (), khod.process)
    assert system.emptied()
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


def test_with_policy_resume_a_peer_may_come_back_while_the_jump_waits_for_it(system: System) -> None:
    """Whoever asks for the jump may be faster than a peer that lost khod."""
    system.configure(RESUME)
    first = system.khod()
    one = Hand(first, "one")
    with begin_kexec(first, system, load_only=True) as operation:
        one.follows("prepare", "freeze")
        one.ready()
        assert reply(operation)["parameters"]["status"]["phase"] == "loaded"
    first.end(signal.SIGKILL)
    one.close()
    second = system.khod()
    with begin(second, "Kexec", now=True):
        until(lambda: "one" in second.khoctl("status", "--json").json["waiting_for"], second.process)
        assert second.record.phase is Phase.loaded, "there is a way back for as long as somebody is waited for"
        back = Hand(second, "one")
        assert back.registered["told"] == "freeze"
        assert second.process.wait(DEADLINE) == -signal.SIGKILL, "the jump"
    back.close()


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


@pytest.mark.parametrize(("dies_at", "carries"), [(each, False) for each in VERIFYING] + [(VERIFYING[2], True)])
def test_a_khod_killed_while_it_verifies_gives_the_files_back_all_the_same(
    system: System, peer: Callable[..., PeerProcess], dies_at: str, carries: bool
) -> None:
    system.carries = carries
    first = system.khod()
    before = peer("one")
    system.mortal.append(before.kill)
    system.jump(first)
    second = system.khod(dies_at=dies_at, ready=False)
    after = peer("one", wait=False)
    second.died()
    third = system.khod()
    verified = third.khoctl("verify", "--json")
    assert (verified.code, verified.json["phase"]) == (Exit.done, "verified"), verified
    after.heard("finish")
    assert verified.json["verdict"]["arrived"].count("one") == 1
    assert verified.json["verdict"]["missing"] == []
    assert verified.json["handovers"] == 1
    assert after.came == {"table": HELD}
    at_rest_after_a_jump(third, system)
    assert third.khoctl("activate").code == Exit.done
    after.hears("freeze")


def test_a_producer_that_dies_with_khod_before_it_has_finished_is_given_its_files_again(
    system: System, peer: Callable[..., PeerProcess]
) -> None:
    """Its next process has nothing of what the one before took."""
    first = system.khod()
    system.mortal.append(peer("one").kill)
    system.jump(first)
    second = system.khod(dies_at="verifying: one: finish: told", ready=False)
    took = peer("one", wait=False)
    second.died()
    took.kill()
    third = system.khod()
    again = peer("one", wait=False)
    again.heard("finish")
    assert again.came == {"table": HELD}
    assert third.khoctl("verify", "--json").json["phase"] == "verified"
    at_rest_after_a_jump(third, system)


# The library


@pytest.fixture(scope="module")
def kept_on(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[System, Khod]]:
    """A khod for all tests that leave it as it was, and its system."""
    made = System(tmp_path_factory.mktemp("kept-on"))
    yield made, made.khod()
    made.close()


@pytest.fixture
def producer(kept_on: tuple[System, Khod]) -> Iterator[Callable[..., Producer]]:
    """Start producers in this process, with the khod of the module; idle again after the test."""
    made: list[Producer] = []
    khod = kept_on[1]

    def start(name: str = "subject", **options: Any) -> Producer:
        made.append(Producer(name, socket=khod.socket, **{"timeout": DEADLINE, **options}))
        made[-1].start()
        return made[-1]

    yield start
    assert khod.khoctl("abort").code == Exit.done
    for each in made:
        each.stop()
    until(lambda: khod.ask("Producers")["producers"] == [], khod.process)


def raises(error: BaseException) -> Callable[[Step], None]:
    def handler(_step: Step) -> None:
        raise error

    return handler


class Surprise(Exception):
    """Something a handler raises; what it says of itself is nothing for a terminal."""

    def __str__(self) -> str:
        return "\033[2J\nboom\0" + "x" * 10_000


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Veto("the disk is busy"), "the disk is busy"),
        (Veto(""), "subject"),
        (ValueError("no such table"), "no such table"),
        (OSError(5, "Input/output error"), "Input/output error"),
        (Surprise(), "boom"),
        (AssertionError(), "AssertionError"),
        (RecursionError("deep"), "deep"),
        (SystemExit(3), "subject"),
        (KeyboardInterrupt(), "subject"),
        (GeneratorExit(), "subject"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
@pytest.mark.parametrize("verb", ["prepare", "freeze"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_whatever_a_handler_raises_is_a_veto(
    kept_on: tuple[System, Khod], producer: Callable[..., Producer], verb: str, error: BaseException, said: str
) -> None:
    system, khod = kept_on
    thawed = threading.Event()
    undo = {"prepare": "cancel", "freeze": "thaw"}[verb]
    producer(**{verb: raises(error), undo: lambda _step: thawed.set()})
    refused = khod.khoctl("activate")
    assert refused.code == Exit.refused, refused
    assert said in refused.err
    assert refused.err.replace("\n", "").isprintable()
    assert thawed.wait(DEADLINE), "it may have had half of it done"
    at_rest(khod, system)


NONSENSE: list[Any] = ["a string", ["a list"], 7, {"a": "x"}, {"a": -1}, {"a": 1 << 40}, {1: 0}, {"": 0}, {"a": None}]


@pytest.mark.parametrize("nonsense", NONSENSE, ids=repr)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_whatever_a_handler_returns_that_is_no_files_is_a_veto(
    kept_on: tuple[System, Khod], producer: Callable[..., Producer], nonsense: Any
) -> None:
    system, khod = kept_on
    cancelled = threading.Event()
    producer(prepare=lambda _step: nonsense, cancel=lambda _step: cancelled.set())
    refused = khod.khoctl("activate")
    assert refused.code == Exit.refused, refused
    assert "subject" in refused.err
    assert cancelled.wait(DEADLINE)
    at_rest(khod, system)


def test_not_yet_is_seen_with_its_progress_and_ends_in_yes(
    kept_on: tuple[System, Khod], producer: Callable[..., Producer]
) -> None:
    khod = kept_on[1]
    said, go = threading.Event(), threading.Event()

    def prepare(step: Step) -> None:
        step.not_yet("writing back", 0.25)
        said.set()
        assert go.wait(DEADLINE)

    producer(prepare=prepare, timeout=DEADLINE)
    with begin(khod, "Activate") as operation:
        assert said.wait(DEADLINE)
        (shown,) = khod.khoctl("status", "--json").json["producers"]
        assert (shown["waiting"], shown["progress"], shown["phase"]) == (True, 0.25, "prepare")
        assert "writing back" in shown["answer"]
        assert "writing back" in khod.khoctl("status").out
        go.set()
        assert "error" not in reply(operation)
    assert khod.active


def test_a_not_yet_after_the_abort_raises_and_the_undo_follows(
    kept_on: tuple[System, Khod], producer: Callable[..., Producer]
) -> None:
    system, khod = kept_on
    said, off, cancelled = threading.Event(), threading.Event(), threading.Event()

    def prepare(step: Step) -> None:
        step.not_yet("begun")
        said.set()
        with suppress(CalledOff):
            while True:
                step.not_yet("still at it")
        off.set()
        raise CalledOff

    producer(prepare=prepare, cancel=lambda _step: cancelled.set(), timeout=DEADLINE)
    with begin(khod, "Activate") as operation:
        assert said.wait(DEADLINE)
        assert khod.khoctl("abort").code == Exit.done
        assert "error" in reply(operation)
    assert off.is_set()
    assert cancelled.is_set()
    at_rest(khod, system)


def test_files_from_prepare_and_from_freeze_all_arrive_by_name(system: System) -> None:
    khod = system.khod()
    files = {name: memfd(name.encode()) for name in ("one", "two", "three")}
    early = {name: files[name] for name in ("one", "two")}
    before = Producer(
        "subject", prepare=lambda _step: early, freeze=lambda _step: {"three": files["three"]}, socket=khod.socket
    )
    before.start()
    system.mortal.append(before.stop)
    system.jump(khod)
    for fd in files.values():
        os.pwrite(fd, b"gone", 0)
        os.close(fd)
    khod = system.khod()
    came: dict[str, bytes] = {}
    finished = threading.Event()

    def restore(step: Step) -> None:
        for name, fd in step.files.items():
            came[name] = os.pread(fd, 100, 0)
            os.close(fd)

    after = Producer("subject", restore=restore, finish=lambda _step: finished.set(), socket=khod.socket)
    after.start()
    assert came == {"one": b"one", "two": b"two", "three": b"three"}, "when start returns it is there"
    assert finished.wait(DEADLINE)
    after.stop()


def test_without_khod_start_raises_and_names_the_socket(tmp_path: Path) -> None:
    with pytest.raises(Unreachable) as raised:
        Producer("subject", socket=tmp_path / "socket").start()
    assert raised.value.where == str(tmp_path / "socket")
    assert raised.value.remedy


def test_start_raises_what_khod_refuses(kept_on: tuple[System, Khod], producer: Callable[..., Producer]) -> None:
    khod = kept_on[1]
    producer()
    with pytest.raises(Refused, match="subject"):
        producer()
    with pytest.raises(UsageError, match="systemd"):
        producer("systemd")
    assert [found["name"] for found in khod.ask("Producers")["producers"]] == ["subject"]


def test_stop_at_rest_frees_the_name(kept_on: tuple[System, Khod], producer: Callable[..., Producer]) -> None:
    khod = kept_on[1]
    producer().stop()
    until(lambda: khod.ask("Producers")["producers"] == [], khod.process)
    producer()
    assert khod.khoctl("activate").code == Exit.done


def test_stop_while_a_handover_waits_is_a_veto(kept_on: tuple[System, Khod], producer: Callable[..., Producer]) -> None:
    """Its process lives and is frozen: khod waits for it, and tells it the undo when it starts again."""
    system, khod = kept_on
    heard: list[str] = []
    verbs = ("prepare", "freeze", "thaw", "cancel")
    stops = producer(**{verb: lambda step: heard.append(step.verb) for verb in verbs})
    assert khod.khoctl("activate").code == Exit.done
    stops.stop()
    until(lambda: khod.khoctl("status", "--json").json["phase"] == "rolling_back", khod.process)
    assert heard == ["prepare", "freeze"]
    stops.start()
    until(lambda: khod.khoctl("status", "--json").json["phase"] == "idle", khod.process)
    assert heard == [*verbs]
    assert "subject" in khod.khoctl("status", "--json").json["last_error"]
    at_rest(khod, system)


def test_an_idle_producer_comes_back_after_khod_s_death(system: System, peer: Callable[..., PeerProcess]) -> None:
    first = system.khod()
    one = peer("one")
    first.end(signal.SIGKILL)
    second = system.khod()
    until(lambda: [found["name"] for found in second.ask("Producers")["producers"]] == ["one"], second.process)
    assert second.khoctl("activate").code == Exit.done
    one.hears("freeze")
    assert one.told == ["started", "prepare", "freeze"]


def test_a_frozen_producer_stays_frozen_while_khod_is_gone(system: System, peer: Callable[..., PeerProcess]) -> None:
    system.configure(RESUME)
    first = system.khod()
    one = peer("one")
    assert first.khoctl("activate").code == Exit.done
    first.end(signal.SIGKILL)
    second = system.khod()
    assert second.khoctl("status", "--json").json["phase"] == "active"
    assert second.khoctl("abort").code == Exit.done
    one.hears("cancel")
    assert one.told == ["started", "prepare", "freeze", "thaw", "cancel"], "nothing before khod said so"
