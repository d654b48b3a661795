# SPDX-License-Identifier: LGPL-2.1-or-later
"""Many producers: a thousand pass the barrier together, too many harm nobody, users do not hinder each other."""

import grp
import json
import resource
import select
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from khod.client.handover import Client
from khod.model import Status
from tests.budget import repetitions
from tests.unit.khods import DEADLINE, NOBODY, Khod, call, hung_up, reply, until

MANY = 1000
CROWD = repetitions(10_000, test=3_000)
MOST = 2048  # producers.max_per_user, as /etc/kho/khod.toml documents it
DESCRIPTORS = 4096  # a producer is a connection; khod keeps 256 descriptors for its own work
KIB_EACH = 40
KIB_PILED = 2048  # what any process's memory goes up by in between
SETTLED_LOOKS = 40
USER = 60010  # of no other test: the kernel counts the descriptors that each user has under way
REGISTER = "io.kho.Producer.Register"
GET_INFO = "org.varlink.service.GetInfo"

CONNECTOR = """
import socket, sys
ours = socket.socket(fileno=0)
while ours.recv(1):
    with socket.socket(socket.AF_UNIX) as made:
        made.connect(sys.argv[1])
        socket.send_fds(ours, [b"x"], [made.fileno()])
"""
"""Connects once for each byte it gets, and passes the connection on; to the kernel it stays this process's."""


