# SPDX-License-Identifier: LGPL-2.1-or-later
"""systemd, asked about one unit: org.freedesktop.systemd1 on the system bus.

What systemd promises here (org.freedesktop.systemd1(5), looked at on 262): FreezeUnit and ThawUnit answer once
the kernel has said it in cgroup.events; a job of StartUnit or StopUnit ends with the signal JobRemoved, for which
a client subscribes first; the calls of one connection are taken up in their order.
"""

import asyncio
import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from jeepney import HeaderFields, Message

from khod.systemd.dbus import BUS, Bus, BusError
from khod.text import one_line

SYSTEMD = "org.freedesktop.systemd1"
MANAGER = (SYSTEMD, "/org/freedesktop/systemd1", f"{SYSTEMD}.Manager")
PEER = (SYSTEMD, "/org/freedesktop/systemd1", "org.freedesktop.DBus.Peer")
JOBS = f"type='signal',sender='{SYSTEMD}',interface='{SYSTEMD}.Manager',member='JobRemoved'"
OWNER = f"type='signal',sender='{BUS[0]}',interface='{BUS[2]}',member='NameOwnerChanged',arg0='{SYSTEMD}'"
SETTLE_SECONDS = 1.0
"""Seconds given to systemd to take up what was called before a verb is cut short."""
STOPPED_TOO = ("RequiredBy", "RequisiteOf", "BoundBy", "ConsistsOf", "PropagatesStopTo")
"""Properties that name the units which a stop reaches: UNIT_ATOM_PROPAGATE_STOP in src/core/unit-dependency-atom.c."""


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
        raise BusError(f"systemd says ControlGroup of {self._unit} with another type than it is documented to")

    async def kill_processes(self) -> None:
        """Send SIGKILL to the unit's processes, which reaches frozen ones too."""
        await self._bus.call_method(MANAGER, "KillUnit", "ssi", self._unit, "all", signal.SIGKILL)

    async def run_job(self, method: str, mode: str) -> str:
        """Queue a job and wait for its end: done, failed, canceled, timeout, dependency, ...

        A systemd that starts anew (daemon-reexec) tells it under another name on the bus, if at all: Disconnected.
        """
        self._bus.watched_name = SYSTEMD
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
            with suppress(BusError, TimeoutError):
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
            raise BusError("systemd answered with another type than it is documented to")
        return answer.body[0]


def _parse_state(properties: dict[str, tuple[str, Any]]) -> UnitState:
    """Pick what matters here out of a unit's properties; BusError where one is missing or of another type."""

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
