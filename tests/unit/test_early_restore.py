# SPDX-License-Identifier: LGPL-2.1-or-later
"""The early restore: whom it gives back what was left, what it leaves to khod, and how khod takes over."""

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from khod.config import VerifySettings
from khod.early import restore
from khod.early.claims import EarlyClaim, read_claims
from khod.early.restore import NOTE_NAME, EarlyClient, EarlyRestore, begin_early_restore, read_told
from khod.handover.record import Owner, ProducerRecord, Record, Store
from khod.handover.session_names import session_of
from khod.model import Kept, Phase, Step
from khod.producers.cgroup import unit_of
from khod.producers.contents import take_spot
from tests.unit.arrived import (
    EARLY_STARTER,
    NEXT,
    READY,
    REGISTER,
    jump_with_producer,
    listen_at,
    put_back_departure,
    start_khod,
)
from tests.unit.khods import DEADLINE, reply, until
from tests.unit.luo import FakeLuo

RUN = "0579bd8c99b0"
NAME = "waiting"
HERE = unit_of(os.getpid())
STATE = b"state of the producer" * 999
Connect = Callable[[], socket.socket]
STEPS = (Step.prepare, Step.freeze, Step.load, Step.execute)


class Kernel(FakeLuo):
    """A kernel that was reached by the handover RUN."""

    def __init__(self) -> None:
        super().__init__()
        self.cmdline = f"root=/dev/vda khod.run={RUN}"
        self.calls: list[str] = []

    def read_file(self, path: str) -> bytes:
        return {"/proc/cmdline": self.cmdline, "/proc/sys/kernel/random/boot_id": "now\n"}[path].encode()

    def retrieve_session(self, name: str) -> int:
        self.calls.append(name)
        return super().retrieve_session(name)


class Arrived:
    """A boot in which producers have what they left in sessions; khod is about to start."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.kernel = Kernel()
        self.store = Store(directory)
        self._holders: list[ProducerRecord] = []

    def leave(self, name: str = NAME, *, files: Mapping[str, bytes] | None = None, **about: Any) -> None:
        """Have a producer of this process's user and unit leave files, STATE by default."""
        kept, session = [], session_of(RUN, name)
        files = {"state": STATE} if files is None else files
        if files:
            writer = self.kernel.create_session(session)
            for token, (file, text) in enumerate(files.items()):
                fd = os.memfd_create("file")
                os.write(fd, text)
                self.kernel.preserve_fd(writer, fd, token)
                kept.append(Kept(file, token, take_spot(fd, VerifySettings())))
                os.close(fd)
        holder = ProducerRecord(
            name, "varlink", "freeze", timeout=30.0, owner=Owner(0, HERE), kept=tuple(kept), restores=True
        )
        self._holders.append(replace(holder, **about))

    def jump(self, **about: Any) -> None:
        record = Record(phase=Phase.executing, run=RUN, boot_id="before", done=STEPS, producers=tuple(self._holders))
        self.store.write(replace(record, **about))
        self.kernel.jump()

    def claims(self) -> list[EarlyClaim]:
        return read_claims(str(self.store.record_path), self.kernel)

    @contextmanager
    def restoring(self, passed: Mapping[str, int] | None = None) -> Iterator[tuple[EarlyRestore, Connect]]:
        """Begin the early restore; gives it, and a function that connects."""
        with listen_at(self.directory / "activated") as listening:
            early = begin_early_restore(
                str(self.directory),
                str(self.directory),
                {"varlink": listening.fileno(), **(passed or {})},
                self.kernel,
            )
            assert early is not None
            clients: list[socket.socket] = []

            def connect() -> socket.socket:
                client = socket.socket(socket.AF_UNIX)
                client.settimeout(DEADLINE)
                client.connect(str(self.directory / "activated"))
                clients.append(client)
                return client

            try:
                yield early, connect
            finally:
                for client in clients:
                    client.close()
                taken = dict[str, int]()
                for left in early.stop(taken.__setitem__):
                    left.socket.close()
                for fd in taken.values():
                    os.close(fd)


@pytest.fixture
def arrived(tmp_path: Path) -> Arrived:
    return Arrived(tmp_path)


def register(client: socket.socket, name: str = NAME, **terms: Any) -> None:
    client.sendall(call_of("io.kho.Producer.Register", name=name, version=1, **terms))


def call_of(method: str, **parameters: Any) -> bytes:
    return json.dumps({"method": method, "parameters": parameters}).encode() + b"\0"


