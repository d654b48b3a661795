# SPDX-License-Identifier: LGPL-2.1-or-later
"""Clients without rights that do their worst, all at a time, while root takes the host there and back.

khod is a process on the simulated kernel, the attackers are processes of other users. What they may cost is stated in
these bounds; how much longer root's work takes is measured by `make bench` (tests/bench/attackers.py).
"""

import grp
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from khod.errors import Exit
from khod.server.limits import MAX_MESSAGE_BYTES, MAX_OTHERS_MESSAGE_BYTES
from tests.unit import attackers
from tests.unit.images import CPIO, bzimage
from tests.unit.khods import DEADLINE, NOBODY, REPOSITORY, Khod, call, hung_up, public_directory, reply, until

USERS = (NOBODY, 65533, 60001, 60002, 60003)
CONNECTIONS = 20  # of each user; a storm makes more, and access.max_connections_per_user bounds those
MAX_PER_USER = 64
ROUNDS = 5  # of activate and abort
MAX_FDS = 253  # SCM_MAX_FD
LIMIT_NOFILE = 8192  # of the unit

OWN_DESCRIPTORS = 64  # khod's at rest: its socket, epolls, standard streams, the record's directory
MAX_DESCRIPTORS = OWN_DESCRIPTORS + len(USERS) * MAX_PER_USER
MAX_GROWTH_BYTES = 96 << 20  # events that nobody reads (16 MiB), what is held for the users (32 MiB), and fragments
MAX_THREADS = 24  # the kernel's, those of blocking calls, a lookup of groups, two that close files

LINGER = """
import os, socket, struct, sys
listening = socket.create_server(("127.0.0.1", 0))
ours = socket.create_connection(listening.getsockname())
theirs, _address = listening.accept()
ours.setblocking(False)
try:
    while True:
        ours.send(bytes(1 << 16))
except BlockingIOError:
    pass
ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 3600))
client = socket.socket(socket.AF_UNIX)
client.connect(sys.argv[1])
socket.send_fds(client, [b'{"method": "io.kho.Handover.Status"}' + bytes(1)], [ours.fileno()])
os.dup2(0, ours.detach())  # not a close: the last reference is the one on its way
if sys.argv[2] == "gone":
    client.close()
print("sent", flush=True)
sys.stdin.read()
"""
"""Passes a socket whose close waits an hour for a peer that does not read."""


class Limited(Khod):
    """A khod with a limit of open files."""

    nofile = LIMIT_NOFILE

    def command(self) -> list[str]:
        return ["prlimit", f"--nofile={self.nofile}:{self.nofile}", *super().command()]

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Have it do nothing for a while: what comes stays in its sockets."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def there_and_back(self) -> None:
        """Activate and abort as root."""
        assert self.khoctl("activate").code == Exit.done
        assert self.active
        assert (self.directory / "frozen").exists()
        self.back()

    def back(self) -> None:
        """Abort as root."""
        assert self.khoctl("abort").code == Exit.done
        assert not self.active
        assert not (self.directory / "frozen").exists()


class Scarce(Limited):
    """A khod that may have few open files."""

    nofile = 1024


@contextmanager
def started(directory: Path, kind: type[Limited], settings: str = "") -> Iterator[Limited]:
    """A khod with a producer that notes in a file that it is frozen."""
    hooks = directory / "root/etc/kho/producers.d"
    hooks.mkdir(parents=True)
    (hooks.parent / "khod.toml").write_text(settings)
    frozen = directory / "frozen"
    (hooks / "a.toml").write_text(f'freeze = ["touch", "{frozen}"]\nthaw = ["rm", "{frozen}"]\n')
    khod = kind(directory)
    try:
        yield khod
        assert khod.process.poll() in (None, Exit.done), khod.errors.read_text()
        assert "Traceback" not in khod.errors.read_text()
    finally:
        khod.close()


@pytest.fixture
def khod(tmp_path: Path) -> Iterator[Limited]:
    with started(tmp_path, Limited) as made:
        yield made


def send(client: socket.socket, method: str, fds: int = 0, more: bool = False) -> None:
    """Make a call with so many descriptors, where the kernel lets it have any, and leave its reply for later."""
    socket.send_fds(client, [attackers.call(f"io.kho.Handover.{method}", more=more)], [0] * fds)


