# SPDX-License-Identifier: LGPL-2.1-or-later
"""A producer of each kind that goes wrong at one verb, as told, and shows what it still holds.

What each trouble is: a veto says why, and half of the verb may be done by then. The deadline is missed by doing the
verb and not saying so, with the rest of the producer well. A crash ends the connection or the command in the middle.
Garbage is an answer that the protocol does not have. Late: everything of the producer stands still before the verb is
done, and it comes to itself after the abort was answered. In an undo nothing is done before it goes wrong: what
was frozen stays so.
"""

import asyncio
import enum
import json
import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from jeepney import HeaderFields, Message

from khod.engine import Engine
from khod.model import Event, EventKind
from khod.producers.barrier import Verb
from khod.producers.hooks import Hook
from khod.producers.qemu import Qemu
from khod.producers.unit import Unit
from khod.server.server import Server
from khod.server.sockets import Sockets
from khod.vm.monitor import PAUSED_STATE
from tests.unit.fakebus import FakeBus, Refusal, unit
from tests.unit.harness import Host, Kernel, connect_apart
from tests.unit.luo import offer
from tests.unit.test_hooks import gone
from tests.unit.test_qemu import HANG_UP, SILENCE, Vm

NAME = "subject"
NOT_NOW = "not now; perhaps later"
KEPT = b"what it held before the jump"
UNDOES = (Verb.thaw, Verb.cancel)


class Trouble(enum.Enum):
    """What goes wrong."""

    veto = "veto"
    deadline = "deadline"
    crash = "crash"
    garbage = "garbage"
    late = "late"


class Actor(Protocol):
    """One producer. `held` is what it really is: prepared, frozen."""

    @property
    def held(self) -> set[str]:
        """What is still to be undone of it."""

    @property
    def asked(self) -> int:
        """How often it was asked anything."""

    async def join(self) -> None:
        """Take part, with the khod that now runs."""

    def arm(self, verb: Verb, trouble: Trouble) -> None:
        """Go wrong at this verb from now on."""

    async def stuck(self) -> None:
        """Return each time it has come to where it will not answer."""

    async def recover(self) -> None:
        """Go wrong no more; what was still to come of the trouble has come when this returns."""

    def rebooted(self) -> None:
        """The kernel is another: what was held was the old one's."""

    async def leave(self) -> None:
        """Take part no more, and leave nothing open."""


def follow(held: set[str], verb: Verb) -> None:
    """What a verb changes in what a producer holds."""
    added = {Verb.prepare: {"prepared"}, Verb.freeze: {"frozen"}}.get(verb, set())
    taken = {Verb.thaw: {"frozen"}, Verb.cancel: {"prepared", "frozen"}}.get(verb, set())
    held |= added
    held -= taken


class LuoKernel(Kernel):
    """The embedded kernel with sessions, so that peers have something to claim: no real one has v3 and LUO both."""

    def __init__(self, host: Host) -> None:
        super().__init__(host.directory / "kernel", host.store)
        offer(self)
        self._names: dict[str, int] = {}
        self._files: dict[int, dict[int, int]] = {}

    def create_session(self, name: str) -> int:
        fd = os.memfd_create(name)
        self._names[name] = os.dup(fd)
        self._files[os.fstat(fd).st_ino] = {}
        return fd

    def retrieve_session(self, name: str) -> int:
        return os.dup(self._names[name])

    def preserve_fd(self, session: int, fd: int, token: int) -> None:
        self._files[os.fstat(session).st_ino][token] = os.dup(fd)

    def retrieve_fd(self, session: int, token: int) -> int:
        return os.dup(self._files[os.fstat(session).st_ino][token])

    def finish_session(self, session: int) -> None:
        files = self._files[os.fstat(session).st_ino]
        while files:
            os.close(files.popitem()[1])

    def close(self) -> None:
        """Close what no khod has."""
        for fd in (*self._names.values(), *(fd for files in self._files.values() for fd in files.values())):
            os.close(fd)


@asynccontextmanager
async def serving(host: Host, subject: Actor) -> AsyncIterator[Engine]:
    """A khod of this host in this event loop, the subject with it; at its socket where the subject is a peer."""
    engine = host.engine()
    if not isinstance(subject, Peer):
        await engine.start()
        await subject.join()
        yield engine
        return
    sock = socket.socket(socket.AF_UNIX)
    (host.directory / "socket").unlink(missing_ok=True)
    sock.bind(str(host.directory / "socket"))
    listening = Sockets([sock], lambda sockets: Server(engine, sockets, lambda: engine.settings.current.access))
    try:
        await engine.start()
        await subject.join()
        yield engine
    finally:
        await listening.close(0)


async def readable(fd: int) -> None:
    """Wait until there is something to read."""
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)


