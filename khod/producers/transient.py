# SPDX-License-Identifier: LGPL-2.1-or-later
"""Commands of producers as transient units of systemd, each with a control group of its own and none of khod's limits.

What systemd promises here (org.freedesktop.systemd1(5), looked at on 262): StartTransientUnit of a service of
Type=exec ends its job once the command was executed; the exit status comes with PropertiesChanged, before the unit
is let go of; a unit that stops is sent KillSignal=, all of its control group, and SIGKILL after TimeoutStopSec=. All
of it goes over PID 1's private socket: without a message bus hooks thaw all the same.

A unit is named after its producer. So what outlived a khod that was killed is found, and ended before the next verb.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack, closing, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from khod.deferred import defer_module
from khod.producers.cgroup import units_in
from khod.producers.children import describe_undead, open_children
from khod.producers.commands import HOOK_UNIT_PREFIX, KILL_WAIT_SECONDS, Command
from khod.producers.waiting import Gate, WaitingUnit, can_wait, waiting_argv
from khod.systemd.startup import HOOKS_UNIT

if TYPE_CHECKING:
    from khod.systemd import dbus, manager
    from khod.systemd.dbus import Bus
    from khod.systemd.setting_values import Property
else:
    dbus = defer_module("khod.systemd.dbus")
    manager = defer_module("khod.systemd.manager")

MAX_UNITS = 9
"""Units that one producer may have: what does not die keeps the name of its unit."""
MAX_WAITING = 100
"""Units whose commands may wait at the same time: each takes five of khod's descriptors."""
UNIT_EXISTS = "org.freedesktop.systemd1.UnitExists"
CLD_EXITED = 1  # siginfo_t's si_code, as ExecMainCode has it
STOP_STAGE_SECONDS = 0.25
"""TimeoutStopSec=: systemd goes through up to four stages of a stop with what does not die."""
RECONNECT_SECONDS = 0.2
AFTER_JUMP = ("restore", "finish", "verify")
"""Commands that wait until the host has its services. Those of an undo must not: a shutdown waits for them."""


class TransientUnits:
    """Runs commands as units; see `khod.producers.commands.CommandRunner`."""

    has_units = True

    def __init__(self) -> None:
        self._gates: WeakSet[Gate] = WeakSet()

    @cached_property
    def _shared(self) -> dbus.SharedBus:
        return dbus.SharedBus()

    async def start_command(self, command: Command, stdout: int, stderr: int) -> TransientUnit:
        """Start a command once nothing of an earlier one runs under its name, or under the next free name."""
        for number in range(MAX_UNITS):
            unit = TransientUnit(unit_name(command.name, number, command.unit_prefix), self._shared)
            try:
                if await unit.start(command, stdout, stderr):
                    return unit
            except dbus.BusError as error:
                raise ValueError(str(error)) from None
        first = unit_name(command.name, prefix=command.unit_prefix)
        raise ValueError(f"{MAX_UNITS} units of earlier commands do not end, {first} the first")

    async def prepare_command(self, command: Command, stdout: int, stderr: int) -> WaitingUnit | None:
        """Start the unit of a command, which waits there; it has the name that the next command of its producer has.

        So what is left of it is found by that. None with MAX_WAITING others.
        """
        if sum(not gate.is_closed for gate in self._gates) >= MAX_WAITING or not can_wait(command):
            return None
        name = unit_name(command.name, prefix=command.unit_prefix)
        unit = TransientUnit(name, self._shared)
        with suppress(OSError, ValueError, dbus.BusError), ExitStack() as stack:
            gate = stack.enter_context(closing(Gate()))
            self._gates.add(gate)
            pid = await unit.start_waiting(command, stdout, stderr, gate)
            if pid is not None:
                waiting = WaitingUnit(name, pid, gate, unit)
                stack.pop_all()
                return waiting
        return None