def command(client: socket.socket) -> tuple[dict[str, Any], list[int]]:
    data, fds, _, _ = socket.recv_fds(client, 1 << 16, 253)
    assert data.endswith(b"\0")
    return json.loads(data[:-1])["parameters"], fds


def stop(early: EarlyRestore) -> tuple[list[EarlyClient], dict[str, int]]:
    sessions = dict[str, int]()
    return early.stop(sessions.__setitem__), sessions


def is_silent(client: socket.socket) -> bool:
    client.settimeout(0.2)
    try:
        client.recv(1)
    except TimeoutError:
        return True
    return False


# Who is given what


def test_a_producer_has_its_files_before_khod_has_started(arrived: Arrived) -> None:
    arrived.leave(files={"a": b"first", "b": STATE}, timeout=7.5)
    arrived.jump()
    with arrived.restoring() as (early, connect):
        client = connect()
        register(client, timeout=7.5)
        assert reply(client)["parameters"] == {"version": 1, "run": RUN, "told": "restore"}
        client.sendall(NEXT)
        told, fds = command(client)
        assert (told["verb"], told["run"], told["serial"], told["timeout"]) == ("restore", RUN, 1, 7.5)
        assert told["names"] == ["a", "b"]
        assert [os.pread(fd, 1 << 16, 0) for fd in fds] == [b"first", STATE]
        (left,), sessions = stop(early)
        assert json.loads(left.register)["parameters"]["name"] == NAME
        assert left.is_told
        assert [*sessions] == [session_of(RUN, NAME)]
        assert read_told(str(arrived.directory / NOTE_NAME)) == {NAME}


def test_a_producer_without_files_is_told_that_it_may_go_on(arrived: Arrived) -> None:
    arrived.leave(files={})
    arrived.jump()
    with arrived.restoring() as (_, connect):
        client = connect()
        register(client)
        assert reply(client)["parameters"]["told"] == "restore"
        client.sendall(b'{"method": "io.kho.Producer.Next", "parameters": {}}\0')
        told, fds = command(client)
        assert (told["verb"], told["names"], fds) == ("restore", [], [])
        assert arrived.kernel.calls == []


def test_a_session_of_the_service_manager_is_not_retrieved_again(arrived: Arrived) -> None:
    arrived.leave()
    arrived.jump()
    name = session_of(RUN, NAME)
    kept = FakeLuo.retrieve_session(arrived.kernel, name)
    with arrived.restoring({name: kept}) as (early, connect):
        client = connect()
        register(client)
        reply(client)
        client.sendall(NEXT)
        _, (fd,) = command(client)
        assert os.pread(fd, 1 << 16, 0) == STATE
        assert arrived.kernel.calls == []
        assert stop(early)[1] == {}
    os.close(kept)


@pytest.mark.parametrize(
    "about",
    [
        {"owner": Owner(0, "another.service")},
        {"owner": Owner(1000, HERE)},
        {"owner": None},
        {"kind": "hook"},
        {"told": "prepare"},
        {"restores": False},
        {"kept": (Kept("state", 0),)},
        {"rank": 1},
    ],
    ids=repr,
)
def test_what_is_not_plainly_its_own_is_left_to_khod(arrived: Arrived, about: dict[str, Any]) -> None:
    arrived.leave(**about)
    arrived.leave("other")
    arrived.jump()
    with arrived.restoring() as (early, connect):
        client = connect()
        register(client)
        assert is_silent(client)
        (left,), _ = stop(early)
        assert (left.register, left.is_told) == (b"", False)
        assert left.socket.recv(1 << 12).endswith(b"\0"), "the call is still there for khod"


@pytest.mark.parametrize(
    "about",
    [
        {"phase": Phase.verifying},
        {"phase": Phase.rolling_back},
        {"phase": Phase.failed},
        {"phase": Phase.idle},
        {"boot_id": "now"},
        {"run": "another"},
        {"version": 2},
    ],
    ids=repr,
)
def test_only_the_first_start_after_the_jump_has_one(arrived: Arrived, about: dict[str, Any]) -> None:
    arrived.leave()
    arrived.jump()
    assert [claim.name for claim in arrived.claims()] == [NAME]
    arrived.jump(**about)
    assert arrived.claims() == []


@pytest.mark.parametrize("damaged", [b"", b"{", b"[]", b'{"version": 1}', b"\xff", b"[" * 100_000], ids=repr)
def test_a_record_that_cannot_be_read_is_left_to_khod(arrived: Arrived, damaged: bytes) -> None:
    arrived.store.record_path.write_bytes(damaged)
    assert arrived.claims() == []