@pytest.fixture(autouse=True)
def _descriptors() -> Iterator[None]:
    """Room for the peers, here and in khod, which inherits the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, DESCRIPTORS), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def started(directory: Path, settings: str = "") -> Iterator[Khod]:
    """A khod with these settings, which has nothing to complain of at the end."""
    (directory / "root/etc/kho").mkdir(parents=True)
    (directory / "root/etc/kho/khod.toml").write_text(settings)
    made = Khod(directory)
    try:
        yield made
        assert made.process.poll() is None, made.errors.read_text()
        assert made.errors.read_text() == ""
    finally:
        made.close()


def register(client: socket.socket, name: str) -> str:
    """Register a connection; "" where khod takes it, else what it says."""
    answer = call(client, REGISTER, name=name, version=1)
    if "error" not in answer:
        return ""
    assert answer["error"] == "io.kho.Handover.Refused"
    return str(answer["parameters"]["what"])


def registered(khod: Khod, name: str) -> socket.socket:
    client = khod.connect()
    assert register(client, name) == ""
    return client


def tell(client: socket.socket, method: str, **parameters: object) -> None:
    """Make a call and leave its reply for later."""
    client.sendall(json.dumps({"method": method, "parameters": parameters}).encode() + b"\0")


def status(khod: Khod) -> Status:
    with Client(khod.socket) as client:
        return client.status()


class Crowd:
    """Producers that say ready to all they are told. `told` is what came, by whom and in the order it came."""

    def __init__(self, peers: dict[int, socket.socket]) -> None:
        self.peers = peers
        self.told: list[tuple[int, dict[str, Any]]] = []
        self._poll = select.epoll()
        for number, peer in peers.items():
            self._poll.register(peer, select.EPOLLIN)
            tell(peer, "io.kho.Producer.Next")
            assert peer.fileno() == number

    def until_replied(self, client: socket.socket) -> dict[str, Any]:
        """Take part until khod has replied to `client`; the reply."""
        self._poll.register(client, select.EPOLLIN)
        while True:
            ready = [fd for fd, _events in self._poll.poll(DEADLINE)]
            assert ready, "nobody is told anything"
            if client.fileno() in ready:
                self._poll.unregister(client)
                return reply(client)
            for fd in ready:
                command = reply(self.peers[fd])["parameters"]
                self.told.append((fd, command))
                tell(self.peers[fd], "io.kho.Producer.Next", serial=command["serial"], answer="ready")


def test_a_thousand_are_told_each_verb_once_and_together(tmp_path: Path) -> None:
    verbs = ("prepare", "freeze", "thaw", "cancel")
    with started(tmp_path) as khod, ExitStack() as stack:
        peers = [stack.enter_context(registered(khod, f"producer-{number}")) for number in range(MANY)]
        crowd, client = Crowd({peer.fileno(): peer for peer in peers}), stack.enter_context(khod.connect())
        tell(client, "io.kho.Handover.Activate")
        active = crowd.until_replied(client)["parameters"]["status"]
        assert active["phase"] == "active"
        assert [producer["answer"] for producer in active["producers"]] == ["ready"] * MANY
        assert {producer["rank"] for producer in active["producers"]} == {0}
        tell(client, "io.kho.Handover.Abort")
        assert crowd.until_replied(client)["parameters"]["status"]["phase"] == "idle"
        # Nobody hears of the next verb before everyone has heard, and answered, the one before.
        assert [command["verb"] for _, command in crowd.told] == [verb for verb in verbs for _ in range(MANY)]
        assert Counter(fd for fd, _ in crowd.told) == dict.fromkeys(crowd.peers, len(verbs))
        assert len({(fd, command["serial"]) for fd, command in crowd.told}) == len(verbs) * MANY
        assert {command["run"] for _, command in crowd.told} == {active["run"]}
        assert not khod.active


def test_more_registrations_of_one_user_than_are_taken_leave_room_for_others(tmp_path: Path) -> None:
    with started(tmp_path) as khod, ExitStack() as stack:
        assert status(khod).producers == []
        memory, files, taken = khod.resident, khod.descriptors, 0
        for number in range(CROWD):
            client = stack.enter_context(khod.connect())
            said = register(client, f"producer-{number}")
            if said:
                assert str(MOST) in said
                assert hung_up(client)
                client.close()
            else:
                taken += 1
            if number % MANY == 0:
                assert len(status(khod).producers) == taken
        assert taken == MOST
        assert len(status(khod).producers) == MOST
        until(lambda: khod.descriptors <= files + MOST, khod.process)
        assert khod.resident - memory <= MOST * KIB_EACH << 10


@contextmanager
def as_user(path: Path) -> Iterator[socket.socket]:
    """Another user's process that connects whenever it is asked; of root's rights it keeps the one to find the path."""
    caps = [f"--{kind}-caps=-all,+dac_read_search" for kind in ("inh", "ambient")]
    become = ["setpriv", f"--reuid={USER}", f"--regid={NOBODY}", "--clear-groups", *caps]
    ours, theirs = socket.socketpair()
    ours.settimeout(DEADLINE)
    with (
        ours,
        theirs,
        subprocess.Popen([*become, sys.executable, "-c", CONNECTOR, str(path)], stdin=theirs.fileno()) as process,
    ):
        try:
            yield ours
        finally:
            ours.shutdown(socket.SHUT_RDWR)
            process.wait(DEADLINE)


def connection(connector: socket.socket) -> socket.socket:
    connector.sendall(b"x")
    _data, fds, _flags, _address = socket.recv_fds(connector, 1, 1)
    made = socket.socket(fileno=fds[0])
    made.settimeout(DEADLINE)
    return made


def open_to_nobody(most: int) -> str:
    group = grp.getgrgid(NOBODY).gr_name
    return f'[access]\nproducers = "{group}"\n[producers]\nmax_per_user = {most}\n'


def test_one_users_producers_do_not_hinder_another_users(tmp_path: Path) -> None:
    with started(tmp_path, open_to_nobody(2)) as khod, as_user(khod.socket) as connector, ExitStack() as stack:
        mine = [stack.enter_context(registered(khod, f"root-{number}")) for number in range(2)]
        with khod.connect() as third:
            assert "User 0 has 2" in register(third, "root-2")
        for number in range(2):
            assert register(stack.enter_context(connection(connector)), f"nobody-{number}") == ""
        with connection(connector) as third:
            assert f"User {USER} has 2" in register(third, "nobody-2")
        mine[0].close()
        until(lambda: len(status(khod).producers) == 3, khod.process)
        with connection(connector) as third:
            assert f"User {USER} has 2" in register(third, "nobody-2")
        stack.enter_context(registered(khod, "root-2"))


def test_one_user_may_have_more_producers_than_other_connections(tmp_path: Path) -> None:
    """access.max_connections_per_user (64 unless set) bounds who asks, producers.max_per_user who takes part."""
    with (
        started(tmp_path, open_to_nobody(100)) as khod,
        as_user(khod.socket) as connector,
        ExitStack() as stack,
    ):
        for number in range(100):
            assert register(stack.enter_context(connection(connector)), f"producer-{number}") == ""
        with connection(connector) as another:
            assert "has 100" in register(another, "producer-100")


def test_names_and_places_are_free_again_when_their_connections_end(tmp_path: Path) -> None:
    with started(tmp_path, f"[producers]\nmax_per_user = {MANY}\n") as khod:
        assert status(khod).producers == []  # what serves clients is there from the first one on
        files = khod.descriptors
        for _turn in range(2):
            with ExitStack() as stack:
                for number in range(MANY):
                    stack.enter_context(registered(khod, f"producer-{number}"))
                assert len(status(khod).producers) == MANY
            until(lambda: status(khod).producers == [], khod.process)
        until(lambda: khod.descriptors <= files, khod.process)


def test_calls_of_one_connection_are_answered_in_their_order(tmp_path: Path) -> None:
    """Varlink replies name no call: out of order, an answer would be taken for another one's."""
    with started(tmp_path) as khod, registered(khod, "slow") as slow, khod.connect() as client:
        tell(slow, "io.kho.Producer.Next")
        tell(client, "io.kho.Handover.Activate")
        serial = reply(slow)["parameters"]["serial"]
        tell(client, GET_INFO)
        assert status(khod).waiting_for == ["slow"]  # by now khod has read the second call
        undo = call(slow, "io.kho.Producer.Next", serial=serial, answer="veto", reason="not now")["parameters"]
        assert undo["verb"] == "cancel"
        tell(slow, "io.kho.Producer.Next", serial=undo["serial"], answer="ready")
        assert reply(client)["error"] == "io.kho.Handover.Refused"
        assert reply(client)["parameters"]["vendor"]


def settled_memory(khod: Khod) -> int:
    """khod's resident memory in bytes, once it is at rest: at first it imports what a handover will need."""
    seen: list[int] = []

    def is_at_rest() -> bool:
        seen.append(khod.resident)
        return len(seen) > SETTLED_LOOKS and len({*seen[-SETTLED_LOOKS:]}) == 1

    until(is_at_rest, khod.process)
    return seen[-1]


def test_one_connection_cannot_pile_up_calls(tmp_path: Path) -> None:
    """What it sends while its first call is served stays in the kernel, at its own expense, until there is no room."""
    with started(tmp_path) as khod, khod.connect() as client:
        client.sendall(b'{"method":"io.kho.Handover.Monitor","more":true}\0')
        assert reply(client)["continues"]
        memory = settled_memory(khod)
        client.setblocking(False)
        calls = b'{"method":"io.kho.Handover.Monitor","more":true}\0' * MANY * MANY
        assert client.send(calls) < len(calls)
        poll = select.poll()
        poll.register(client, select.POLLOUT)
        assert not poll.poll(0), "khod reads on"
        assert status(khod).phase.name == "idle"
        assert khod.resident - memory < KIB_PILED << 10
