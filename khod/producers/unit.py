# SPDX-License-Identifier: LGPL-2.1-or-later
"""Producers that are units of the service manager: frozen in their cgroup, or stopped, while the blackout lasts.

They are told through org.freedesktop.systemd1 on the system bus (`$DBUS_SYSTEM_BUS_ADDRESS`), with one connection
for each verb, read by the task that calls: no second task can die unseen while an answer is waited for.

What systemd promises here (org.freedesktop.systemd1(5), looked at on 262): FreezeUnit and ThawUnit answer once
the kernel has said it in cgroup.events; a job of StartUnit or StopUnit ends with the signal JobRemoved, for which
a client subscribes first; the calls of one connection are taken up in their order.

What else was seen there. systemd stops no frozen unit: on the way into the kexec it goes past it, and
systemd-shutdown's SIGTERM kills what is frozen, but what catches SIGTERM is waited for as long as
DefaultTimeoutStopSec= says, inside the blackout. A unit that dies while it is frozen counts as frozen until a
reboot, or until nothing refers to it.

What is stopped is started again by its name alone: what systemd stops with it is not, so an active unit that
requires it is a veto. A socket, timer or path that triggers it may start it in the blackout.
"""

import asyncio
import os
import re
import signal
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from jeepney import DBusAddress, HeaderFields, Message, MessageType, Parser, new_method_call
from jeepney.auth import BEGIN, AuthenticationError, Authenticator
from jeepney.bus import get_bus

from khod.errors import UsageError
from khod.producers.barrier import GONE, NOT_RECORDED, ParticipantVeto, ProducerCall, Verb
from khod.producers.configured import Configured, one_line
from khod.producers.sockets import connect_unix

FREEZE_METHODS = ("freeze", "stop")
NAME = re.compile(r"[A-Za-z0-9:_.\\@-]+\.(service|scope|slice|socket|mount|swap|target|timer|path|automount|device)")
MAX_UNIT_NAME_BYTES = 255
"""Bytes in the name of a unit (systemd's UNIT_NAME_MAX is 256 and counts the NUL)."""
VITAL = (
    "-.slice",
    "system.slice",
    "init.scope",
    "-.mount",
    "kho-handover*",
    "kho-verify*",
    "dbus*",
    "systemd-journald*",
    "systemd-logind*",
    "systemd-udevd*",
    "systemd-userdbd*",
)
"""khod, what it needs to undo anything, and what every login and device of the host waits for."""

ADDRESS = "unix:path=/run/dbus/system_bus_socket"
BUS = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus")
SYSTEMD = "org.freedesktop.systemd1"
MANAGER = (SYSTEMD, "/org/freedesktop/systemd1", f"{SYSTEMD}.Manager")
PEER = (SYSTEMD, "/org/freedesktop/systemd1", "org.freedesktop.DBus.Peer")
JOBS = f"type='signal',sender='{SYSTEMD}',interface='{SYSTEMD}.Manager',member='JobRemoved'"
OWNER = f"type='signal',sender='{BUS[0]}',interface='{BUS[2]}',member='NameOwnerChanged',arg0='{SYSTEMD}'"
NOBODY = tuple(
    f"org.freedesktop.DBus.Error.{name}"
    for name in ("NoReply", "NameHasNoOwner", "ServiceUnknown", "Disconnected", "TimedOut", "Spawn.ChildExited")
)
"""What a message bus answers in the place of a service that is not there, or went away before it answered."""
RETRY_SECONDS = 0.5
"""When a thaw connects again."""
CGROUPS = Path("/sys/fs/cgroup")
CHUNK_BYTES = 1 << 16
MAX_MESSAGE_BYTES = 128 << 20
"""Bytes of a message, as the D-Bus specification bounds it."""
SETTLE_SECONDS = 1.0
"""Seconds given to systemd to take up what was called before a verb is cut short."""
HANG_UP_SECONDS = 0.5
"""How long the end of a connection is waited for; it needs nothing of the other side."""
GARBLED = (ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError, struct.error, RecursionError)
"""What jeepney raises on bytes that are no D-Bus message."""

