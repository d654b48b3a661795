# SPDX-License-Identifier: LGPL-2.1-or-later
"""Varlink peers that are wrong, late, others' or gone, and hardware that changes, while a handover is under way."""

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from khod.engine import Engine
from khod.engine.guard import Seen, Severity, Uevent
from khod.errors import Exit, Refused
from khod.model import Event, Phase
from khod.producers.hooks import Hook
from khod.simulated.kernel import Rebooted
from tests.unit.khods import DEADLINE, Khod, call, hung_up, reply, until
from tests.unit.luo import Hand, LuoHost, Mortal, System, begin, memfd, one_file

USAGE, REFUSED = "io.kho.Handover.UsageError", "io.kho.Handover.Refused"


@pytest.fixture
def khod(system: System) -> Khod:
    return system.khod()


@pytest.fixture(scope="module")
def kept_on(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[System, Khod]]:
    system = System(tmp_path_factory.mktemp("kept-on"))
    yield system, system.khod()
    system.close()


@pytest.fixture
def khod_again(kept_on: tuple[System, Khod], hands: list[Hand]) -> Iterator[tuple[System, Khod]]:
    """A khod that other tests had before, idle again, and its system."""
    system, khod = kept_on
    yield system, khod
    for hand in hands:
        hand.close()
    assert khod.khoctl("abort").code == Exit.done
    until(lambda: listed(khod) == [], khod.process)


@pytest.fixture
def hands() -> Iterator[list[Hand]]:
    made: list[Hand] = []
    yield made
    for each in made:
        each.close()


@pytest.fixture
def hand(request: pytest.FixtureRequest, hands: list[Hand]) -> Callable[..., Hand]:
    """Register peers by hand, with the khod of the test."""

    def register(name: str, at: Khod | None = None, **terms: object) -> Hand:
        if at is None:
            again = "khod_again" in request.fixturenames
            at = request.getfixturevalue("khod_again")[1] if again else request.getfixturevalue("khod")
        hands.append(Mortal(at, name, **terms))
        return hands[-1]

    return register


def idle(khod: Khod, system: System) -> None:
    assert khod.khoctl("status", "--json").json["phase"] == "idle"
    assert (khod.active, khod.loaded) == (False, False)
    assert system.emptied()


def listed(khod: Khod) -> list[str]:
    return [found["name"] for found in khod.ask("Producers")["producers"]]


# What a registration may be


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Khod]:
    """A khod for tests that leave nothing behind; `file` is a producer with a file."""
    system = System(tmp_path_factory.mktemp("shared"))
    system.hook("file", 'after = ["second"]\nprepare = ["true"]')
    yield system.khod()
    system.close()


def refused(khod: Khod, name: str, **terms: object) -> dict[str, Any]:
    peer = Hand(khod, name, **terms)
    peer.close()
    assert "error" in peer.registered, peer.registered
    assert name not in [found for found in listed(khod) if found != "file"]
    return peer.registered


@pytest.mark.parametrize(
    "name",
    [
        *("", "a/b", "/", "..", ".hidden", "a\0b", "\0", "n" * 65, "systemd", "a b", "a\nb", "ä", "-rf", "a\u202eb"),
    ],
)
def test_what_is_no_name_of_a_producer(shared: Khod, name: str) -> None:
    assert refused(shared, name)["error"] == USAGE


@pytest.mark.parametrize("name", ["n" * 64, "A", "vm@1", "a.b-c_d", "system"])
def test_what_is_a_name_of_a_producer(shared: Khod, name: str) -> None:
    peer = Hand(shared, name)
    assert peer.registered == {"version": 1, "run": "", "told": ""}
    peer.close()


def test_a_taken_name_is_refused_and_the_one_who_has_it_keeps_it(shared: Khod) -> None:
    first = Hand(shared, "first")
    second = Hand(shared, "first")
    assert second.registered["error"] == REFUSED
    assert "first" in second.registered["what"]
    assert "error" not in first.registered
    assert listed(shared).count("first") == 1
    assert refused(shared, "file")["error"] == REFUSED
    first.close()
    second.close()


def test_one_connection_is_one_producer(shared: Khod) -> None:
    peer = Hand(shared, "first")
    again = peer.call("Register", name="another", version=1)
    assert again["error"] == REFUSED
    assert "another" not in listed(shared)
    peer.close()