class TransientUnit:
    """One unit, which uses a connection to systemd for as long as it runs."""

    def __init__(self, name: str, shared: dbus.SharedBus) -> None:
        self._name, self._shared = name, shared
        self._path = _object_path(name)
        self._stack = AsyncExitStack()
        self._bus: Bus | None = None
        self._told: dict[str, Any] = {}
        """What systemd has said of it on this connection."""

    async def start(self, command: Command, stdout: int, stderr: int) -> bool:
        """Start it; False where another unit has the name and does not end. BusError, ValueError."""
        return await self._start(_properties(command, stdout, stderr))

    async def start_waiting(self, command: Command, stdout: int, stderr: int, gate: Gate) -> int | None:
        """Start it so that its command waits at the gate; the PID of its main process, None where that is not known.

        It uses no connection then. BusError, ValueError.
        """
        if not await self._start(_properties(command, stdout, stderr, gate)):
            return None
        try:
            gate.close_theirs()
            pid = self._told.get("MainPID")
            return pid if pid and await gate.wait_ready() else None
        finally:
            await self._close()

    async def _start(self, settings: Iterable[tuple[str, Property]]) -> bool:
        properties, started = list(settings), False
        try:
            bus = await self._connect()
            started = await self._start_unit(bus, properties)
            if not started and await self._end_former(bus):
                started = await self._start_unit(bus, properties)
        finally:
            if not started:
                await self._close()
        return started

    async def wait_end(self) -> int | None:
        """Wait for the end of the unit: its command's exit code, -N where signal N killed it, None if not known."""
        while True:
            try:
                bus = self._bus or await self._connect(look=True)
                while self._told.get("ActiveState") not in manager.ENDED_STATES:
                    await bus.wait_news(self._path)
            except dbus.Disconnected:  # it starts anew: daemon-reexec
                await self._close()
                await asyncio.sleep(RECONNECT_SECONDS)
                continue
            code, status = self._told.get("ExecMainCode", 0), int(self._told.get("ExecMainStatus", 0))
            if code == 0:
                return None
            return status if code == CLD_EXITED else -status

    async def end(self) -> list[str]:
        """Kill all of it, and say what is still there KILL_WAIT_SECONDS later."""
        left: set[int] = set()
        try:
            try:
                # All of it: to kill the unit later would be to kill that of the next command, which has its name.
                async with asyncio.timeout(KILL_WAIT_SECONDS):
                    await self._kill()
            except (TimeoutError, dbus.ErrorAnswer):
                pass
            if self._told.get("ActiveState") == "inactive":
                return []  # its control group is empty: asking for its processes would only lengthen a freeze
            if self._bus is None:
                return [f"{self._name} may still run: systemd does not answer"]
            with suppress(dbus.ErrorAnswer):  # the unit is gone, with all it had
                left = await manager.Systemd(self._bus, self._name).list_processes()
        except dbus.BusError as error:
            return [f"{self._name} may still run: {error}"]
        finally:
            await self._close()
        return [text for pid in sorted(left) if (text := describe_undead(pid))]

    async def _kill(self) -> None:
        """Kill all of it, and wait until systemd has seen the end."""
        bus = self._bus or await self._connect()
        moved: Mapping[str, Any] | None = None
        if self._told.get("ActiveState") not in manager.ENDED_STATES:
            await self._look(bus)
            moved = await self._kill_moved(bus)
            with suppress(dbus.ErrorAnswer):
                await manager.Systemd(bus, self._name).kill_processes()
        while self._told.get("ActiveState") not in manager.ENDED_STATES:
            await bus.wait_news(self._path)
        while moved is not None and moved.get("ActiveState") not in manager.ENDED_STATES:
            await bus.wait_news(_object_path(self._scope))

    @property
    def _scope(self) -> str:
        return f"{self._name.removesuffix('.service')}:moved.scope"

    async def _kill_moved(self, bus: Bus) -> Mapping[str, Any] | None:
        """Have systemd kill the children of the main process that have moved to another control group.

        A command that waited is one: systemd kills the main process wherever it is, and that is the shell. They are put
        into a scope whose time is over at once, so that systemd kills them, whoever's they are, also where nobody waits
        for it; khod itself may not. Returns what systemd says of the scope, None if there is none.
        """
        with ExitStack() as stack:
            main = self._told.get("MainPID", 0)
            moved = _open_moved_children(main, self._name, stack) if main else []
            if not moved:
                return None
            settings: list[tuple[str, Property]] = [
                ("PIDFDs", ("ah", moved)),
                ("DefaultDependencies", ("b", False)),
                ("CollectMode", ("s", "inactive-or-failed")),
                ("KillSignal", ("i", int(signal.SIGKILL))),
                ("RuntimeMaxUSec", ("t", 1)),
            ]
            said = self._stack.enter_context(bus.watch_object(_object_path(self._scope)))
            call: tuple[Any, ...] = (
                manager.MANAGER,
                "StartTransientUnit",
                "ssa(sv)a(sa(sv))",
                self._scope,
                "fail",
                settings,
            )
            with suppress(dbus.ErrorAnswer):  # as before 255, which knows no PIDFDs
                await bus.call_method(*call, [])
                return said
        return None

    async def _start_unit(self, bus: Bus, properties: list[tuple[str, Property]]) -> bool:
        """Have systemd start it, and wait until that is done; False where the name is taken."""
        call: tuple[Any, ...] = (
            manager.MANAGER,
            "StartTransientUnit",
            "ssa(sv)a(sa(sv))",
            self._name,
            "fail",
            properties,
            [],
        )
        try:
            (job,) = (await bus.call_method(*call)).body
            result = await bus.wait_job(job)
        except dbus.ErrorAnswer as error:
            if error.name == UNIT_EXISTS:
                return False
            raise
        except asyncio.CancelledError:
            await self._call_off(bus)
            raise
        # What fails has an exit code too, as 203 of what cannot be executed; see systemd.exec(5).
        if result not in ("done", "failed"):
            raise ValueError(f"its unit {self._name} could not be started: {result}")
        return True

    async def _end_former(self, bus: Bus) -> bool:
        """End the unit that has the name; whether it did. ValueError where it is none of khod's."""
        systemd = manager.Systemd(bus, self._name)
        state = await systemd.read_state()
        if state.load == "not-found":  # it has ended meanwhile
            return True
        if not state.transient:
            raise ValueError(f"the name {self._name} is taken by a unit that is not khod's")
        with suppress(dbus.ErrorAnswer):
            await systemd.kill_processes()
        try:
            async with asyncio.timeout(KILL_WAIT_SECONDS):
                with suppress(dbus.ErrorAnswer):
                    await systemd.run_job("StopUnit", "replace")
                    await bus.call_method(manager.MANAGER, "ResetFailedUnit", "s", self._name)
        except TimeoutError:
            return False
        return True

    async def _call_off(self, bus: Bus) -> None:
        """Have systemd stop what it may only now begin to start: it takes up a connection's calls in their order."""
        with suppress(dbus.BusError, TimeoutError):
            async with asyncio.timeout(manager.SETTLE_SECONDS):
                await bus.call_method(manager.MANAGER, "StopUnit", "ss", self._name, "replace")

    async def _connect(self, *, look: bool = False) -> Bus:
        """Connect to systemd; with `look` what the unit says of itself now is read."""
        self._bus = bus = await self._stack.enter_async_context(self._shared.use())
        self._told = self._stack.enter_context(bus.watch_object(self._path))
        if look:
            await self._look(bus)
        return bus

    async def _look(self, bus: Bus) -> None:
        """Read what the unit says of itself now, unless systemd has said what state it is in."""
        if "ActiveState" in self._told:
            return
        systemd = manager.Systemd(bus, self._name)
        now = await systemd.read_properties(self._name, "Unit")
        if now.get("LoadState") == "loaded":
            now |= await systemd.read_properties(self._name, "Service")
        for name, value in now.items():
            self._told.setdefault(name, value)

    async def _close(self) -> None:
        self._bus = None
        await self._stack.aclose()