OURS = "running"
"""How the note of a unit begins that is ours to freeze or stop, and so to thaw or start; with any other it is left
alone. What follows is the unit as it was prepared. A khod before this one wrote nothing more: then the file counts."""
UNTOUCHED = "left alone"
"""The note from a freeze that ended before systemd was told anything."""
INACTIVE = ("inactive", "failed")
SLICE = ".slice"
STOPPED_TOO = ("RequiredBy", "RequisiteOf", "BoundBy", "ConsistsOf", "PropagatesStopTo")
"""Properties that name the units which a stop reaches: UNIT_ATOM_PROPAGATE_STOP in src/core/unit-dependency-atom.c."""


@dataclass(frozen=True)
class Unit(Configured):
    """A unit, `how` = "freeze" for its cgroup's freezer, "stop" for a stop and a start."""

    unit: str = ""
    how: str = "freeze"
    group: str = ""
    """The path of its control group below CGROUPS at `prepare`; "" where there was none, or no note says so."""
    kind: str = "unit"

    @classmethod
    def by_note(cls, name: str, note: str) -> "Unit | None":
        """Make the producer that left this note; None where it does not name the unit."""
        return None if note in (OURS, NOT_RECORDED) else cls(name)

    async def _carry_out(self, telling: ProducerCall) -> str | None:
        """Freeze or stop the unit at `freeze` and undo that at `thaw`; the next kernel starts units by itself."""
        ours = None if telling.verb is Verb.prepare else self._as_prepared(telling.note)
        it = ours or self
        verbs: dict[Verb, Step] = {Verb.prepare: it._check_unit, Verb.freeze: it._freeze_unit, Verb.thaw: it._thaw_unit}
        step = verbs.get(telling.verb)
        if step is None or (telling.verb is Verb.thaw and ours is None):
            return None
        loop = asyncio.get_running_loop()
        give_up = loop.time() + self.timeout
        while True:
            try:
                async with system_bus() as bus:
                    return await step(Systemd(bus, it.unit), telling)
            except Disconnected as error:
                # Either may start anew in the middle of it; an undo may be told as often as need be.
                if telling.verb is not Verb.thaw or loop.time() + RETRY_SECONDS > give_up:
                    raise
                telling.not_yet(f"{error}; khod connects again", None)
            await asyncio.sleep(RETRY_SECONDS)

    async def _make_way(self, note: str) -> None:
        """Kill what is frozen.

        A process that catches SIGTERM does not get it while it is frozen, and systemd-shutdown waits for it as
        long as DefaultTimeoutStopSec= says (90 s), in the middle of the blackout.
        """
        ours = self._as_prepared(note)
        if ours is not None and ours.how == "freeze":
            async with system_bus() as bus:
                await Systemd(bus, ours.unit).kill_processes()

    @property
    def _record_note(self) -> str:
        """What is noted of a unit that is ours: its file may name another by the time it is thawed."""
        return f"{OURS} {self.how} {self.unit} {self.group}"

    def _as_prepared(self, note: str) -> "Unit | None":
        """Give the unit of a note; None where it is not ours and is left alone, Veto where that cannot be told.

        Where nothing is recorded it may be ours: whether it is frozen is systemd's to say.
        """
        if note in (OURS, NOT_RECORDED):
            return self
        if not note.startswith(f"{OURS} "):
            return None
        try:
            _, how, unit, group = note.split(" ", 3)
        except ValueError:
            raise ParticipantVeto(f"what was done to it is not known: its note is {one_line(note)!r}") from None
        return replace(self, unit=unit, how=how, group=group)

    async def _check_unit(self, systemd: "Systemd", telling: ProducerCall) -> None:
        state = await systemd.read_state()
        telling.note = found = state.require_state(self.unit)
        if found != OURS:
            return
        for name in state.names:  # an alias may hide what it is
            try:
                check_unit(name)
            except UsageError as error:
                raise ParticipantVeto(error.what) from None
        if self.how == "stop" and state.transient:
            raise ParticipantVeto(f"{self.unit} is transient: once it is stopped there is nothing to start")
        if self.how == "stop" and not (state.can_stop and state.can_start):
            raise ParticipantVeto(f"{self.unit} cannot be stopped and started again by hand")
        if self.how == "freeze" and not state.can_freeze:
            raise ParticipantVeto(f"{self.unit} cannot be frozen: systemd has no freezer for it")
        if await systemd.holds_us():
            raise ParticipantVeto(f"{self.unit} holds khod or the system bus, without which it is never thawed")
        telling.note = replace(self, group=await systemd.control_group())._record_note

    async def _freeze_unit(self, systemd: "Systemd", telling: ProducerCall) -> None:
        prepared, telling.note = telling.note, UNTOUCHED
        state = await systemd.read_state()
        found = state.require_state(self.unit)
        before = prepared if self._as_prepared(prepared) is None else OURS
        if found != before:
            raise ParticipantVeto(f"{self.unit} was {before or 'not asked'} at prepare and is {found} now")
        if found == OURS and self.how == "stop":
            await self._refuse_company(systemd, state)
        telling.note = prepared
        if found != OURS:
            return
        if self.how == "stop":
            await self._stop_unit(systemd, telling)
            return
        await systemd.call_action("FreezeUnit", "s", self.unit)
        state = await systemd.read_state()
        if state.freezer != "frozen":
            raise ParticipantVeto(f"{self.unit} is {state.freezer} after FreezeUnit")

    async def _refuse_company(self, systemd: "Systemd", state: "UnitState") -> None:
        for name in state.required_by:
            if (await systemd.read_state(name)).active not in INACTIVE:
                raise ParticipantVeto(f"{name} depends on {self.unit}: it would stop too, and not be started again")

    async def _stop_unit(self, systemd: "Systemd", telling: ProducerCall) -> None:
        telling.not_yet("systemd stops it", None)
        # "fail": a job that somebody else queued meanwhile is theirs, and is not replaced.
        result = await systemd.run_job("StopUnit", "fail")
        state = await systemd.read_state()
        if result != "done" or state.active not in INACTIVE:
            raise ParticipantVeto(f"the stop of {self.unit} ended as {result}, and it is {state.active}")

    async def _thaw_unit(self, systemd: "Systemd", telling: ProducerCall) -> str | None:
        state = await systemd.read_state()
        unrecorded = telling.note == NOT_RECORDED
        if self.how == "stop" and not unrecorded:
            await self._start_unit(systemd, state, telling)
            return None
        if not state.is_thawed or self._may_hold_frozen(state):
            await self._unfreeze_unit(systemd, state, telling)
        if self.how == "stop" and state.active != "active":
            telling.not_yet(f"{self.unit} is {state.active} and stays so: no record says whether khod stopped it", None)
            return GONE
        return None

    async def _unfreeze_unit(self, systemd: "Systemd", state: "UnitState", telling: ProducerCall) -> None:
        if state.active in INACTIVE:
            raise ParticipantVeto(f"{self.unit} died while it was frozen, and systemd does not let it start again")
        try:
            await systemd.call_action("ThawUnit", "s", self.unit)
        except ErrorAnswer:
            group = await systemd.control_group() if telling.note == NOT_RECORDED else self.group
            if not _thaw_group(group):
                raise
        else:
            if not (state := await systemd.read_state()).is_thawed:
                raise ParticipantVeto(f"{self.unit} is {state.freezer} after ThawUnit")

    def _may_hold_frozen(self, state: "UnitState") -> bool:
        """Whether units in it may be frozen although it is not itself.

        systemd freezes the units of a slice one after the other, and the slice last; at the first error it returns
        (slice_freezer_action() in src/core/slice.c), and the slice's FreezerState has not changed.
        """
        return self.unit.endswith(SLICE) and state.freezer == "running" and state.active not in INACTIVE

    async def _start_unit(self, systemd: "Systemd", state: "UnitState", telling: ProducerCall) -> None:
        if state.active == "active" and not state.job:
            return
        telling.not_yet("systemd starts it", None)
        # "replace": our own stop may still be under way.
        result = await systemd.run_job("StartUnit", "replace")
        state = await systemd.read_state()
        if state.active != "active":
            raise ParticipantVeto(f"the start of {self.unit} ended as {result}, and it is {state.active}")


