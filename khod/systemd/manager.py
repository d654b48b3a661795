# SPDX-License-Identifier: LGPL-2.1-or-later
"""Questions and calls to systemd, about itself and its units: org.freedesktop.systemd1 at its private socket.

What systemd promises (org.freedesktop.systemd1(5), checked with 262): FreezeUnit and ThawUnit return once the kernel
has reported the state in cgroup.events; a job of StartUnit or StopUnit ends with the signal JobRemoved; the calls of
one connection are handled in order.
"""

import asyncio
import os
import re
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

from jeepney import HeaderFields, Message

from khod.dataclass import dataclass
from khod.systemd.dbus import Bus, BusError, ErrorAnswer, systemd_bus
from khod.text import ASCII_SPACE, one_line

T = TypeVar("T")
SYSTEMD = "org.freedesktop.systemd1"
MANAGER = (SYSTEMD, "/org/freedesktop/systemd1", f"{SYSTEMD}.Manager")
PROPERTIES = "org.freedesktop.DBus.Properties"
PEER = (SYSTEMD, "/org/freedesktop/systemd1", "org.freedesktop.DBus.Peer")
MESSAGE_BUS = "dbus.service"
"""The unit of the message bus; with dbus-broker this name is an alias."""
SETTLE_SECONDS = 1.0
"""Seconds systemd has to handle a call that was sent, before a cancelled verb ends."""
ENDED_STATES = ("inactive", "failed")
"""ActiveState of a unit of which nothing runs."""
STOPPED_TOO = ("RequiredBy", "RequisiteOf", "BoundBy", "ConsistsOf", "PropagatesStopTo")
"""Properties with the names of units that stop together with a unit: UNIT_ATOM_PROPAGATE_STOP in
src/core/unit-dependency-atom.c."""


ASK_SECONDS = 15.0
"""Seconds systemd has to answer a question for which no producer is frozen; more than 5 were seen just after a boot."""
CONTAINERS = frozenset(
    {"systemd-nspawn", "lxc-libvirt", "lxc", "openvz", "docker", "podman", "rkt", "wsl", "proot", "pouch"}
    | {"container-other"}
)
"""Values of the manager's property Virtualization that are not virtual machines (systemd-detect-virt(1))."""


@dataclass(frozen=True)
class Manager:
    """The systemd that runs this host: its version, and the kind of virtual machine it is in ("" for none)."""

    version: int
    machine: str

    @classmethod
    def from_properties(cls, version: str, virtualization: str) -> "Manager | None":
        """Parse the manager's properties Version and Virtualization; None if there is no version number."""
        found = re.match(r"v?([0-9]{1,9})", version)
        if found is None:
            return None
        kind = virtualization.strip(ASCII_SPACE)
        return cls(int(found[1]), "" if kind == "none" or kind in CONTAINERS else kind)


@dataclass(frozen=True)
class UnitState:
    """The state of a unit; each field is from a property of org.freedesktop.systemd1.Unit."""

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
    """Units that stop together with this one, by STOPPED_TOO."""

    @property
    def is_thawed(self) -> bool:
        """Whether the unit itself is not frozen; a slice above it may be."""
        return self.freezer in ("running", "frozen-by-parent")