def told(event: Event) -> bool:
    """Whether khod has just told the subject something."""
    return event.producer is not None and event.producer.name == NAME and event.kind is EventKind.producer_called


class Wire:
    """One Varlink connection by hand, of a process that ends with it."""

    def __init__(self, path: Path) -> None:
        self._process, self._socket = connect_apart(path)
        self._socket.setblocking(False)
        self._text = b""

    async def call(
        self, method: str, parameters: dict[str, Any], files: Sequence[int] = ()
    ) -> tuple[dict[str, Any], list[int]]:
        """Call a method of io.kho.Producer; ConnectionError when khod hangs up, as it does after an error."""
        message = {"method": f"io.kho.Producer.{method}", "parameters": parameters}
        socket.send_fds(self._socket, [json.dumps(message).encode() + b"\0"], files)
        got: list[int] = []
        while b"\0" not in self._text:
            await readable(self._socket.fileno())
            data, came, _, _ = socket.recv_fds(self._socket, 1 << 16, 16)
            if not data:
                raise ConnectionError
            self._text += data
            got += came
        raw, _, self._text = self._text.partition(b"\0")
        answer = json.loads(raw)
        while "error" in answer:
            await readable(self._socket.fileno())
            if not self._socket.recv(1 << 16):
                raise ConnectionError(answer)
        return answer["parameters"], got

    def close(self) -> None:
        self._process.end()
        self._socket.close()


BEYOND = {"": UNDOES, "cancel": UNDOES, "prepare": (Verb.thaw,), "thaw": (Verb.thaw,)}
"""What whoever did more than khod counts on (`told`) undoes by itself."""


class Peer:
    """A Varlink peer that keeps to io.kho.Producer but for the trouble."""

    def __init__(self, host: Host, timeout: float) -> None:
        self.held: set[str] = set()
        self.asked = 0
        self.claimed: list[bytes] = []
        """What it was given back, for good once it was told to finish."""
        self._host, self._timeout = host, timeout
        self._trouble: tuple[Verb, Trouble] | None = None
        self._standing_still = False
        self._stuck = asyncio.Event()
        self._well = asyncio.Event()
        self._changed = asyncio.Event()
        self._serving: asyncio.Task[None] | None = None

    async def join(self) -> None:
        await self.leave()
        wire = Wire(self._host.directory / "socket")
        terms = {"name": NAME, "version": 1, "timeout": self._timeout, "after": ["first"], "before": ["last"]}
        registered, _ = await wire.call("Register", terms)
        for undo in BEYOND.get(registered["told"], ()):
            follow(self.held, undo)
        self._serving = asyncio.ensure_future(self._serve(wire))

    async def leave(self) -> None:
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.wait({self._serving})

    async def _serve(self, wire: Wire) -> None:
        said: dict[str, Any] = {}
        files: list[int] = []
        try:
            while True:
                command, got = await wire.call("Next", said, files)
                self.asked += 1
                while files:
                    os.close(files.pop())
                said = await self._answer(Verb(command["verb"]), got)
                said |= {"serial": command["serial"]} if said else {}
                files += [table()] * ("fds" in said)
                self._changed.set()
        except ConnectionError:
            self._changed.set()
        finally:
            wire.close()

    async def _answer(self, verb: Verb, files: list[int]) -> dict[str, Any]:
        trouble = self._trouble[1] if self._trouble is not None and self._trouble[0] is verb else None
        if trouble in (Trouble.late, Trouble.deadline):
            self._stuck.set()
        if trouble is Trouble.late:
            await self._well.wait()
        if trouble in (None, Trouble.late) or verb not in UNDOES:
            self._do(verb, files)
        match trouble:
            case Trouble.veto:
                return {"answer": "veto", "reason": NOT_NOW}
            case Trouble.deadline:
                return {}  # it goes on listening
            case Trouble.crash:
                raise ConnectionError
            case Trouble.garbage:
                return {"answer": "perhaps"}
        kept = {"names": ["table"], "tokens": [7], "fds": [0]} if verb is Verb.prepare else {}
        return {"answer": "ready", **kept}

    def _do(self, verb: Verb, files: list[int]) -> None:
        follow(self.held, verb)
        if verb is Verb.restore:
            self.claimed = [os.pread(fd, 100, 0) for fd in files]
        for fd in files:
            os.close(fd)

    def arm(self, verb: Verb, trouble: Trouble) -> None:
        self._trouble = (verb, trouble)

    async def stuck(self) -> None:
        if self._standing_still:
            await self._host.seen(told)  # it does not hear it
            return
        await self._stuck.wait()
        self._stuck.clear()
        self._standing_still = self._trouble is not None and self._trouble[1] is Trouble.late

    async def recover(self) -> None:
        assert self._serving is not None, "it has joined"
        verb, trouble = self._trouble or (None, None)
        self._trouble = None
        self._well.set()
        next_kernel = verb in (Verb.restore, Verb.finish)
        if self._serving.done() or (next_kernel and trouble is not Trouble.late):
            await self.join()  # in the next kernel this is how a producer claims what it left
        elif trouble is Trouble.late and not next_kernel:
            undone = "frozen" if verb in (Verb.freeze, Verb.thaw) else "prepared"
            while undone in self.held:
                self._changed.clear()
                await self._changed.wait()

    def rebooted(self) -> None:
        self.held.clear()