Step = Callable[["Systemd", ProducerCall], Awaitable[str | None]]


def _thaw_group(path: str) -> bool:
    """Have the kernel thaw the control group at this path below CGROUPS; whether it was there and has taken that.

    systemd refuses it for a unit whose file is gone or masked since, and the kernel knows of no files. systemd goes on
    to call the unit frozen, until it can be told `systemctl thaw`. In a slice each unit was frozen by itself.
    """
    with suppress(OSError):
        group = (CGROUPS / path.lstrip("/")).resolve(strict=True)
        if CGROUPS in group.parents:
            _unfreeze_group(group)
            for member in _member_groups(group) if path.endswith(SLICE) else ():
                with suppress(FileNotFoundError):  # it has ended meanwhile
                    _unfreeze_group(member)
            return True
    return False


def _unfreeze_group(group: Path) -> None:
    with open(os.open(group / "cgroup.freeze", os.O_WRONLY | os.O_NOFOLLOW), "wb", buffering=0) as file:
        file.write(b"0")


def _member_groups(group: Path) -> Iterator[Path]:
    """Find the control groups of the units in a slice, and in slices below it; not those that a unit made itself."""
    with os.scandir(group) as entries:
        names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False) and NAME.fullmatch(entry.name)]
    for name in names:
        yield group / name
        if name.endswith(SLICE):
            with suppress(FileNotFoundError):
                yield from _member_groups(group / name)