def test_root_activates_and_aborts_among_a_hundred_attackers(khod: Limited) -> None:
    khod.there_and_back()
    before = khod.resident
    with ExitStack() as stack:
        path = str(khod.socket)
        crowd = [stack.enter_context(attackers.process(path, uid, CONNECTIONS)) for uid in USERS]
        for _round in range(ROUNDS):
            khod.there_and_back()
            assert khod.descriptors <= MAX_DESCRIPTORS
            assert khod.resident - before <= MAX_GROWTH_BYTES
            assert khod.threads <= MAX_THREADS
        assert all(attacker.poll() is None for attacker in crowd), "an attacker ended by itself"
    until(lambda: khod.descriptors <= OWN_DESCRIPTORS, khod.process)  # all they had is given back
    khod.there_and_back()


def test_descriptors_of_a_user_without_rights_do_not_stop_the_rollback(khod: Limited) -> None:
    """63 calls behind a first that never ends, each with as many descriptors as a message takes: 15939 of 8192."""
    assert khod.khoctl("activate").code == Exit.done
    before = khod.descriptors
    with khod.stopped():
        client = khod.connect_as(NOBODY)
        client.setblocking(False)
        with suppress(BlockingIOError):
            send(client, "Monitor", more=True)
            for _call in range(63):
                send(client, "Status", MAX_FDS)
    with client:
        client.settimeout(DEADLINE)
        assert reply(client)["error"] == "io.kho.Handover.Refused"
        assert khod.descriptors <= before + 2, "a connection, and no descriptor that came over it"
        khod.back()
        assert khod.khoctl("activate").code == Exit.done
        assert khod.end(signal.SIGTERM) == 0
        assert not khod.active
        assert not (khod.directory / "frozen").exists()


def test_whoever_may_not_send_descriptors_is_told_so_by_the_kernel(khod: Limited) -> None:
    with khod.connect_as(NOBODY) as client:
        assert call(client, "Status")["parameters"]
        with pytest.raises(PermissionError):  # SO_PASSRIGHTS, Linux 6.16
            send(client, "Status", MAX_FDS)
        assert call(client, "Status")["parameters"]


def test_whoever_sent_descriptors_before_that_is_told_so_by_khod(khod: Limited) -> None:
    with khod.stopped():
        client = khod.connect_as(NOBODY)
        send(client, "Status", MAX_FDS)
    with client:
        answer = reply(client)
        assert answer["error"] == "io.kho.Handover.Refused"
        assert str(NOBODY) in answer["parameters"]["what"]
        assert "root" in answer["parameters"]["remedy"]
        assert hung_up(client)


