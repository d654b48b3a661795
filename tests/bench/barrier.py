# SPDX-License-Identifier: LGPL-2.1-or-later
"""The barrier with 1,000 Varlink producers in one rank, on the simulated kernel: time, memory, khod's own cost.

The producers are bare sockets in one process of their own, so that what is measured is khod. In turn with khod a
server of the same library gets the same calls and answers each at once: that is what the wire alone costs.
"""

import asyncio
import json
import resource
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from asyncvarlink import FileDescriptor, VarlinkInterfaceRegistry, create_unix_server, varlinkmethod

from khod.client.handover import Client
from khod.server import producer_interface
from khod.wire import PRODUCER, PRODUCER_VERSION
from tests.bench.figure import Figure
from tests.bench.processes import khod

COUNT = 1000
ROUNDS = 5
VERBS = ("prepare", "freeze", "thaw")
LAST = "cancel"
MOST_SECONDS, MOST_KIB, MOST_RATIO = 2.0, 40.0, 2.0
DESCRIPTORS = 4096
"""Each process may have so many: a connection is one, and khod keeps 256 for its own work."""
DEADLINE = 60.0  # seconds in which some producer is told something
CPUCLOCK_SCHED = 2  # include/linux/posix-timers.h: with a process id, the processor time that process has had


@dataclass(frozen=True)
class Moment:
    """A moment: CLOCK_MONOTONIC, and the processor time the server has had (seconds)."""

    clock: float
    cpu: float

    @classmethod
    def now(cls, pid: int) -> "Moment":
        """This moment of the server `pid`."""
        return cls(time.monotonic(), time.clock_gettime(~pid << 3 | CPUCLOCK_SCHED))


@dataclass(frozen=True)
class Measured:
    """What a server took for everyone's turns. `cpu` is its processor time, `kib` its growth for each producer."""

    seconds: float
    cpu: float
    kib: float = 0.0


def run() -> Iterator[Figure]:
    """Measure a fresh khod and a bare server in turn, ROUNDS times."""
    with _descriptors():
        rounds = [(_khod(), _bare()) for _ in range(ROUNDS)]
    seconds, kib = [ours.seconds for ours, _ in rounds], [ours.kib for ours, _ in rounds]
    ratios = [ours.cpu / theirs.cpu for ours, theirs in rounds]
    ours, theirs = (statistics.median(each.cpu for each in column) for column in zip(*rounds, strict=True))
    verb = 1e6 / COUNT / len(VERBS)
    yield Figure(
        f"prepare, freeze and thaw of {COUNT} producers",
        min(seconds),  # what else runs only adds to it
        MOST_SECONDS,
        "s",
        f"the best of {_shown(seconds)}; from Activate asked to the last freeze, from Abort asked to the last thaw",
    )
    yield Figure("khod's memory for each of them", max(kib), MOST_KIB, "KiB", f"the most it had, {_shown(kib)}")
    yield Figure(
        "the barrier / a Varlink server that answers at once",
        statistics.median(ratios),
        MOST_RATIO,
        "",
        f"{ours * verb:.0f} us and {theirs * verb:.0f} us of the processor for a producer and a verb, in turn",
    )


def _shown(values: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


@contextmanager
def _descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, DESCRIPTORS), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _khod() -> Measured:
    with khod() as (pid, path):
        before = _kib(pid, "VmRSS")
        with _python("crowd", path, pid, LAST) as crowd, Client(Path(path)) as client:
            _say(crowd)
            client.status()  # by now khod has heard everyone say that it waits
            asked = {}
            for method in ("Activate", "Abort"):
                asked[method] = Moment.now(pid)
                client.call_method(method)
                client.receive_status()
            answered = _answered(crowd)
        most = _kib(pid, "VmHWM")
    spans = ((asked["Activate"], answered["freeze"]), (asked["Abort"], answered["thaw"]))
    seconds, cpu = (
        sum(getattr(last, what) - getattr(first, what) for first, last in spans) for what in ("clock", "cpu")
    )
    return Measured(seconds, cpu, (most - before) / COUNT)


def _bare() -> Measured:
    with tempfile.TemporaryDirectory() as name:
        path = f"{name}/socket"
        with _python("serve", path) as server, _python("crowd", path, server.pid, VERBS[-1]) as crowd:
            began = Moment.now(server.pid)
            _say(crowd)
            ended = _answered(crowd)[VERBS[-1]]
    return Measured(ended.clock - began.clock, ended.cpu - began.cpu)


def _kib(pid: int, name: str) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().partition(f"{name}:")[2].split()[0])


# What the processes say to each other