def check_unit(unit: str) -> None:
    """Raise UsageError for what is no name of a unit, and for units without which the host or khod stands still."""
    if (
        not NAME.fullmatch(unit)
        or len(unit) > MAX_UNIT_NAME_BYTES
        or unit.startswith("@")
        or unit.rpartition(".")[0].endswith("@")
    ):
        raise UsageError(
            f"{unit[:80]!r} is not a valid name of a unit",
            where="unit",
            remedy="Name it with its suffix and, for a template, its instance: foo.service, foo@bar.service.",
        )
    if any(fnmatchcase(unit, pattern) for pattern in VITAL):
        raise UsageError(
            f"{unit} cannot be a producer: the host or khod itself stands still without it",
            where="unit",
            remedy="Name the units whose state is to be held, or a slice of their own.",
        )


@dataclass(frozen=True)
class UnitState:
    """What systemd says of a unit, each field a property of org.freedesktop.systemd1.Unit."""

    load: str
    active: str
    freezer: str
    can_freeze: bool
    can_start: bool
    can_stop: bool
    transient: bool
    job: int
    names: list[str]
    required_by: list[str]
    """Units that a stop of this one stops too, by STOPPED_TOO."""

    @property
    def is_thawed(self) -> bool:
        """Whether nothing of ours freezes it; a slice above it may."""
        return self.freezer in ("running", "frozen-by-parent")

    def require_state(self, unit: str) -> str:
        """OURS for a unit that runs, a word for one to be left as it is; Veto for what is neither."""
        if self.load in ("not-found", "bad-setting", "error"):
            raise ParticipantVeto(f"{unit} cannot be loaded: systemd says {self.load}")
        if self.active in INACTIVE:
            return "inactive"
        if self.freezer.startswith("frozen"):
            return "frozen"
        if (self.active, self.freezer) == ("active", "running"):
            return OURS
        raise ParticipantVeto(
            f"{unit} is {self.active if self.freezer == 'running' else self.freezer}, neither active nor at rest"
        )


class ErrorAnswer(ParticipantVeto):
    """What was called says no."""


class Disconnected(ParticipantVeto):
    """The bus, or systemd, is not there or went away before it answered; what was called may be done or not."""