class Systemd:
    """Calls to the service manager, about itself or about `unit`. Methods raise BusError."""

    def __init__(self, bus: Bus, unit: str = "") -> None:
        self._bus, self._unit = bus, unit

    async def describe_manager(self) -> Manager | None:
        """Return systemd's version and its virtual machine; None if it reports no version."""
        version, machine = [await self._manager_property(name) for name in ("Version", "Virtualization")]
        return Manager.from_properties(version, machine)

    async def system_state(self) -> str:
        """Return the state of the host as `systemctl is-system-running` prints it: running, degraded, stopping, ..."""
        return await self._manager_property("SystemState")

    async def read_manager(self) -> dict[str, Any]:
        """Return all properties of the manager itself, by name."""
        answer = await self._bus.call_method((SYSTEMD, MANAGER[1], PROPERTIES), "GetAll", "s", MANAGER[2])
        return {name: value for name, (_, value) in only_value("a{sv}", answer).items()}

    async def list_units(self, pattern: str) -> dict[str, str]:
        """Return the loaded units whose names match the pattern (shell wildcards), with their objects' paths."""
        answer = await self._bus.call_method(MANAGER, "ListUnitsByPatterns", "asas", [], [pattern])
        return {name: path for name, _, _, _, _, _, path, *_ in only_value("a(ssssssouso)", answer)}

    async def count_stored_files(self, path: str) -> int:
        """Return how many files the file descriptor store of the service with this object path contains."""
        count: int = await self._read_property(path, f"{SYSTEMD}.Service", "NFileDescriptorStore", "u")
        return count

    async def read_properties(self, unit: str, interface: str) -> dict[str, Any]:
        """Return all properties that a unit has in one of its interfaces (Unit, Service, ...), by name."""
        answer = await self._read_all(unit, interface)
        return {name: value for name, (_, value) in answer.items()}

    async def list_stored_files(self, unit: str) -> list[str]:
        """Return the paths of the files in a unit's file descriptor store."""
        answer = await self._bus.call_method(MANAGER, "DumpUnitFileDescriptorStore", "s", unit)
        return [path for *_, path, _flags in only_value("a(suuutuusu)", answer)]

    async def read_state(self, unit: str = "") -> UnitState:
        """Return the state of this unit, or of another one; systemd loads the unit if needed."""
        return _parse_state(await self._read_all(unit or self._unit, "Unit"))

    async def holds_us(self) -> bool:
        """Whether khod or the message bus is among the unit's processes, including those of units below it."""
        vital = {os.getpid()}
        with suppress(ErrorAnswer):  # there may be no message bus
            vital |= await self.list_processes(MESSAGE_BUS)
        return not vital.isdisjoint(await self.list_processes())

    async def control_group(self) -> str:
        """Return the path of the unit's control group below /sys/fs/cgroup, "" if it has none."""
        kind = self._unit.rpartition(".")[2].capitalize()
        path: str = await self._read_property(
            await self._load_unit(self._unit), f"{SYSTEMD}.{kind}", "ControlGroup", "s"
        )
        return path

    async def list_processes(self, unit: str = "") -> set[int]:
        """Return the process ids in the control group of this unit, or of another one, and in those of units below."""
        answer = await self._bus.call_method(MANAGER, "GetUnitProcesses", "s", unit or self._unit)
        return {pid for _, pid, _ in only_value("a(sus)", answer)}

    async def kill_processes(self) -> None:
        """Send SIGKILL to all processes of the unit; it reaches frozen ones too."""
        await self._bus.call_method(MANAGER, "KillUnit", "ssi", self._unit, "all", signal.SIGKILL)

    async def run_job(self, method: str, mode: str) -> str:
        """Queue a job, wait for its end and return its result: done, failed, canceled, timeout, dependency, ...

        Disconnected if systemd re-executes itself (daemon-reexec), because that closes the connection.
        """
        return await self._bus.wait_job(only_value("o", await self.call_action(method, "ss", self._unit, mode)))

    async def call_action(self, method: str, signature: str, *body: str) -> Message:
        """Call a method that changes something; if cancelled, first wait until systemd has handled it.

        Otherwise the undo, which uses another connection, could overtake it. The wait ends after SETTLE_SECONDS.
        """
        try:
            return await self._bus.call_method(MANAGER, method, signature, *body)
        except asyncio.CancelledError:
            with suppress(BusError, TimeoutError):
                async with asyncio.timeout(SETTLE_SECONDS):
                    await self._bus.call_method(PEER, "Ping")
            raise

    async def _manager_property(self, name: str) -> str:
        value: str = await self._read_property(MANAGER[1], MANAGER[2], name, "s")
        return value

    async def _read_property(self, path: str, interface: str, name: str, signature: str) -> Any:
        """Return one property of an object; BusError if its type is not `signature`."""
        answer = await self._bus.call_method((SYSTEMD, path, PROPERTIES), "Get", "ss", interface, name)
        found, value = only_value("v", answer)
        if found != signature:
            raise BusError(f"systemd says {name} with another type than it is documented to")
        return value

    async def _read_all(self, unit: str, interface: str) -> dict[str, tuple[str, Any]]:
        """Return all properties of a unit in one of its interfaces, with their types."""
        address = (SYSTEMD, await self._load_unit(unit), PROPERTIES)
        answer = await self._bus.call_method(address, "GetAll", "s", f"{SYSTEMD}.{interface}")
        found: dict[str, tuple[str, Any]] = only_value("a{sv}", answer)
        return found

    async def _load_unit(self, unit: str) -> str:
        """Have systemd load a unit, and return its object's path."""
        path: str = only_value("o", await self._bus.call_method(MANAGER, "LoadUnit", "s", unit))
        return path


def only_value(signature: str, answer: Message) -> Any:
    """Return the only value of an answer; BusError if its type is not `signature`."""
    if answer.header.fields.get(HeaderFields.signature) != signature:
        raise BusError("systemd answered with another type than it is documented to")
    return answer.body[0]


async def ask_systemd(question: Callable[[Systemd], Awaitable[T]], seconds: float) -> T | None:
    """Return systemd's answer to a question; None if it does not answer within `seconds`."""
    try:
        async with asyncio.timeout(seconds), systemd_bus() as bus:
            return await question(Systemd(bus))
    except (BusError, TimeoutError):
        return None


def _parse_state(properties: dict[str, tuple[str, Any]]) -> UnitState:
    """Return the state from a unit's properties; BusError if one is missing or has another type."""

    def value(name: str, signature: str) -> Any:
        if name not in properties:
            raise BusError(f"this systemd does not say {name} of a unit")
        found, content = properties[name]
        if found != signature:
            raise BusError(f"systemd says {name} of a unit with type {one_line(found)}, not {signature}")
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