def table() -> int:
    """A memfd that holds what is to arrive."""
    fd = os.memfd_create("table")
    os.pwrite(fd, KEPT, 0)
    return fd


SCRIPTS = {
    Verb.prepare: "touch prepared",
    Verb.freeze: "touch frozen",
    Verb.thaw: "rm -f frozen",
    Verb.cancel: "rm -f prepared",
}
ENDS = {
    Trouble.veto: f"echo '{NOT_NOW}' >&2; exit 1",
    Trouble.deadline: "echo > here; exec sleep 600",
    Trouble.crash: "kill -KILL $$",
    Trouble.garbage: "printf '\\377\\033[31m\\r' >&2; exit 99",
}


class Command:
    """A hook: shell commands, whose state is files."""

    def __init__(self, host: Host, timeout: float) -> None:
        self._at = host.directory / NAME
        self._at.mkdir()
        for fifo in ("here", "never"):
            os.mkfifo(self._at / fifo)
        self._here = os.open(self._at / "here", os.O_RDWR | os.O_NONBLOCK)
        commands = {verb.value: self._script(SCRIPTS.get(verb, "")) for verb in Verb}
        self._well = dict(commands)
        self._hook = Hook(NAME, timeout, ("first",), ("last",), commands=commands)
        host.hooks.append(self._hook)

    def _script(self, script: str) -> list[str]:
        return ["/bin/sh", "-c", f"cd {self._at}\necho asked >> asked\n{script}"]

    @property
    def held(self) -> set[str]:
        return {name for name in ("prepared", "frozen") if (self._at / name).exists()}

    @property
    def asked(self) -> int:
        return (self._at / "asked").read_text().count("\n")

    async def join(self) -> None:
        """It has a file."""

    def arm(self, verb: Verb, trouble: Trouble) -> None:
        does = SCRIPTS.get(verb, "")
        before = "" if verb in UNDOES else does
        late = f"(read word < never; {does}) & echo $$ $! > late; echo > here; wait"
        script = late if trouble is Trouble.late else f"{before}\n{ENDS[trouble]}"
        self._hook.commands[verb.value] = self._script(script)

    async def stuck(self) -> None:
        await readable(self._here)
        os.read(self._here, 1)

    async def recover(self) -> None:
        """Nothing of it may be left that could still do the verb."""
        self._hook.commands.update(self._well)
        late = self._at / "late"
        assert all(gone(int(pid)) for pid in (late.read_text().split() if late.exists() else ()))

    def rebooted(self) -> None:
        for name in self.held:
            (self._at / name).unlink()

    async def leave(self) -> None:
        os.close(self._here)


class Bus(FakeBus):
    """A systemd that goes wrong in one method: after the unit became `halfway`, where that is said.

    While `awake` is not set it stands still from the next call of `method` on: what was called is carried out
    later, in the order of the calls.
    """

    method = ""
    halfway: tuple[str, str] | None = None

    def __init__(self, units: dict[str, dict[str, tuple[str, Any]]]) -> None:
        super().__init__(units)
        self.awake = asyncio.Event()
        self.awake.set()
        self._asleep = False

    async def _answer(self, message: Message, writer: asyncio.StreamWriter) -> None:
        method = message.header.fields[HeaderFields.member]
        if method == self.method and self.halfway is not None:
            key, state = self.halfway
            self.units["a.service"][key] = ("s", state)
        self._asleep |= method == self.method and not self.awake.is_set()
        if self._asleep:
            self.reached.set()
            await self.awake.wait()
        await super()._answer(message, writer)


METHODS = {
    "freeze": {Verb.prepare: "GetUnitProcesses", Verb.freeze: "FreezeUnit", Verb.thaw: "ThawUnit"},
    "stop": {Verb.prepare: "GetUnitProcesses", Verb.freeze: "StopUnit", Verb.thaw: "StartUnit"},
}
HALFWAY = {"freeze": ("FreezerState", "freezing"), "stop": ("ActiveState", "deactivating")}


