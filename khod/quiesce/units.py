# SPDX-License-Identifier: LGPL-2.1-or-later
"""What systemd knows of the active units, and the jobs that stop them and start them again.

What systemd promises (org.freedesktop.systemd1(5), seen with 262): a stop job of a unit that its TimeoutStopSec= ends
with SIGKILL is `done` all the same, and the service's Result= is `timeout`.
"""

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from khod.abi.procstat import read_stat
from khod.quiesce.selection import FILES_FOR_NEXT_KERNEL, NOT_RUNNING, STOPPABLE, UnitFacts
from khod.systemd.dbus import Bus, ErrorAnswer, systemd_bus
from khod.systemd.manager import MANAGER, PROPERTIES, STOPPED_TOO, SYSTEMD, Systemd, only_value

NEEDS = ("Requires", "Requisite", "BindsTo", "Wants", "PartOf", "StopPropagatedFrom", "JoinsNamespaceOf")
PRESERVED = ("yes", "on-success")
"""FileDescriptorStorePreserve= of units whose store systemd hands over; it drops that of others."""
SESSIONS = Path("/run/systemd/sessions")


class ListedUnit(NamedTuple):
    """A loaded unit: its ActiveState, and the path of its object."""

    active: str
    path: str


async def list_units(bus: Bus, suffixes: Sequence[str] = ("",)) -> dict[str, ListedUnit]:
    """Return every loaded unit, or those whose names end with one of `suffixes`; BusError."""
    patterns = [f"*{suffix}" for suffix in suffixes]
    answer = await bus.call_method(MANAGER, "ListUnitsByPatterns", "asas", [], patterns)
    return {
        name: ListedUnit(active, path) for name, _, _, active, _, _, path, *_ in only_value("a(ssssssouso)", answer)
    }


async def list_jobs(bus: Bus) -> dict[str, str]:
    """Return the queued and running jobs: each unit with the kind of its job; BusError."""
    answer = await bus.call_method(MANAGER, "ListJobs")
    return {unit: kind for _, unit, kind, *_ in only_value("a(usssoo)", answer)}


async def read_units(bus: Bus) -> list[UnitFacts]:
    """Return every active unit, and those that have stored files for the next kernel; BusError."""
    listed = await list_units(bus)
    found = await asyncio.gather(*(_read_unit(bus, name, unit) for name, unit in listed.items()))
    return [unit for unit in found if unit is not None]


async def _read_unit(bus: Bus, name: str, unit: ListedUnit) -> UnitFacts | None:
    if unit.active == "inactive" and not name.endswith(".service"):
        return None
    stored = await _count_stored_files(bus, name, unit.path) if name.endswith(".service") else 0
    if unit.active in NOT_RUNNING or not name.endswith(STOPPABLE):
        return UnitFacts(name, unit.active, stored_files=stored)
    # Of a service hundreds of properties would have to be parsed, two are needed: for all units of a host that is the
    # difference between a tenth of a second and two seconds.
    kind, main_pid, accepts = "", 0, False
    try:
        found = await _read_all(bus, unit.path, "Unit")
        if name.endswith(".service"):
            kind, main_pid = await _read(bus, unit.path, "Type"), await _read(bus, unit.path, "MainPID")
        if name.endswith(".socket"):
            accepts = await _read(bus, unit.path, "Accept", "Socket")
    except ErrorAnswer:  # the unit has gone
        return None

    def listed(*keys: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(other for key in keys for other in found.get(key, ())))

    return UnitFacts(
        name,
        active=found.get("ActiveState", unit.active),
        load=found.get("LoadState", ""),
        file_state=found.get("UnitFileState", ""),
        type=kind,
        main_pid=main_pid,
        transient=found.get("Transient", False),
        early=not found.get("DefaultDependencies", True),
        can_start=not found.get("RefuseManualStart", False),
        can_stop=not found.get("RefuseManualStop", False),
        needs=listed(*NEEDS),
        after=listed("After"),
        before=listed("Before"),
        stops_too=listed(*STOPPED_TOO),
        upheld_by=listed("UpheldBy"),
        stops_unneeded=found.get("StopWhenUnneeded", False),
        triggers=listed("Triggers"),
        accepts=accepts,
        stored_files=stored,
    )


async def _count_stored_files(bus: Bus, name: str, path: str) -> int:
    """Return how many files for the next kernel a service has in its store, if systemd preserves that."""
    try:
        if not await _read(bus, path, "NFileDescriptorStore"):
            return 0
        if await _read(bus, path, "FileDescriptorStorePreserve") not in PRESERVED:
            return 0
        stored = await Systemd(bus).list_stored_files(name)
    except ErrorAnswer:  # the unit has gone, or this systemd has no such property
        return 0
    return sum(file.startswith(FILES_FOR_NEXT_KERNEL) for file in stored)


async def _read(bus: Bus, path: str, name: str, interface: str = "Service") -> Any:
    """Return one property of a unit."""
    answer = await bus.call_method((SYSTEMD, path, PROPERTIES), "Get", "ss", f"{SYSTEMD}.{interface}", name)
    return only_value("v", answer)[1]


async def _read_all(bus: Bus, path: str, interface: str) -> dict[str, Any]:
    answer = await bus.call_method((SYSTEMD, path, PROPERTIES), "GetAll", "s", f"{SYSTEMD}.{interface}")
    return {name: value for name, (_, value) in only_value("a{sv}", answer).items()}


async def find_killed(bus: Bus, names: Iterable[str]) -> list[str]:
    """Return the services among these units that systemd had to kill, because they did not stop in time; BusError."""
    listed = await list_units(bus)
    services = [name for name in names if name.endswith(".service") and name in listed]
    results = [await _read(bus, listed[name].path, "Result") for name in services]
    return [name for name, result in zip(services, results, strict=True) if result == "timeout"]


def find_session_units(units: Iterable[UnitFacts]) -> dict[str, str]:
    """Return the services whose main process is the leader of a login session, or above it in the process tree."""
    above: set[int] = set()
    for path in sorted(SESSIONS.glob("*")) if SESSIONS.is_dir() else []:
        with suppress(OSError, ValueError):
            leader = next(line[7:] for line in path.read_text().splitlines() if line.startswith("LEADER="))
            above |= set(_ancestors(int(leader)))
    return {unit.name: "an operator is logged in by it" for unit in units if unit.main_pid in above}


def _ancestors(pid: int) -> Iterable[int]:
    while pid > 1:
        yield pid
        pid = read_stat(pid).parent


async def run_jobs(method: str, names: Sequence[str], mode: str, awaited: set[str]) -> dict[str, str]:
    """Queue a job of each unit, in this order; return the results that are not `done`. BusError without systemd.

    The jobs are queued before any is waited for: systemd then orders them among themselves. `awaited` has the units
    whose jobs have not ended, and is empty afterwards. A cancelled wait leaves the jobs to systemd.
    """
    results: dict[str, str] = {}

    async def run(bus: Bus, name: str) -> None:
        try:
            results[name] = await Systemd(bus, name).run_job(method, mode)
        except ErrorAnswer as error:
            results[name] = str(error)
        awaited.discard(name)

    awaited.update(names)
    try:
        async with systemd_bus() as bus:
            await asyncio.gather(*(run(bus, name) for name in names))
    finally:
        awaited.clear()
    return {name: results[name] for name in names if results[name] != "done"}
