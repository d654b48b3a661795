# SPDX-License-Identifier: LGPL-2.1-or-later
"""A system bus and systemd's private socket in one, in the test's own event loop, on a socket of its own.

It answers as systemd 262 does for the units it is given; tests/lab/test_unit.py asks the real one.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from jeepney import DBusAddress, HeaderFields, Message, Parser, new_error, new_method_return, new_signal

from khod.systemd.manager import STOPPED_TOO

SYSTEMD = "org.freedesktop.systemd1"
MANAGER = DBusAddress("/org/freedesktop/systemd1", SYSTEMD, f"{SYSTEMD}.Manager")
USUAL = {"Type": ("s", "simple"), "MainPID": ("u", 0), "Result": ("s", "success")}
USUAL |= {"StopWhenUnneeded": ("b", False)}
"""Properties of every unit, or of every service."""
Reply = tuple[str | None, tuple[Any, ...]]


class Refusal(Exception):
    """An error answer: its name and its text."""


def unit(**properties: Any) -> dict[str, tuple[str, Any]]:
    """An active unit, as GetAll describes it, but for these properties."""
    usual: dict[str, Any] = {"LoadState": "loaded", "ActiveState": "active", "FreezerState": "running"}
    usual |= {"Job": (0, "/"), "CanFreeze": True, "CanStart": True, "CanStop": True, "Transient": False}
    usual |= {key: [] for key in ("Names", *STOPPED_TOO)}
    types: dict[type, str] = {str: "s", bool: "b", tuple: "(uo)", list: "as", int: "i"}
    return {key: (types[type(value)], value) for key, value in (usual | properties).items()}


@dataclass
class FakeBus:
    """The bus. `said` is every method called, with its first argument; `open` counts connections."""

    units: dict[str, dict[str, tuple[str, Any]]]
    instead: dict[str, Reply | Refusal | bytes | asyncio.Event] = field(default_factory=dict)
    """For a method: a reply, an error, bytes (b"" hangs up), or an event after which the usual answer comes."""
    becomes: dict[str, str] = field(default_factory=dict)
    """For a method: the FreezerState or ActiveState it leads to, if not the one it is meant to."""
    jobs: dict[str, str] = field(default_factory=dict)
    """Jobs under way that nobody here waits for: a unit and the kind each."""
    after_start: dict[str, str] = field(default_factory=dict)
    """Units and the ActiveState that their start jobs bring, if it is not `active`."""
    refusals: dict[str, str] = field(default_factory=dict)
    """Units that are not there, and the error that their start is answered with, if it is not NoSuchUnit."""
    end_with: dict[str, str] = field(default_factory=dict)
    """Units and the ActiveState that they come to with the first stop job."""
    result: str | None = "done"
    """How jobs end; None: they do not."""
    processes: list[int] = field(default_factory=list)
    manager: dict[str, str] = field(default_factory=dict)
    """Properties of systemd itself."""
    stamps: dict[str, int] = field(default_factory=dict)
    """The same, of those that are numbers: systemd's time stamps, in microseconds."""
    stored: dict[str, list[str]] = field(default_factory=dict)
    """Paths of the files in each unit's store."""
    inhibitors: list[tuple[Any, ...]] = field(default_factory=list)
    """What systemd-logind lists."""
    welcome: bytes = b"OK 0123456789abcdef0123456789abcdef\r\nAGREE_UNIX_FD\r\n"
    said: list[str] = field(default_factory=list)
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    """Set by a call that is answered otherwise than usual, or whose job does not end."""
    open: int = 0
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    def reexec(self) -> None:
        """Start systemd anew: its private socket hangs up."""
        for writer in self.writers:
            writer.transport.abort()

    def state(self, name: str, key: str) -> Any:
        return self.units[name][key][1]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        self.writers.append(writer)
        self.closed.clear()
        with suppress(ConnectionError, asyncio.CancelledError):  # khod may hang up, or the test end, at any time
            await self._converse(reader, writer)
        self.open -= 1
        self.closed.set()
        writer.transport.abort()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.read(4096)
        assert asked.startswith(b"\0AUTH EXTERNAL ")
        assert asked.endswith(b"\r\nBEGIN\r\n"), "PID 1 may take a call that comes after it for a part of it"
        writer.write(self.welcome)
        parser = Parser()
        if self.welcome.startswith(b"OK"):
            while data := await reader.read(4096):
                for message in parser.feed(data):
                    # A task for each: systemd goes on while the answer to a freeze is outstanding.
                    task = asyncio.ensure_future(self._answer(message, writer))
                    self.tasks.add(task)
                    task.add_done_callback(self.tasks.discard)

    async def _answer(self, message: Message, writer: asyncio.StreamWriter) -> None:
        method = message.header.fields[HeaderFields.member]
        self.said.append(" ".join([method, *(word for word in message.body if isinstance(word, str))]))
        instead = self.instead.get(method)
        if instead is not None:
            self.reached.set()
        if isinstance(instead, bytes):
            writer.write(instead)
            if not instead:
                writer.transport.abort()
            return
        if isinstance(instead, asyncio.Event):
            await instead.wait()
        try:
            if isinstance(instead, Refusal):
                raise instead
            reply = instead if isinstance(instead, tuple) else self._usual(method, message, writer)
            answer = new_method_return(message, *reply)
        except Refusal as refusal:
            answer = new_error(message, refusal.args[0], "s", (refusal.args[1],))
        send(writer, answer)

    def _usual(self, method: str, message: Message, writer: asyncio.StreamWriter) -> Reply:
        name = message.body[0] if message.body else ""
        match method:
            case "Hello" | "Ping" | "ResetFailedUnit":
                return None, ()
            case "GetUnitProcesses" if name == "dbus.service":
                return "a(sus)", ([("/", 400, "dbus-daemon")],)
            case "GetUnitProcesses":
                return "a(sus)", ([("/", pid, "?") for pid in self.processes],)
            case "ListUnitsByPatterns" | "ListJobs" | "DumpUnitFileDescriptorStore":
                return self._list(method, message.body)
            case "Get" if message.body[1] in ("NFileDescriptorStore", *USUAL, *self.manager):
                return self._get(message)
            case "LoadUnit":
                return "o", (f"/unit/{name.encode().hex()}",)
            case "GetAll":
                return "a{sv}", (self._describe(message),)
            case "Get" if message.body in [(f"{SYSTEMD}.{kind}", "ControlGroup") for kind in ("Service", "Slice")]:
                path = bytes.fromhex(message.header.fields[HeaderFields.path].removeprefix("/unit/")).decode()
                return "v", (("s", f"/{path}" if path.endswith(".slice") else f"/system.slice/{path}"),)
            case "ListInhibitors":
                return "a(ssssuu)", (self.inhibitors,)
            case "FreezeUnit" | "ThawUnit":
                states = name in self.units and [self.state(name, key) for key in ("LoadState", "ActiveState")]
                if states != ["loaded", "active"]:
                    raise Refusal(f"{SYSTEMD}.UnitInactive", "Unit is not active")
                self._become(name, "FreezerState", method, "frozen" if method == "FreezeUnit" else "running")
                return None, ()
            case "StopUnit" | "StartUnit":
                return "o", (self._job(method, name, writer),)
        raise Refusal("org.freedesktop.DBus.Error.UnknownMethod", method)

    def _describe(self, message: Message) -> dict[str, tuple[str, Any]]:
        if message.body[0] == MANAGER.interface:
            return {name: ("t", value) for name, value in self.stamps.items()}
        path = message.header.fields[HeaderFields.path].removeprefix("/unit/")
        gone = unit(LoadState="not-found", ActiveState="inactive")
        return self.units.get(bytes.fromhex(path).decode(), gone)

    def _get(self, message: Message) -> Reply:
        if message.body[0] == MANAGER.interface:
            return "v", (("s", self.manager[message.body[1]]),)
        name = bytes.fromhex(message.header.fields[HeaderFields.path].removeprefix("/unit/")).decode()
        found = USUAL | self.units.get(name, {}) | {"NFileDescriptorStore": ("u", len(self.stored.get(name, ())))}
        return "v", (found[message.body[1]],)

    def _list(self, method: str, body: tuple[Any, ...]) -> Reply:
        if method == "ListJobs":
            return "a(usssoo)", ([(7, name, kind, "running", "/job/7", "/") for name, kind in self.jobs.items()],)
        if method == "DumpUnitFileDescriptorStore":
            return "a(suuutuusu)", ([("name", 0, 0, 0, 7, 0, 0, path, 0) for path in self.stored[body[0]]],)
        found = [name for name in self.units if any(fnmatch(name, pattern) for pattern in body[1])]
        states = {name: self.state(name, "ActiveState") for name in found}
        paths = {name: f"/unit/{name.encode().hex()}" for name in found}
        return "a(ssssssouso)", (
            [(name, "", "loaded", states[name], "", "", path, 0, "", "/") for name, path in paths.items()],
        )

    def _become(self, name: str, key: str, method: str, usual: str) -> None:
        self.units[name][key] = ("s", self.becomes.get(method, usual))

    def _job(self, method: str, name: str, writer: asyncio.StreamWriter) -> str:
        if name not in self.units:
            raise Refusal(f"{SYSTEMD}.{self.refusals.get(name, 'NoSuchUnit')}", f"Unit {name} cannot be started.")
        job = f"/job/{method}"
        if self.result is None:
            self.units[name] = unit(ActiveState="deactivating", Job=(7, job))
            self.reached.set()
            return job
        for other, state in self.end_with.items() if method == "StopUnit" else ():
            self.units[other]["ActiveState"] = ("s", state)
        usual = "inactive" if method == "StopUnit" else self.after_start.get(name, "active")
        self._become(name, "ActiveState", method, usual)
        self.units[name]["Job"] = ("(uo)", (0, "/"))
        send(writer, new_signal(MANAGER, "JobRemoved", "uoss", (7, job, name, self.result)))
        return job


def send(writer: asyncio.StreamWriter, message: Message, sender: str = ":1.0") -> None:
    """Send in systemd's name or another, unless khod has hung up."""
    message.header.fields[HeaderFields.sender] = sender
    if not writer.is_closing():
        writer.write(message.serialise(serial=1))


@asynccontextmanager
async def fake_bus(path: Path, **units: dict[str, tuple[str, Any]]) -> AsyncIterator[FakeBus]:
    """Serve these units at this path: `a` is a.service."""
    bus = FakeBus({f"{name}.service": properties for name, properties in units.items()})
    server = await asyncio.start_unix_server(bus.serve, path)
    try:
        yield bus
    finally:
        server.close()
        for task in bus.tasks:
            task.cancel()