class Service:
    """A unit of systemd's, frozen or stopped."""

    def __init__(self, host: Host, timeout: float, how: str) -> None:
        self.bus = Bus({"a.service": unit()})
        self.path = host.directory / "bus"
        self._how = how
        self._server: asyncio.Server | None = None
        host.hooks.append(Unit(NAME, timeout, ("first",), ("last",), unit="a.service", how=how))

    @property
    def held(self) -> set[str]:
        now = (self.bus.state("a.service", "ActiveState"), self.bus.state("a.service", "FreezerState"))
        return set() if now == ("active", "running") else {"frozen"}

    @property
    def asked(self) -> int:
        return len(self.bus.said)

    async def join(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_unix_server(self.bus.serve, self.path)

    async def leave(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in self.bus.tasks:
            task.cancel()

    def arm(self, verb: Verb, trouble: Trouble) -> None:
        """Where nothing is asked at that verb, anything would go wrong: `LoadUnit` is the first call."""
        method = METHODS[self._how].get(verb, "LoadUnit")
        self.bus.method = method
        self.bus.halfway = HALFWAY[self._how] if verb is Verb.freeze and trouble is not Trouble.late else None
        if trouble is Trouble.late:
            self.bus.awake.clear()
            return
        instead: dict[Trouble, Refusal | bytes | asyncio.Event] = {
            Trouble.veto: Refusal("org.freedesktop.systemd1.UnitBusy", NOT_NOW),
            Trouble.deadline: asyncio.Event(),
            Trouble.crash: b"",
            Trouble.garbage: b"\xff" * 64,
        }
        self.bus.instead[method] = instead[trouble]

    async def stuck(self) -> None:
        await self.bus.reached.wait()
        self.bus.reached.clear()

    async def recover(self) -> None:
        self.bus.method, self.bus.halfway = "", None
        self.bus.instead.clear()
        if not self.bus.awake.is_set():
            waiting = list(self.bus.tasks)
            self.bus.awake.set()
            await asyncio.gather(*waiting)

    def rebooted(self) -> None:
        self.bus.units["a.service"] = unit()


class Monitor(Vm):
    """A QEMU whose answers to `wrong` commands are these, said after they were carried out where `does` is set."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.wrong: dict[str, bytes] = {}
        self.does = True

    def carry_out(self, name: str, number: str | None) -> bytes:
        self._changed.set()
        if (words := self.wrong.get(name)) is None:
            return super().carry_out(name, number)
        if self.does:
            super().carry_out(name, number)
        return words.replace(b"ID", (number or "").encode())


COMMANDS = {Verb.prepare: "query-status", Verb.freeze: "stop", Verb.thaw: "cont"}
WORDS = {
    Trouble.veto: b'{"error": {"class": "GenericError", "desc": "%s"}, "id": "ID"}\n' % NOT_NOW.encode(),
    Trouble.deadline: SILENCE,
    Trouble.crash: HANG_UP,
    Trouble.garbage: b"no JSON\n",
}


class Guest:
    """A VM behind a QMP socket."""

    def __init__(self, host: Host, timeout: float) -> None:
        self._command, self._accepted = "", 0
        self.vm = Monitor(host.directory / "qmp")
        self._running: tuple[asyncio.Server, asyncio.Task[None]] | None = None
        host.hooks.append(Qemu(NAME, timeout, ("first",), ("last",), socket=str(self.vm.path)))

    @property
    def held(self) -> set[str]:
        return {"frozen"} if self.vm.state == PAUSED_STATE else set()

    @property
    def asked(self) -> int:
        return self.vm.accepted

    async def join(self) -> None:
        if self._running is None:
            server = await asyncio.start_unix_server(self.vm.serve, self.vm.path)
            self._running = server, asyncio.ensure_future(self.vm.dispatch())

    async def leave(self) -> None:
        if self._running is not None:
            server, dispatcher = self._running
            server.close()
            dispatcher.cancel()
            await asyncio.wait({dispatcher})

    def arm(self, verb: Verb, trouble: Trouble) -> None:
        """Where nothing is asked at that verb, anything would go wrong: `qmp_capabilities` is the first command."""
        command = self._command = COMMANDS.get(verb, "qmp_capabilities")
        if trouble is Trouble.late:
            self.vm.gates[command] = asyncio.Event()
        else:
            self.vm.wrong[command], self.vm.does = WORDS[trouble], verb is not Verb.thaw

    async def stuck(self) -> None:
        """At its command, and where that is still being carried out at every connection after it."""
        if self._accepted == 0:
            await self.vm.until(lambda: self._command in self.vm.heard)
        else:
            await self.vm.until(lambda: bool(self.vm.gates) and self.vm.accepted > self._accepted)
        self._accepted = self.vm.accepted

    async def recover(self) -> None:
        self.vm.wrong.clear()
        stuck, self.vm.gates = self.vm.gates, {}
        for command, gate in stuck.items():
            gate.set()
            becomes = {"stop": PAUSED_STATE, "cont": "running"}.get(command, self.vm.state)
            await self.vm.until(partial(self._is, becomes))

    def _is(self, state: str) -> bool:
        return self.vm.state == state

    def rebooted(self) -> None:
        self.vm.state = "running"