@pytest.mark.parametrize(
    "terms",
    [
        {"version": 0},
        {"version": -1},
        {"timeout": 0},
        {"timeout": -1.0},
        {"timeout": 1e300},
        {"timeout": float("nan")},
        {"timeout": float("inf")},
        {"timeout": 600.5},
        {"after": [f"n{number}" for number in range(33)]},
        {"before": [f"n{number}" for number in range(33)]},
        {"after": ["a/b"]},
        {"before": ["systemd"]},
        {"devices": [f"/dev/{number}" for number in range(33)]},
        {"devices": ["/etc/passwd"]},
        {"devices": ["dev/null"]},
        {"devices": ["/dev/../etc/passwd"]},
        {"devices": ["/sys/a\0b"]},
        {"devices": [f"/sys/{'x' * 255}"]},
        {"devices": [""]},
    ],
    ids=str,
)
def test_terms_that_make_no_sense_are_refused(shared: Khod, terms: dict[str, object]) -> None:
    assert refused(shared, "subject", **terms)["error"] == USAGE


@pytest.mark.parametrize(
    "terms",
    [
        {"version": "1"},
        {"version": None},
        {"version": 1.5},
        {"timeout": "30"},
        {"after": "first"},
        {"after": [1]},
        {"devices": {}},
        {"surprise": 1},
        {"kind": "hook"},
    ],
    ids=str,
)
def test_terms_of_another_type_are_refused(shared: Khod, terms: dict[str, object]) -> None:
    refused(shared, "subject", **terms)


def test_a_peer_is_shown_as_the_kind_that_it_names(shared: Khod) -> None:
    peer, other = Hand(shared, "first", kind="vm"), Hand(shared, "second")
    shown = {each["name"]: each["kind"] for each in shared.khoctl("producers", "--json").json}
    assert shown == {"first": "vm", "second": "varlink", "file": "hook"}
    peer.close()
    other.close()


def test_a_later_version_of_the_interface_is_answered_with_the_one_khod_has(shared: Khod) -> None:
    peer = Hand(shared, "first", version=7)
    assert peer.registered["version"] == 1
    peer.close()


def test_an_order_that_is_a_cycle_is_refused_with_its_names(shared: Khod) -> None:
    first = Hand(shared, "first", after=["second"])
    found = refused(shared, "second", after=["first"])
    assert {"first", "second"} <= {word.strip(".,") for word in found["what"].split()}
    with_file = refused(shared, "second", after=["file"])
    assert {"file", "second"} <= {word.strip(".,") for word in with_file["what"].split()}
    itself = refused(shared, "itself", after=["itself"])
    assert "itself" in itself["what"]
    first.close()


@pytest.mark.parametrize(
    "others",
    [
        {"a": {"after": ["last"], "before": ["last"]}},
        {"a": {"after": ["last"]}, "b": {"before": ["last"], "after": ["a"]}},
    ],
    ids=["one", "two"],
)
def test_a_cycle_that_only_the_last_one_closes_is_refused_too(
    khod_again: tuple[System, Khod], hand: Callable[..., Hand], others: dict[str, Any]
) -> None:
    """It asks for no order itself. Let in, it would end every operation of everyone's."""
    _, khod = khod_again
    peers = [hand(name, **terms) for name, terms in others.items()]
    assert all("error" not in peer.registered for peer in peers), "names that are not here are no constraint"
    last = hand("last")
    assert "error" in last.registered
    assert "last" in last.registered["what"]
    assert sorted(listed(khod)) == sorted(others)


# What an answer may be


def test_next_is_for_producers(shared: Khod) -> None:
    client = shared.connect()
    said = call(client, "io.kho.Producer.Next")
    assert said["error"] == REFUSED
    assert "Register" in said["parameters"]["remedy"]
    client.close()


