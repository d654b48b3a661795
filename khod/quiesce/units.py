# SPDX-License-Identifier: LGPL-2.1-or-later
"""What systemd knows of the active units, and the jobs that stop them and start them again.

What systemd promises (org.freedesktop.systemd1(5), seen with 262): a stop job of a unit that its TimeoutStopSec= ends
with SIGKILL is `done` all the same, and the service's Result= is `timeout`.
"""

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from khod.abi.procstat import read_stat
from khod.quiesce.selection import FILES_FOR_NEXT_KERNEL, STOPPABLE, UnitFacts
from khod.systemd.dbus import Bus, ErrorAnswer, systemd_bus
from khod.systemd.manager import MANAGER, STOPPED_TOO, Systemd, only_value

NEEDS = ("Requires", "Requisite", "BindsTo", "Wants", "PartOf", "StopPropagatedFrom", "JoinsNamespaceOf")
PRESERVED = ("yes", "on-success")
"""FileDescriptorStorePreserve= of units whose store systemd hands over; it drops that of others."""
SESSIONS = Path("/run/systemd/sessions")


async def list_states(bus: Bus) -> dict[str, str]:
    """Return every loaded unit with its ActiveState; BusError."""
    answer = await bus.call_method(MANAGER, "ListUnits")
    return {name: active for name, _, _, active, *_ in only_value("a(ssssssouso)", answer)}


async def list_jobs(bus: Bus) -> dict[str, str]:
    """Return the queued and running jobs: each unit with the kind of its job; BusError."""
    answer = await bus.call_method(MANAGER, "ListJobs")
    return {unit: kind for _, unit, kind, *_ in only_value("a(usssoo)", answer)}


async def read_units(bus: Bus) -> list[UnitFacts]:
    """Return every loaded unit; BusError."""
    units, systemd = await list_states(bus), Systemd(bus)
    return await asyncio.gather(*(_read_unit(systemd, name, active) for name, active in units.items()))


async def _read_unit(systemd: Systemd, name: str, active: str) -> UnitFacts:
    if not name.endswith(STOPPABLE):
        return UnitFacts(name, active)
    found = await systemd.read_properties(name, "Unit")
    service = await systemd.read_properties(name, "Service") if name.endswith(".service") else {}
    is_preserved = service.get("FileDescriptorStorePreserve") in PRESERVED
    stored = await systemd.list_stored_files(name) if is_preserved and service.get("NFileDescriptorStore") else []

    def listed(*keys: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(other for key in keys for other in found.get(key, ())))

    return UnitFacts(
        name,
        active=found.get("ActiveState", active),
        load=found.get("LoadState", ""),
        file_state=found.get("UnitFileState", ""),
        type=service.get("Type", ""),
        main_pid=service.get("MainPID", 0),
        transient=found.get("Transient", False),
        early=not found.get("DefaultDependencies", True),
        can_start=not found.get("RefuseManualStart", False),
        can_stop=not found.get("RefuseManualStop", False),
        needs=listed(*NEEDS),
        after=listed("After"),
        before=listed("Before"),
        stops_too=listed(*STOPPED_TOO),
        triggers=listed("Triggers"),
        stored_files=sum(path.startswith(FILES_FOR_NEXT_KERNEL) for path in stored),
        result=service.get("Result", ""),
    )


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


async def run_jobs(method: str, names: Sequence[str], mode: str) -> dict[str, str]:
    """Queue a job of each unit, in this order; return the results that are not `done`. BusError without systemd.

    The jobs are queued before any is waited for: systemd then orders them among themselves. A cancelled wait leaves the
    jobs to systemd.
    """
    async with systemd_bus() as bus:
        results = await asyncio.gather(*(_run_job(Systemd(bus, name), method, mode) for name in names))
    return {name: result for name, result in zip(names, results, strict=True) if result != "done"}


async def _run_job(systemd: Systemd, method: str, mode: str) -> str:
    try:
        return await systemd.run_job(method, mode)
    except ErrorAnswer as error:
        return str(error)