@pytest.mark.parametrize("client", ["stays", "gone"])
def test_a_descriptor_that_cannot_be_closed_holds_nobody_up(khod: Limited, client: str) -> None:
    """Whoever drops the last reference waits: here for a TCP peer that does not read, an hour long."""
    with khod.stopped():
        attack = subprocess.Popen(
            ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
            + [f"--{kind}-caps=-all,+dac_read_search" for kind in ("inh", "ambient")]
            + [sys.executable, "-c", LINGER, str(khod.socket), client],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert attack.stdout is not None
        assert attack.stdout.readline() == "sent\n"
    with attack:
        for _turn in range(3):
            khod.there_and_back()
        attack.kill()


def test_root_connects_when_users_without_rights_have_all_connections_they_get(tmp_path: Path) -> None:
    """Many users, as somebody in a container has: each has as many connections as khod lets it have."""
    with started(tmp_path, Scarce) as khod, ExitStack() as stack:
        assert khod.khoctl("activate").code == Exit.done
        answered = 0
        for uid in range(60_000, 60_100):
            for _connection in range(MAX_PER_USER // 4):
                client = stack.enter_context(khod.connect_as(uid))
                with suppress(ConnectionError):
                    answered += bool(call(client, "Status"))
        assert khod.descriptors <= Scarce.nofile // 4
        assert answered, "they are not sent away as long as there is room"
        khod.back()


def test_half_messages_of_users_without_rights_are_bounded(khod: Limited) -> None:
    before = khod.resident
    with ExitStack() as stack:
        for uid in USERS:
            for _connection in range(MAX_PER_USER):
                client = stack.enter_context(khod.connect_as(uid))
                with suppress(ConnectionError):  # it is hung up on long before the end
                    client.sendall(b"x" * (MAX_MESSAGE_BYTES - 1))
        khod.there_and_back()
        assert khod.resident - before < MAX_GROWTH_BYTES


def test_the_longest_message_of_a_user_without_rights(khod: Limited) -> None:
    status = attackers.call("io.kho.Handover.Status")
    padded = b" " * (MAX_OTHERS_MESSAGE_BYTES + 1 - len(status)) + status
    with khod.connect_as(NOBODY) as client:
        client.sendall(padded)
        assert reply(client)["parameters"]["status"]["phase"] == "idle"
        client.sendall(b" " + padded)
        assert reply(client)["error"] == "io.kho.Handover.UsageError"
        assert hung_up(client)


# Whoever has rights


@contextmanager
def held_at_prepare(khod: Limited) -> Iterator[socket.socket]:
    """A client whose Activate waits for a hook, until this ends."""
    fifo = khod.directory / "fifo"
    os.mkfifo(fifo)
    (khod.directory / "root/etc/kho/producers.d/slow.toml").write_text(
        f'prepare = ["sh", "-c", "echo waits > {fifo}; read line < {fifo}"]\n'
    )
    with khod.connect() as client:
        send(client, "Activate")
        assert fifo.read_text() == "waits\n"
        yield client
        fifo.write_text("go on\n")


def test_the_descriptors_of_one_call_at_a_time(khod: Limited) -> None:
    """Root's too: what is behind the call that is served stays in the kernel, and is served after it."""
    with held_at_prepare(khod) as client:
        before = khod.descriptors
        for _call in range(4):
            send(client, "Check", MAX_FDS)
        assert khod.ask("Status")["status"]["phase"] == "preparing"  # by now khod has seen that there is more
        assert khod.descriptors <= before + 1
        calls = client.dup()
    with calls:
        calls.settimeout(DEADLINE)
        assert reply(calls)["parameters"]["status"]["phase"] == "active"
        for _call in range(4):
            assert reply(calls)["parameters"]["checks"]
            assert khod.descriptors <= before + MAX_FDS + 1


def test_whoever_leaves_does_not_end_what_was_begun(khod: Limited) -> None:
    """An operator's Ctrl-C in the middle of activate: it goes on to its end, and nothing is left half-way."""
    with held_at_prepare(khod) as client:
        client.close()
        with khod.connect() as another:  # khod has seen it go: it is behind in the same queue
            assert call(another, "Status")["parameters"]["status"]["phase"] == "preparing"
    until(lambda: khod.ask("Status")["status"]["phase"] == "active", khod.process)
    khod.back()


def test_a_member_of_more_groups_than_fit_does_all_that_root_does() -> None:
    """SO_PEERGROUPS with the 1024 bytes that CPython allows is 256 groups. Its images come as descriptors."""
    name = grp.getgrgid(NOBODY).gr_name
    with (
        public_directory() as directory,
        started(directory, Limited, f'[access]\ngroup = "{name}"\n') as khod,
    ):
        (directory / "vmlinuz").write_bytes(bzimage())
        (directory / "initrd").write_bytes(CPIO)
        groups = ",".join(map(str, [*range(100, 500), NOBODY]))
        caps = [f"--{kind}-caps=-all,+dac_read_search" for kind in ("inh", "ambient")]
        become = ["setpriv", "--reuid=60001", "--regid=60001", f"--groups={groups}", *caps]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "NO_COLOR": "1"}
        images = [f"--image={directory / 'vmlinuz'}", f"--initrd={directory / 'initrd'}"]
        for words in (["activate"], ["kexec", "--load-only", *images]):
            command = [*become, sys.executable, "-m", "khoctl", f"--socket={khod.socket}", *words]
            ended = subprocess.run(
                command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
            )
            assert ended.returncode == Exit.done, ended.stderr
        assert khod.active
        assert khod.loaded