class Bus:
    """A connection to the message bus; every failure of it is a Veto."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._parser = Parser()
        self._serial = 0
        self.ended_jobs: dict[tuple[str, str], str] = {}
        """Results that JobRemoved has told, by its sender and the job's path."""

    async def authenticate(self) -> None:
        """Authenticate as this process's user and take a name on the bus."""
        authenticator = Authenticator()
        try:
            for line in authenticator:
                await self._write_bytes(line)
                authenticator.feed(await self._read_bytes())
        except AuthenticationError as error:
            raise ParticipantVeto(f"the system bus does not let khod in: {one_line(str(error))}") from None
        await self._write_bytes(BEGIN)
        await self.call_method(BUS, "Hello")

    async def call_method(self, whom: tuple[str, str, str], method: str, signature: str = "", *body: object) -> Message:
        """Call a method and wait for its answer; Veto where that is an error."""
        name, path, interface = whom
        self._serial += 1
        message = new_method_call(DBusAddress(path, name, interface), method, signature or None, body)
        await self._write_bytes(message.serialise(self._serial))
        while True:
            answer = await self.receive_message()
            if answer.header.fields.get(HeaderFields.reply_serial) == self._serial:
                break
        if answer.header.message_type is MessageType.error:
            error = answer.header.fields.get(HeaderFields.error_name)
            text = answer.body[0] if answer.body and isinstance(answer.body[0], str) else ""
            kind = Disconnected if error in NOBODY else ErrorAnswer
            raise kind(f"{method}: {one_line(text or 'no reason given')} ({one_line(str(error))})")
        return answer

    async def receive_message(self) -> Message:
        """Wait for the next message."""
        try:
            while (message := self._parser.get_next_message()) is None:
                if self._parser.bytes_desired() > MAX_MESSAGE_BYTES:
                    raise ValueError
                self._parser.add_data(await self._read_bytes())
        except GARBLED:
            raise ParticipantVeto("the system bus sent what is not a D-Bus message") from None
        if message.header.message_type is MessageType.signal:
            fields = message.header.fields
            match (fields.get(HeaderFields.member), fields.get(HeaderFields.sender), *message.body):
                case ("JobRemoved", str(sender), _, str(job), _, str(result)):
                    self.ended_jobs[sender, job] = result
                case ("NameOwnerChanged", name, who, _, _) if (name, who) == (BUS[0], SYSTEMD):
                    raise Disconnected("systemd went from the system bus, or has come back to it")
        return message

    async def _read_bytes(self) -> bytes:
        try:
            data = await self._reader.read(CHUNK_BYTES)
        except OSError as error:
            raise Disconnected(f"the system bus has gone: {error.strerror}") from None
        if not data:
            raise Disconnected("the system bus hung up")
        return data

    async def _write_bytes(self, data: bytes) -> None:
        self._writer.write(data)
        try:
            await self._writer.drain()
        except OSError as error:
            raise Disconnected(f"the system bus has gone: {error.strerror}") from None


@asynccontextmanager
async def system_bus() -> AsyncIterator[Bus]:
    """Connect to the system bus, and hang up whatever happens; Veto where it is not there."""
    address = os.environ.get("DBUS_SYSTEM_BUS_ADDRESS") or ADDRESS
    try:
        reader, writer = await asyncio.open_unix_connection(sock=await connect_unix(get_bus(address)))
    except OSError as error:
        raise Disconnected(f"the system bus cannot be reached at {address}: {error.strerror or error}") from None
    except (ValueError, RuntimeError):
        raise ParticipantVeto(f"DBUS_SYSTEM_BUS_ADDRESS is {address!r}, which names no unix socket") from None
    try:
        bus = Bus(reader, writer)
        await bus.authenticate()
        yield bus
    finally:
        # Not close(): that waits for a peer that may never read what is still to be written.
        writer.transport.abort()
        with suppress(OSError):  # TimeoutError is one
            async with asyncio.timeout(HANG_UP_SECONDS):
                await writer.wait_closed()