def test_who_is_told_later_waits_for_khod(arrived: Arrived) -> None:
    arrived.leave("second", rank=1)
    arrived.leave("first")
    arrived.leave("keeps-nothing", restores=False, kind="hook")
    arrived.jump()
    assert [claim.name for claim in arrived.claims()] == ["first"]


def test_a_file_that_arrived_with_other_contents_is_left_to_khod(arrived: Arrived) -> None:
    arrived.leave("flipped", files={"good": STATE, "bad": STATE})
    arrived.leave()
    arrived.jump()
    session = FakeLuo.retrieve_session(arrived.kernel, name := session_of(RUN, "flipped"))
    bad = arrived.kernel.retrieve_fd(session, 1)
    os.pwrite(bad, b"S", 3)
    with arrived.restoring({name: session}) as (_, connect):
        client, other = connect(), connect()
        register(other)
        reply(other)
        register(client, "flipped")
        assert is_silent(client)
    os.close(session)


def test_a_busy_device_is_tried_again(arrived: Arrived) -> None:
    arrived.leave()
    arrived.jump()
    arrived.kernel.busy = 2
    with arrived.restoring() as (_, connect):
        until(lambda: arrived.kernel.busy == 0, None)
        until(lambda: len(arrived.kernel.calls) > 2, None)
        client = connect()
        register(client)
        reply(client)
        client.sendall(NEXT)
        assert command(client)[0]["verb"] == "restore"


@pytest.mark.parametrize(
    "first",
    [
        b'{"method": "io.kho.Handover.Status"}\0',
        REGISTER[:-9],
        REGISTER.replace(b'"version": 1', b'"version": 2'),
        REGISTER.replace(b'"waiting"', b"7"),
        REGISTER.replace(b"}}", b'}, "more": true}'),
        REGISTER.replace(b'"version": 1', b'"version": 1, "timeout": "long"'),
        b"\0",
        b"[]\0",
        b"\xff\0",
        NEXT,
    ],
    ids=repr,
)
def test_a_client_that_calls_otherwise_is_left_to_khod(arrived: Arrived, first: bytes) -> None:
    arrived.leave()
    arrived.jump()
    with arrived.restoring() as (early, connect):
        client, producer = connect(), connect()
        client.sendall(first)
        register(producer)
        assert reply(producer)["parameters"]["told"] == "restore"  # the others are served all the same
        (_, left), _ = stop(early)
        assert left.register == b""
        assert left.socket.recv(1 << 12) == first


def test_a_name_is_given_to_one_of_two(arrived: Arrived) -> None:
    arrived.leave()
    arrived.jump()
    with arrived.restoring() as (_, connect):
        first, second = connect(), connect()
        register(first)
        reply(first)
        register(second)
        assert is_silent(second)
        first.sendall(NEXT)
        assert command(first)[0]["verb"] == "restore"