def unit_name(producer: str, number: int = 0, prefix: str = HOOK_UNIT_PREFIX) -> str:
    """Return the name of the unit for a producer's commands; a further one has a colon, which no producer's name has.

    The only character of a producer's name that has a meaning in a unit's is @, which is escaped as systemd does it.
    """
    return f"{prefix}{producer.replace('@', chr(92) + 'x40')}{f':{number}' if number else ''}.service"


def _object_path(unit: str) -> str:
    """Return the path of a unit's object."""
    return f"/org/freedesktop/systemd1/unit/{_escape_label(unit)}"


def _escape_label(name: str) -> str:
    """Escape a unit's name for its object's path, as bus_label_escape() in systemd does."""
    return "".join(char if char.isascii() and char.isalnum() else f"_{ord(char):02x}" for char in name)


def _open_moved_children(pid: int, unit: str, stack: ExitStack) -> list[int]:
    """Return pidfds, which `stack` closes, of the children of a process that are not in its unit's control group."""
    moved = []
    with suppress(OSError):
        for child, pidfd in open_children(pid, stack).items():
            with suppress(OSError):  # it has ended
                if unit not in units_in(Path(f"/proc/{child}/cgroup").read_text()):
                    moved.append(pidfd)
    return moved


def _properties(command: Command, stdout: int, stderr: int, gate: Gate | None = None) -> Iterator[tuple[str, Property]]:
    """The unit's settings: an end by its control group, at once, and a start that a shutdown does not refuse.

    With a gate the command waits there. `Environment` may come twice: systemd adds the file's to khod's.
    """
    argv = waiting_argv(command) if gate else command.launch_argv
    yield "Description", ("s", f"Kernel handover: {command.name}")
    yield "Type", ("s", "exec")
    yield "ExecStartEx", ("a(sasas)", [(argv[0], argv, ["no-env-expand"])])  # a `$` is the command's own
    yield "Environment", ("as", [f"{name}={value}" for name, value in command.environment.items()])
    if gate:
        yield "StandardInputFileDescriptor", ("h", gate.theirs.fileno())
    else:
        yield "StandardInput", ("s", "null")
    yield "StandardOutputFileDescriptor", ("h", stdout)
    yield "StandardErrorFileDescriptor", ("h", stderr)
    yield "IgnoreSIGPIPE", ("b", False)
    # With its default dependencies it would conflict with shutdown.target, and be refused there as destructive.
    yield "DefaultDependencies", ("b", False)
    if command.verb in AFTER_JUMP:
        yield "After", ("as", [HOOKS_UNIT])
    yield "CollectMode", ("s", "inactive-or-failed")
    yield "KillMode", ("s", "control-group")
    yield "KillSignal", ("i", int(signal.SIGKILL))
    yield "TimeoutStopUSec", ("t", int(STOP_STAGE_SECONDS * 1_000_000))
    yield "OOMPolicy", ("s", "continue")
    yield from command.settings.items()