WRONG: list[dict[str, object]] = [
    {"answer": "ready", "serial": None},
    {"answer": "perhaps"},
    {"answer": 1},
    {"answer": ["ready"]},
    {"answer": "ready", "serial": "1"},
    {"answer": "ready", "serial": 1.5},
    {"answer": "ready", "reason": 1},
    {"answer": "not_yet", "progress": 2},
    {"answer": "not_yet", "progress": -0.1},
    {"answer": "not_yet", "progress": float("nan")},
    {"answer": "not_yet", "progress": "half"},
    {"answer": "ready", "names": ["a", "b", "c"], "tokens": [1, 2, 3], "fds": [0, 1]},
    {"answer": "ready", "names": ["a"], "tokens": [1], "fds": []},
    {"answer": "ready", "names": ["a"], "tokens": [-1], "fds": [0]},
    {"answer": "ready", "names": ["a"], "tokens": [2**64], "fds": [0]},
    {"answer": "ready", "names": ["a"], "tokens": ["1"], "fds": [0]},
    {"answer": "ready", "names": [""], "tokens": [1], "fds": [0]},
    {"answer": "ready", "names": ["a\nb"], "tokens": [1], "fds": [0]},
    {"answer": "ready", "names": ["n" * 256], "tokens": [1], "fds": [0]},
    {"answer": "ready", "names": ["a"], "tokens": [1], "fds": [7]},
    {"answer": "ready", "stopped": -0.5},
    {"answer": "ready", "stopped": float("nan")},
    {"answer": "ready", "stopped": 1e300},
    {"answer": "ready", "surprise": 1},
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_an_answer_that_makes_no_sense_is_a_veto(
    khod_again: tuple[System, Khod], hand: Callable[..., Hand], wrong: dict[str, object]
) -> None:
    system, khod = khod_again
    peer = hand("subject")
    peer.ready()
    with begin(khod, "Activate") as operation:
        assert peer.told() == "prepare"
        fds = [memfd(), memfd()]
        said = {"serial": peer.serial, **wrong}
        peer.send("Next", files=fds, **{key: value for key, value in said.items() if value is not None})
        assert hung_up(peer.socket)
        peer.close()
        answer = reply(operation)
        assert answer.get("error") == REFUSED, answer
        assert "subject" in answer["parameters"]["what"]
        for fd in fds:
            os.close(fd)
    until(lambda: listed(khod) == [], khod.process)
    idle(khod, system)


@pytest.mark.parametrize(
    "raw",
    [
        b'{"method": "io.kho.Producer.Next", "parameters": {"serial": 1, "answer": "veto", "reason": "\xff"}}\0',
        b"\0",
        b"ready\0",
        b"[]\0",
        b'{"method": "io.kho.Producer.Nxet"}\0',
        b'{"method": 7}\0',
        b"[" * 100_000 + b"\0",
        b'{"method": "io.kho.Producer.Next", "parameters": {"reason": "' + b"x" * (1 << 20),
    ],
    ids=["utf-8", "empty", "no json", "no object", "no method", "no string", "deep", "endless"],
)
def test_a_message_that_is_no_answer_is_a_veto(
    khod_again: tuple[System, Khod], hand: Callable[..., Hand], raw: bytes
) -> None:
    system, khod = khod_again
    peer = hand("subject")
    peer.ready()
    with begin(khod, "Activate") as operation:
        assert peer.told() == "prepare"
        try:
            peer.socket.sendall(raw)
        except ConnectionError:
            assert raw.endswith(b"x")
        assert hung_up(peer.socket)
        peer.close()
        answer = reply(operation)
        assert answer.get("error") == REFUSED, answer
        assert "subject" in answer["parameters"]["what"]
    idle(khod, system)


@pytest.mark.parametrize("serial", [0, -1, 2, 2**63, 2**64])
def test_an_answer_to_another_command_counts_for_nothing(
    khod_again: tuple[System, Khod], hand: Callable[..., Hand], serial: int
) -> None:
    system, khod = khod_again
    peer = hand("subject")
    peer.ready()
    with begin(khod, "Activate") as operation:
        assert peer.told() == "prepare"
        assert peer.serial == 1
        peer.send("Next", serial=serial, answer="ready")
        shown = khod.ask("Producers")["producers"]
        assert [(found["phase"], found["waiting"]) for found in shown] == [("prepare", True)]
        peer.close()
        assert reply(operation)["error"] == REFUSED
    idle(khod, system)


def test_a_connection_cannot_answer_for_another(khod: Khod, system: System, hand: Callable[..., Hand]) -> None:
    victim, attacker = hand("victim"), hand("attacker")
    victim.ready()
    attacker.ready()
    with begin(khod, "Activate") as operation:
        assert victim.told() == "prepare"
        assert attacker.told() == "prepare"
        with khod.connect() as nobody:
            assert call(nobody, "io.kho.Producer.Next", serial=victim.serial, answer="ready")["error"] == REFUSED
        assert Hand(khod, "victim").registered["error"] == REFUSED
        attacker.send("Next", serial=victim.serial + 1, answer="ready")
        attacker.close()  # its veto is its own
        victim.send("Next")  # it says nothing, and listens
        assert victim.told() == "cancel"
        victim.ready()
        assert "attacker" in reply(operation)["parameters"]["what"]
    idle(khod, system)


# Whoever comes while a handover waits


def verb(operation: socket.socket) -> str:
    """The error an operation ends in, "" for none."""
    return str(reply(operation).get("error", ""))


def load(khod: Khod, system: System) -> socket.socket:
    """Begin to bring a handover to `loaded`."""
    files = [os.open(system.directory / name, os.O_RDONLY) for name in ("vmlinuz", "initrd")]
    operation = begin(khod, "Kexec", files=files, kernel={"image": 0, "initrds": [1]}, load_only=True)
    for fd in files:
        os.close(fd)
    return operation


def test_who_comes_while_active_is_told_everything_before_the_image_is_loaded(
    khod_again: tuple[System, Khod], hand: Callable[..., Hand]
) -> None:
    system, khod = khod_again
    assert khod.khoctl("activate").code == Exit.done
    late = hand("late")
    assert late.registered["told"] == ""
    with load(khod, system) as operation:
        late.follows("prepare", "freeze")
        assert not khod.loaded
        late.ready()
        assert verb(operation) == ""
    assert khod.loaded
    with begin(khod, "Abort") as operation:
        assert late.told() == "thaw"
        late.follows("cancel")
        late.ready()
        assert verb(operation) == ""
    idle(khod, system)


@pytest.mark.parametrize("no", ["prepare", "freeze"])
def test_the_veto_of_one_who_came_late_ends_the_handover(
    khod_again: tuple[System, Khod], hand: Callable[..., Hand], no: str
) -> None:
    system, khod = khod_again
    first = hand("first")
    first.ready()
    with begin(khod, "Activate") as operation:
        assert first.told() == "prepare"
        first.follows("freeze")
        first.ready()
        assert verb(operation) == ""
    late = hand("late")
    with load(khod, system) as operation:
        late.follows(*(["prepare"] if no == "prepare" else ["prepare", "freeze"]))
        late.send("Next", serial=late.serial, answer="veto", reason="it came too late")
        if no == "freeze":
            assert late.told() == "thaw"
            late.ready()
        assert first.told() == "thaw"
        first.ready()
        assert {first.told(), late.told()} == {"cancel"}
        first.ready()
        late.ready()
        answer = reply(operation)
    assert answer["error"] == REFUSED
    assert "late" in answer["parameters"]["what"]
    assert "it came too late" in answer["parameters"]["what"]
    idle(khod, system)


def test_who_comes_while_others_freeze_is_frozen_before_the_kernel_is_active(
    khod_again: tuple[System, Khod], hand: Callable[..., Hand]
) -> None:
    _, khod = khod_again
    slow = hand("slow")
    slow.ready()
    with begin(khod, "Activate") as operation:
        assert slow.told() == "prepare"
        slow.follows("freeze")
        late = hand("late")
        slow.ready()
        late.follows("prepare", "freeze")
        assert not khod.active
        late.ready()
        assert verb(operation) == ""
    assert khod.active


def test_who_comes_while_loaded_is_told_before_the_jump_and_may_end_it(
    khod_again: tuple[System, Khod], hand: Callable[..., Hand]
) -> None:
    system, khod = khod_again
    with load(khod, system) as operation:
        assert verb(operation) == ""
    late = hand("late")
    with begin(khod, "Kexec") as operation:
        late.follows("prepare")
        late.send("Next", serial=late.serial, answer="veto", reason="busy")
        assert late.told() == "cancel"
        late.ready()
        assert verb(operation) == REFUSED
    idle(khod, system)


def test_on_the_way_into_the_next_kernel_nobody_is_taken_in(system: System, khod: Khod) -> None:
    there, go = threading.Event(), threading.Event()

    def waits() -> None:
        there.set()
        assert go.wait(DEADLINE)

    system.mortal.append(waits)
    with load(khod, system) as operation:
        assert verb(operation) == ""
    with begin(khod, "Kexec"):
        assert there.wait(DEADLINE)
        late = Hand(khod, "late")
        go.set()
    assert late.registered["error"] == REFUSED
    assert "next kernel" in late.registered["what"]
    late.close()


# Whoever goes


@pytest.mark.parametrize("phase", ["active", "loaded"])
def test_a_peer_that_goes_while_the_handover_waits_ends_it(
    khod_again: tuple[System, Khod], hand: Callable[..., Hand], phase: str
) -> None:
    system, khod = khod_again
    stays, goes = hand("stays"), hand("goes")
    stays.ready()
    goes.ready()
    with load(khod, system) if phase == "loaded" else begin(khod, "Activate") as operation:
        for expected in ("prepare", "freeze"):
            for peer in (stays, goes):
                assert peer.told() == expected
                peer.ready()
        assert verb(operation) == ""
    assert khod.active
    goes.close()
    assert stays.told() == "thaw"
    stays.follows("cancel")
    stays.ready()
    until(lambda: khod.khoctl("status", "--json").json["phase"] == "idle", khod.process)
    last = khod.khoctl("status", "--json").json["last_error"]
    assert "goes" in last
    assert "stays" not in last
    idle(khod, system)
    assert listed(khod) == ["stays"]


def test_a_peer_that_goes_at_rest_is_forgotten(khod_again: tuple[System, Khod], hand: Callable[..., Hand]) -> None:
    system, khod = khod_again
    before = khod.khoctl("status", "--json").json["last_error"]
    first = hand("first", timeout=1, after=["x"], devices=["/dev/null"])
    first.close()
    until(lambda: listed(khod) == [], khod.process)
    again = hand("first", before=["x"])
    assert again.registered["told"] == ""
    idle(khod, system)
    assert khod.khoctl("status", "--json").json["last_error"] == before


def test_a_peer_that_was_put_back_goes_without_a_word(
    khod_again: tuple[System, Khod], hand: Callable[..., Hand]
) -> None:
    system, khod = khod_again
    peer = hand("first")
    peer.ready()
    with begin(khod, "Activate") as operation:
        assert peer.told() == "prepare"
        peer.follows("freeze")
        peer.ready()
        assert verb(operation) == ""
    with begin(khod, "Abort") as operation:
        assert peer.told() == "thaw"
        peer.follows("cancel")
        peer.ready()
        assert verb(operation) == ""
    peer.close()
    until(lambda: listed(khod) == [], khod.process)
    assert khod.khoctl("activate").code == Exit.done
    assert khod.khoctl("abort").code == Exit.done
    idle(khod, system)


# One alone: khoctl producers test


def test_a_rehearsal_drives_one_through_the_four_verbs_and_leaves_the_kernel_alone(
    khod_again: tuple[System, Khod], hand: Callable[..., Hand]
) -> None:
    system, khod = khod_again
    assert khod.khoctl("activate").code == Exit.done
    assert khod.khoctl("abort").code == Exit.done
    before = khod.record
    subject, other = hand("subject", after=["other"]), hand("other")
    subject.ready()
    other.ready()
    with begin(khod, "Rehearse", name="subject") as operation:
        assert subject.told() == "prepare"
        assert khod.khoctl("activate").code == Exit.refused, "one operation at a time"
        for expected in ("freeze", "thaw", "cancel"):
            fd = memfd()
            subject.ready(**(one_file(fd) if expected == "freeze" else {}))
            os.close(fd)
            assert subject.told() == expected
            assert not khod.active
        subject.ready()
        found = reply(operation)["parameters"]["producers"]
    assert [(row["name"], row["phase"], row["answer"]) for row in found] == [
        ("subject", each, "ready") for each in ("prepare", "freeze", "thaw", "cancel")
    ]
    idle(khod, system)
    assert khod.record == before
    with begin(khod, "Activate") as operation:
        assert other.told() == "prepare", "it was told nothing until now"


@pytest.mark.parametrize("no", ["prepare", "freeze"])
def test_a_veto_in_a_rehearsal_is_told_with_its_reason(
    khod_again: tuple[System, Khod], hand: Callable[..., Hand], no: str
) -> None:
    system, khod = khod_again
    subject = hand("subject")
    subject.ready()
    with begin(khod, "Rehearse", name="subject") as operation:
        assert subject.told() == "prepare"
        if no == "freeze":
            subject.follows("freeze")
        subject.send("Next", serial=subject.serial, answer="veto", reason="not today")
        for expected in ("thaw", "cancel") if no == "freeze" else ("cancel",):
            assert subject.told() == expected
            subject.ready()
        answer = reply(operation)
    assert answer["error"] == REFUSED
    assert "not today" in answer["parameters"]["what"]
    idle(khod, system)


def test_a_rehearsal_of_nobody_is_a_usage_error(shared: Khod) -> None:
    ended = shared.khoctl("producers", "test", "nobody")
    assert ended.code == Exit.usage
    assert "nobody" in ended.err


@pytest.mark.parametrize("name", ["active", "idle"])
def test_a_rehearsal_is_for_a_host_at_rest(
    khod_again: tuple[System, Khod], hand: Callable[..., Hand], name: str
) -> None:
    _, khod = khod_again
    if name == "active":
        assert khod.khoctl("activate").code == Exit.done
    subject = hand("subject")
    subject.ready()
    with begin(khod, "Rehearse", name="subject") as operation:
        if name == "active":
            assert verb(operation) == REFUSED
            assert khod.active
        else:
            assert subject.told() == "prepare"


@pytest.mark.parametrize("dies_at", ["preparing: subject: prepare: ready", "freezing: subject: freeze: ready"])
def test_a_khod_killed_in_a_rehearsal_is_followed_by_one_that_ends_it(system: System, dies_at: str) -> None:
    khod = system.khod(dies_at=dies_at)
    subject = Hand(khod, "subject")
    subject.ready()
    with begin(khod, "Rehearse", name="subject"):
        assert subject.told() == "prepare"
        fd = memfd()
        subject.ready(**one_file(fd))
        os.close(fd)
        if dies_at.startswith("freezing"):
            assert subject.told() == "freeze"
            subject.ready()
        khod.died()
    subject.close()
    khod = system.khod(ready=False)
    back = Hand(khod.listening(), "subject")
    back.ready()
    assert back.registered["told"] in ("prepare", "freeze")
    while back.told() != "cancel":
        back.ready()
    back.ready()
    khod.word("READY=1")
    idle(khod, system)
    back.close()


# What config asks for


def test_required_producers_are_asked_for_by_name(system: System) -> None:
    system.configure('[producers]\nrequire = ["vmm", "cache"]\n')
    khod = system.khod()
    refusal = khod.khoctl("activate")
    assert refusal.code == Exit.refused
    assert "vmm" in refusal.err
    assert "cache" in refusal.err
    peers = [Hand(khod, name) for name in ("vmm", "cache")]
    assert khod.khoctl("check").code == Exit.done
    peers[0].close()
    until(lambda: listed(khod) == ["cache"], khod.process)
    assert "vmm" in khod.khoctl("activate").err
    peers[1].close()
    idle(khod, system)


@pytest.mark.parametrize(("wanted", "code"), [("ftrace", Exit.done), ("memblock", Exit.refused)])
def test_required_producers_of_the_kernel_are_looked_for_in_its_tree(system: System, wanted: str, code: Exit) -> None:
    system.configure(f'[producers]\nrequire_kernel = ["{wanted}"]\n')
    khod = system.khod()
    ended = khod.khoctl("activate")
    assert ended.code == code, ended
    if code:
        assert wanted in ended.err
        idle(khod, system)


# The guard: hardware that changes


HARDWARE = "memory device x was added"
PHASES = [
    Phase.preparing,
    Phase.prepared,
    Phase.freezing,
    Phase.frozen,
    Phase.activating,
    Phase.active,
    Phase.loading,
    Phase.loaded,
]


async def at(host: LuoHost, phase: Phase, action: str, subsystem: str) -> None:
    """Let something happen to the hardware the moment khod first says that it is in this phase."""

    def happens(event: Event) -> bool:
        if event.phase is phase and not seen.done():
            seen.set_result(None)
            host.guard.event(action, subsystem)
        return False

    seen: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    watching = asyncio.ensure_future(host.seen(happens))
    seen.add_done_callback(lambda _: watching.cancel())
    await asyncio.sleep(0)  # it listens now


async def back_at_rest(host: LuoHost, engine: Engine) -> None:
    while engine.machine.phase is not Phase.idle:
        await host.seen(lambda _event: True)
    assert (host.kernel.active, host.kernel.loaded) == (False, False)
    assert not host.guard.watching


@pytest.fixture
def host(tmp_path: Path) -> LuoHost:
    made = LuoHost(tmp_path)
    made.hook("a")
    return made


@pytest.mark.parametrize("phase", PHASES)
async def test_hardware_that_changes_ends_a_handover_in_any_phase(host: LuoHost, phase: Phase) -> None:
    engine = await host.started()
    await at(host, phase, "add", "memory")
    with pytest.raises(Refused, match=HARDWARE):
        await host.kexec(engine)
    await back_at_rest(host, engine)
    assert HARDWARE in (await engine.queries.status()).last_error
    undone = ["a thaw"] if "a freeze" in host.verbs else []
    assert host.verbs[-len(undone) - 1 :] == [*undone, "a cancel"]
    assert "reboot" not in host.kernel.calls


@pytest.mark.parametrize("last", ["active", "loaded"])
async def test_hardware_that_changes_ends_a_handover_that_waits(host: LuoHost, last: str) -> None:
    engine = await host.started()
    await (engine.activate() if last == "active" else host.kexec(engine, load_only=True))
    host.guard.event("remove", "cpu", "/sys/devices/system/cpu/cpu3")
    await back_at_rest(host, engine)
    assert "cpu device cpu3 was removed" in (await engine.queries.status()).last_error
    assert host.verbs[-2:] == ["a thaw", "a cancel"]
    await engine.activate()
    assert host.guard.watching


@pytest.mark.parametrize("phase", PHASES)
async def test_hardware_that_is_only_recorded_ends_nothing(host: LuoHost, phase: Phase) -> None:
    engine = await host.started()
    await at(host, phase, "add", "net")
    await host.kexec(engine, load_only=True)
    assert engine.machine.phase is Phase.loaded
    assert [event.message for event in host.events].count("net device x was added") == 1


async def test_nobody_watches_before_and_after(host: LuoHost) -> None:
    engine = await host.started()
    assert not host.guard.watching
    await engine.activate()
    await engine.abort()
    host.guard.event("add", "memory")
    assert (await engine.queries.status()).last_error == ""
    assert not any(HARDWARE in event.message for event in host.events)


async def test_nothing_calls_the_jump_back(host: LuoHost) -> None:
    engine = await host.started()
    loop, reboot = asyncio.get_running_loop(), host.kernel.reboot_kexec

    def jump() -> None:
        loop.call_soon_threadsafe(host.guard.event, "add", "memory")
        reboot()

    host.kernel.reboot_kexec = jump  # type: ignore[method-assign]
    with pytest.raises(Rebooted):
        await host.kexec(engine)
    assert host.kernel.calls[-1] == "reboot"


async def test_hardware_that_changes_before_the_jump_is_asked_for_ends_the_handover(host: LuoHost) -> None:
    """The record says `executing` by then, and nobody was asked to jump yet."""
    engine = await host.started()
    await at(host, Phase.executing, "add", "memory")
    with pytest.raises(Refused, match="memory"):
        await host.kexec(engine)
    assert "reboot" not in host.kernel.calls
    await back_at_rest(host, engine)


async def test_a_producer_s_device_that_goes_ends_the_handover_in_its_name(host: LuoHost) -> None:
    host.hooks.append(Hook("vmm", 10, devices=("/dev/vfio/7",), commands={}))
    engine = await host.started()
    await engine.activate()
    assert dict(host.guard.devices)["vmm"] == ("/dev/vfio/7",)
    gone = Uevent("remove", "misc", "/sys/devices/virtual/misc/7", "/dev/vfio/7")
    host.guard.happened(Seen(Severity.abort, gone, ("vmm",)))
    await back_at_rest(host, engine)
    assert "vmm" in (await engine.queries.status()).last_error


async def test_the_device_of_one_who_came_late_is_watched_too(host: LuoHost) -> None:
    engine = await host.started()
    await engine.activate()
    host.hooks.append(Hook("vmm", 10, devices=("/dev/vfio/7",), commands={}))
    await host.kexec(engine, load_only=True)
    assert dict(host.guard.devices)["vmm"] == ("/dev/vfio/7",)