def test_an_operators_khod_on_the_same_record_is_not_joined(arrived: Arrived) -> None:
    arrived.leave()
    arrived.jump()
    other = os.open(arrived.directory, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with listen_at(arrived.directory / "activated") as listening:
        passed, at = {"varlink": listening.fileno()}, str(arrived.directory)
        assert begin_early_restore(at, at, passed, arrived.kernel) is None
    os.close(other)


def test_after_a_khod_that_died_another_does_not_give_again(arrived: Arrived) -> None:
    arrived.leave()
    arrived.jump()
    (arrived.directory / NOTE_NAME).touch()
    with listen_at(arrived.directory / "activated") as listening:
        passed, at = {"varlink": listening.fileno()}, str(arrived.directory)
        assert begin_early_restore(at, at, passed, arrived.kernel) is None


# How khod takes over


@pytest.fixture(scope="module")
def departed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("departed")
    jump_with_producer(directory)
    put_back_departure(directory)
    return directory


@pytest.fixture
def host(departed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(departed, tmp_path / "host")


@contextmanager
def starting(host: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Start khod in the first boot after the jump, with an early restore."""
    with listen_at(host / "activated") as listening, start_khod(host, listening, EARLY_STARTER.format(at=host)) as khod:
        yield khod


def read_record(host: Path) -> Record:
    record = Store(host / "state").read()
    assert record is not None
    return record


def wait_outcome(host: Path, khod: "subprocess.Popen[bytes]") -> Record:
    until(lambda: read_record(host).phase in (Phase.verified, Phase.degraded), khod)
    return read_record(host)


def answer(client: socket.socket, serial: int, word: str, **more: Any) -> None:
    client.sendall(call_of("io.kho.Producer.Next", serial=serial, answer=word, **more))


def begin(client: socket.socket) -> int:
    """Register, and be told `restore`."""
    assert reply(client)["parameters"]["told"] == "restore"
    client.sendall(NEXT)
    told = reply(client)["parameters"]
    assert told["verb"] == "restore"
    return int(told["serial"])


def end(client: socket.socket) -> None:
    """Be told `finish`, and answer."""
    told = reply(client)["parameters"]
    assert told["verb"] == "finish"
    client.sendall(READY % told["serial"])


def connect_at(host: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(DEADLINE)
    client.connect(str(host / "activated"))
    return client


def assert_taken_back(host: Path, khod: "subprocess.Popen[bytes]") -> None:
    """Connect the producer, which takes back what it left; it counts as arrived."""
    with connect_at(host) as producer:
        producer.sendall(REGISTER)
        producer.sendall(READY % begin(producer))
        end(producer)
        verdict = wait_outcome(host, khod).verdict
    assert verdict is not None
    assert NAME in verdict.arrived


def test_khod_takes_over_a_producer_that_was_told(host: Path) -> None:
    with listen_at(host / "activated") as listening, connect_at(host) as producer:
        producer.sendall(REGISTER + NEXT)  # before khod begins: however slow this test is, it is early
        with start_khod(host, listening, EARLY_STARTER.format(at=host)) as khod:
            assert reply(producer)["parameters"]["told"] == "restore"
            producer.sendall(READY % int(reply(producer)["parameters"]["serial"]))
            end(producer)
            record = wait_outcome(host, khod)
    assert (host / NOTE_NAME).exists(), "it was not early"
    assert record.verdict is not None
    assert NAME in record.verdict.arrived
    assert record.claims == ()


def test_it_may_answer_long_after_khod_has_started(host: Path) -> None:
    with starting(host) as khod, connect_at(host) as producer, connect_at(host) as operator:
        producer.sendall(REGISTER)
        serial = begin(producer)
        operator.sendall(call_of("io.kho.Handover.Status"))
        assert reply(operator)["parameters"]["status"]["phase"] == "verifying"
        answer(producer, serial, "not_yet", reason="reads its tables")
        again = reply(producer)["parameters"]
        assert (again["serial"], again["verb"]) == (serial, "restore")
        producer.sendall(READY % serial)
        end(producer)
        wait_outcome(host, khod)


def test_one_that_has_only_registered_is_told_by_khod(host: Path) -> None:
    with starting(host) as khod, connect_at(host) as producer, connect_at(host) as operator:
        producer.sendall(REGISTER)
        assert reply(producer)["parameters"]["told"] == "restore"
        operator.sendall(call_of("io.kho.Handover.Status"))
        reply(operator)
        producer.sendall(NEXT)
        told = reply(producer)["parameters"]
        assert told["verb"] == "restore"
        producer.sendall(READY % told["serial"])
        end(producer)
        wait_outcome(host, khod)


def test_one_that_refuses_is_missing_and_may_take_it_later(host: Path) -> None:
    with starting(host) as khod, connect_at(host) as producer:
        producer.sendall(REGISTER)
        answer(producer, begin(producer), "veto", reason="no room")
        verdict = wait_outcome(host, khod).verdict
        assert verdict is not None
        assert NAME in verdict.missing
        assert "no room" in str(verdict.findings)
        assert [claim.name for claim in read_record(host).claims] == [NAME]


def test_one_that_dies_after_it_was_told_is_told_again(host: Path) -> None:
    with starting(host) as khod:
        with connect_at(host) as first:
            first.sendall(REGISTER)
            begin(first)
        assert_taken_back(host, khod)


def test_a_khod_that_dies_after_it_is_followed_by_one_that_tells_it_again(host: Path) -> None:
    with starting(host) as khod, connect_at(host) as producer:
        producer.sendall(REGISTER)
        begin(producer)
        khod.send_signal(signal.SIGKILL)
        khod.wait()
    (host / "activated").unlink()
    with starting(host) as khod:
        assert_taken_back(host, khod)


# What comes odd


def test_an_early_call_that_khod_does_not_understand_is_left_to_it(host: Path) -> None:
    """A byte order mark, and bytes that are no UTF-8, which Python's parser takes."""
    odd = [b"\xef\xbb\xbf" + REGISTER, REGISTER.replace(b'{"method"', b'{"method": "\xed\xa0\x80", "method"', 1)]
    with starting(host) as khod, connect_at(host) as operator:
        clients = [connect_at(host) for _ in odd]
        for client, call in zip(clients, odd, strict=True):
            client.sendall(call)
        operator.sendall(call_of("io.kho.Handover.Status"))
        assert reply(operator)["parameters"]["status"]["phase"] == "verifying"
        for client in clients:
            assert "error" in reply(client)
            client.close()
        assert khod.poll() is None


@pytest.mark.parametrize(
    "terms",
    [
        {"timeout": 0},
        {"timeout": 601},
        {"timeout": float("nan")},
        {"timeout": True},
        {"version": True},
        {"after": ["not a name"]},
        {"after": "other"},
        {"devices": ["/etc/passwd"]},
        {"kind": "unknown"},
        {"unknown": [[[]]]},
        {"after": ["other"]},
    ],
    ids=repr,
)
def test_one_that_registers_otherwise_than_before_is_left_to_khod(arrived: Arrived, terms: dict[str, Any]) -> None:
    arrived.leave()
    arrived.leave("other")
    arrived.jump()
    with arrived.restoring() as (_, connect):
        odd, other = connect(), connect()
        odd.sendall(call_of("io.kho.Producer.Register", **{"name": NAME, "version": 1, **terms}))
        register(other, "other")
        reply(other)
        assert is_silent(odd)


def test_one_that_registers_as_before_is_answered(arrived: Arrived) -> None:
    arrived.leave(timeout=7.5, after=("db",), before=("lb",), devices=("/dev/vfio/7",))
    arrived.jump()
    with arrived.restoring() as (_, connect):
        client = connect()
        register(client, timeout=7.5, after=["db"], before=["lb"], devices=["/dev/vfio/7"], kind="varlink")
        assert reply(client)["parameters"]["told"] == "restore"


ODD: list[Callable[[dict[str, Any]], object]] = [
    lambda holder: holder.update(name=7),
    lambda holder: holder.update(name=[]),
    lambda holder: holder.update(owner=[0, HERE]),
    lambda holder: holder.update(owner="root"),
    lambda holder: holder.update(kept={"state": 0}),
    lambda holder: holder.update(rank=None),
    lambda holder: holder.update(rank=float("nan")),
    lambda holder: holder.pop("rank"),
    lambda holder: holder["owner"].update(unit=7),
    lambda holder: holder["kept"][0].update(token="0"),
    lambda holder: holder["kept"][0].update(token=-1),
    lambda holder: holder["kept"][0].update(token=1 << 64),
    lambda holder: holder["kept"][0].update(token=float("nan")),
    lambda holder: holder["kept"][0]["spot"].update(pages=["a"]),
    lambda holder: holder["kept"][0]["spot"].update(pages=[-1]),
    lambda holder: holder["kept"][0]["spot"].update(pages=[10**400]),
    lambda holder: holder["kept"][0]["spot"].update(size=[]),
    lambda holder: holder["kept"][0]["spot"].update(digest=None),
    lambda holder: holder.update(timeout="long"),
]


@pytest.mark.parametrize("damage", ODD)
def test_nothing_is_given_by_an_odd_record(arrived: Arrived, damage: Callable[[dict[str, Any]], object]) -> None:
    arrived.leave()
    arrived.jump()
    record = json.loads(arrived.store.record_path.read_bytes())
    damage(record["producers"][0])
    arrived.store.record_path.write_text(json.dumps(record))
    assert arrived.claims() == []


def test_two_holders_of_one_name_are_left_to_khod(arrived: Arrived) -> None:
    arrived.leave()
    arrived.leave("other")
    arrived.jump()
    record = json.loads(arrived.store.record_path.read_bytes())
    record["producers"][1]["name"] = NAME
    arrived.store.record_path.write_text(json.dumps(record))
    assert arrived.claims() == []


def test_one_whose_files_cannot_be_taken_does_not_end_the_early_restore(arrived: Arrived) -> None:
    arrived.leave("lost")
    arrived.leave()
    arrived.jump()
    os.close(FakeLuo.retrieve_session(arrived.kernel, session_of(RUN, "lost")))
    arrived.kernel.busy = 1 << 30
    with arrived.restoring() as (early, connect):
        lost, other = connect(), connect()
        register(lost, "lost")
        reply(lost)
        register(other)
        reply(other)
        arrived.kernel.busy = 0
        until(lambda: "lost" not in early._claims, None)
        lost.sendall(NEXT)
        other.sendall(NEXT)
        assert command(other)[0]["verb"] == "restore"
        assert is_silent(lost)


def test_who_has_the_name_is_taken_over_first(arrived: Arrived) -> None:
    """Otherwise khod registers one that connected before, and gives it the same state."""
    arrived.leave()
    arrived.jump()
    with arrived.restoring() as (early, connect):
        second, first = connect(), connect()
        register(first)
        reply(first)
        register(second)
        clients, _ = stop(early)
        assert [bool(client.register) for client in clients] == [True, False]
        for client in clients:
            client.socket.close()


def test_a_command_that_the_socket_does_not_take_at_once_is_left_to_khod(arrived: Arrived) -> None:
    files = {chr(0x430) * 250 + str(number): b"x" for number in range(250)}
    arrived.leave(files=files)
    arrived.leave("other")
    arrived.jump()
    with arrived.restoring() as (_, connect):
        client, other = connect(), connect()
        register(client)
        reply(client)
        client.sendall(NEXT)
        register(other, "other")
        reply(other)
        assert is_silent(client)


def test_a_command_that_is_not_sent_as_a_whole_ends_the_connection(arrived: Arrived) -> None:
    """Its producer would wait for the rest of it."""
    arrived.leave(files={f"{number:060}": b"x" for number in range(200)})
    arrived.jump()
    with arrived.restoring() as (early, connect):
        client = connect()
        register(client)
        reply(client)
        (taken,) = early._clients.values()
        taken.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        client.sendall(NEXT)
        while client.recv(1 << 16):
            pass
        (left,), _ = stop(early)
        assert left.is_told, "its files were compared, and it may have them"


def test_not_all_descriptors_are_taken_ahead(arrived: Arrived, monkeypatch: pytest.MonkeyPatch) -> None:
    """khod has some to start with, and who comes is given its files all the same."""
    monkeypatch.setattr(restore, "MAX_OPEN", 10)
    names = ["p0", "p1", "p2", "p3"]
    for name in names:
        arrived.leave(name, files={str(number): b"x" for number in range(4)})
    arrived.jump()
    with arrived.restoring() as (early, connect):
        until(lambda: len(arrived.kernel.calls) == 2, None)
        for name in reversed(names):
            client = connect()
            register(client, name)
            reply(client)
            assert sum(len(claim.fds or ()) for claim in [*early._claims.values()]) <= 8
            client.sendall(NEXT)
            _, fds = command(client)
            assert len(fds) == 4
            for fd in fds:
                os.close(fd)


# What does not answer


def test_a_kernel_that_answers_late_is_not_waited_for(arrived: Arrived, monkeypatch: pytest.MonkeyPatch) -> None:
    """khod has the session when it comes, and whoever calls meanwhile is khod's."""
    monkeypatch.setattr(restore, "STOP_SECONDS", 0.05)
    arrived.leave()
    arrived.jump()
    asked, answers, come = threading.Event(), threading.Event(), threading.Event()

    def retrieve_session(name: str) -> int:
        asked.set()
        answers.wait(DEADLINE)
        return FakeLuo.retrieve_session(arrived.kernel, name)

    monkeypatch.setattr(arrived.kernel, "retrieve_session", retrieve_session)
    with arrived.restoring() as (early, connect):
        assert asked.wait(DEADLINE)
        register(connect())
        sessions = dict[str, int]()

        def keep(name: str, session: int) -> None:
            sessions[name] = session
            come.set()

        assert early.stop(keep) == []
        assert sessions == {}
        answers.set()
        assert come.wait(DEADLINE)
        early._thread.join(DEADLINE)
        assert [*sessions] == [session_of(RUN, NAME)]
        assert early._clients == {}
        os.close(sessions.popitem()[1])


def test_a_session_is_khods_while_the_service_manager_reads_nothing(
    arrived: Arrived, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restore, "STOP_SECONDS", 0.05)
    asked, answers = threading.Event(), threading.Event()

    def send_descriptor(_name: str, _fd: int) -> None:
        asked.set()
        answers.wait(DEADLINE)

    monkeypatch.setattr(restore, "send_descriptor", send_descriptor)
    arrived.leave()
    arrived.jump()
    with arrived.restoring() as (early, _):
        assert asked.wait(DEADLINE)
        _, sessions = stop(early)
        assert [*sessions] == [session_of(RUN, NAME)]
        answers.set()
        early._thread.join(DEADLINE)
        os.close(sessions.popitem()[1])