@contextmanager
def _python(*words: object) -> Iterator["subprocess.Popen[str]"]:
    """Run a part of this file as a process; it has said that it is ready."""
    argv = [sys.executable, "-m", __name__, *map(str, words)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            _heard(process)
            yield process
        finally:
            process.kill()


def _heard(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, f"{process.args!r} ended"
    return line


def _say(process: "subprocess.Popen[str]") -> None:
    """Let the crowd begin; returns when it has."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    _heard(process)


def _answered(crowd: "subprocess.Popen[str]") -> dict[str, Moment]:
    return {verb: Moment(**moment) for verb, moment in json.loads(_heard(crowd)).items()}


# The crowd


@dataclass
class Crowd:
    """COUNT producers that say ready to whatever they are told; `answered` is when the last one did."""

    pid: int
    counts: Counter[str] = field(default_factory=Counter)
    answered: dict[str, Moment] = field(default_factory=dict)

    def told(self, peer: socket.socket) -> None:
        """Answer one command, which has come."""
        command = json.loads(peer.recv(4096)[:-1])["parameters"]
        _call(peer, "Next", {"serial": command["serial"], "answer": "ready"})
        verb = command["verb"]
        self.counts[verb] += 1
        if self.counts[verb] == COUNT:
            self.answered[verb] = Moment.now(self.pid)


def crowd(path: str, pid: str, last: str) -> None:
    """Register everyone, wait for a line, take part until the verb `last` is answered by all, and print when."""
    here, selector = Crowd(int(pid)), selectors.DefaultSelector()
    peers = [_registered(path, number) for number in range(COUNT)]
    print("registered", flush=True)
    sys.stdin.readline()
    for peer in peers:
        selector.register(peer, selectors.EVENT_READ)
        _call(peer, "Next", {})
    print("begun", flush=True)
    while last not in here.answered:
        ready = selector.select(DEADLINE)
        assert ready, f"nobody was told anything for {DEADLINE:g} s"
        for key, _ in ready:
            assert isinstance(key.fileobj, socket.socket)
            here.told(key.fileobj)
    print(json.dumps({verb: vars(moment) for verb, moment in here.answered.items()}), flush=True)
    sys.stdin.readline()  # the connections stay until the one who asked is done


def _registered(path: str, number: int) -> socket.socket:
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    peer.settimeout(DEADLINE)
    peer.connect(path)
    _call(peer, "Register", {"name": f"producer-{number}", "version": PRODUCER_VERSION})
    reply = peer.recv(4096)
    assert reply.endswith(b"\0"), reply
    assert b'"error"' not in reply, reply
    return peer


def _call(peer: socket.socket, method: str, parameters: dict[str, object]) -> None:
    peer.sendall(json.dumps({"method": f"{PRODUCER}.{method}", "parameters": parameters}).encode() + b"\0")


# The bare server


class Bare(producer_interface.Producer):
    """Tells every producer each verb once, without waiting for anyone; then never again."""

    @varlinkmethod
    async def Register(  # noqa: N802
        self,
        *,
        name: str,  # noqa: ARG002
        version: int,
        timeout: float | None = None,  # noqa: ARG002, ASYNC109
        after: list[str] | None = None,  # noqa: ARG002
        before: list[str] | None = None,  # noqa: ARG002
        devices: list[str] | None = None,  # noqa: ARG002
        kind: producer_interface.ShownKind | None = None,  # noqa: ARG002
    ) -> producer_interface.Registered:
        return {"version": version, "run": "", "told": ""}

    @varlinkmethod
    async def Next(  # noqa: N802
        self,
        *,
        serial: int | None = None,
        answer: producer_interface.Word | None = None,  # noqa: ARG002
        reason: str | None = None,  # noqa: ARG002
        progress: float | None = None,  # noqa: ARG002
        names: list[str] | None = None,  # noqa: ARG002
        tokens: list[int] | None = None,  # noqa: ARG002
        fds: list[FileDescriptor] | None = None,  # noqa: ARG002
        stopped: float | None = None,  # noqa: ARG002
    ) -> producer_interface.Command:
        number = serial or 0
        if number == len(VERBS):
            await asyncio.get_running_loop().create_future()
        return {
            "serial": number + 1,
            "verb": VERBS[number],
            "run": "",
            "timeout": 30.0,
            "names": [],
            "tokens": [],
            "fds": [],
        }


async def serve(path: str) -> None:
    """Serve until killed."""
    registry = VarlinkInterfaceRegistry()
    registry.register_interface(Bare())
    server = await create_unix_server(registry.protocol_factory, path)
    print("serving", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        asyncio.run(serve(sys.argv[2]))
    else:
        crowd(*sys.argv[2:])