class Systemd:
    """The service manager, asked about one unit."""

    def __init__(self, bus: Bus, unit: str) -> None:
        self._bus, self._unit = bus, unit

    async def read_state(self, unit: str = "") -> UnitState:
        """Read the state of this unit, or of another; systemd loads it for that where it has to."""
        answer = await self._bus.call_method(
            await self._property_address(unit or self._unit), "GetAll", "s", f"{SYSTEMD}.Unit"
        )
        return _parse_state(self._only_value("a{sv}", answer))

    async def holds_us(self) -> bool:
        """Whether khod itself or the message bus is among the unit's processes, those of units below it included."""
        answer = await self._bus.call_method(BUS, "GetConnectionUnixProcessID", "s", BUS[0])
        vital = {os.getpid(), self._only_value("u", answer)}
        answer = await self._bus.call_method(MANAGER, "GetUnitProcesses", "s", self._unit)
        return not vital.isdisjoint(pid for _, pid, _ in self._only_value("a(sus)", answer))

    async def control_group(self) -> str:
        """The path of the unit's control group below CGROUPS, "" where it has none."""
        kind = self._unit.rpartition(".")[2].capitalize()
        properties = await self._property_address(self._unit)
        answer = await self._bus.call_method(properties, "Get", "ss", f"{SYSTEMD}.{kind}", "ControlGroup")
        match self._only_value("v", answer):
            case ("s", str(path)):
                return path
        raise ParticipantVeto(f"systemd says ControlGroup of {self._unit} with another type than it is documented to")

    async def kill_processes(self) -> None:
        """Send SIGKILL to the unit's processes, which reaches frozen ones too."""
        await self._bus.call_method(MANAGER, "KillUnit", "ssi", self._unit, "all", signal.SIGKILL)

    async def run_job(self, method: str, mode: str) -> str:
        """Queue a job and wait for its end: done, failed, canceled, timeout, dependency, ...

        A systemd that starts anew (daemon-reexec) tells it under another name on the bus, if at all: Disconnected.
        """
        for signals in (JOBS, OWNER):
            await self._bus.call_method(BUS, "AddMatch", "s", signals)
        await self._bus.call_method(MANAGER, "Subscribe")
        answer = await self.call_action(method, "ss", self._unit, mode)
        key = (answer.header.fields.get(HeaderFields.sender), self._only_value("o", answer))
        while key not in self._bus.ended_jobs:
            await self._bus.receive_message()
        return self._bus.ended_jobs[key]

    async def call_action(self, method: str, signature: str, *body: str) -> Message:
        """Call what changes something; cut short, it waits until systemd has taken it up.

        Otherwise the undo, on another connection, could overtake it on the bus.
        """
        try:
            return await self._bus.call_method(MANAGER, method, signature, *body)
        except asyncio.CancelledError:
            with suppress(ParticipantVeto, TimeoutError):
                async with asyncio.timeout(SETTLE_SECONDS):
                    await self._bus.call_method(PEER, "Ping")
            raise

    async def _property_address(self, unit: str) -> tuple[str, str, str]:
        """Whom to ask for the properties of a unit."""
        path = self._only_value("o", await self._bus.call_method(MANAGER, "LoadUnit", "s", unit))
        return SYSTEMD, path, "org.freedesktop.DBus.Properties"

    def _only_value(self, signature: str, answer: Message) -> Any:
        """Give the only value of an answer, whose type must be this one."""
        if answer.header.fields.get(HeaderFields.signature) != signature:
            raise ParticipantVeto("systemd answered with another type than it is documented to")
        return answer.body[0]


def _parse_state(properties: dict[str, tuple[str, Any]]) -> UnitState:
    """Pick what matters here out of a unit's properties; Veto where one is missing or of another type."""

    def value(name: str, signature: str) -> Any:
        if name not in properties:
            raise ParticipantVeto(f"this systemd does not say {name} of a unit")
        found, content = properties[name]
        if found != signature:
            raise ParticipantVeto(f"systemd says {name} of a unit with type {one_line(found)}, not {signature}")
        return content

    return UnitState(
        load=value("LoadState", "s"),
        active=value("ActiveState", "s"),
        freezer=value("FreezerState", "s"),
        can_freeze=value("CanFreeze", "b"),
        can_start=value("CanStart", "b"),
        can_stop=value("CanStop", "b"),
        transient=value("Transient", "b"),
        job=value("Job", "(uo)")[0],
        names=value("Names", "as"),
        required_by=[name for key in STOPPED_TOO for name in value(key, "as")],
    )
