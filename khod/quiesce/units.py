# SPDX-License-Identifier: LGPL-2.1-or-later
"""What systemd knows of the active units, and the jobs that stop them and start them again.

What systemd promises (org.freedesktop.systemd1(5), seen with 262): a stop job of a unit that its TimeoutStopSec= ends
with SIGKILL is `done` all the same, and the service's Result= is `timeout`.
"""

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from khod.abi.procstat import read_stat
from khod.quiesce.selection import FILES_FOR_NEXT_KERNEL, NOT_RUNNING, STOPPABLE, UnitFacts
from khod.systemd.dbus import Bus, ErrorAnswer, systemd_bus
from khod.systemd.manager import ENDED_STATES, MANAGER, PROPERTIES, STOPPED_TOO, SYSTEMD, Systemd, only_value

NEEDS = ("Requires", "Requisite", "BindsTo", "Wants", "PartOf", "StopPropagatedFrom", "JoinsNamespaceOf")
PRESERVED = ("yes", "on-success")
"""FileDescriptorStorePreserve= of units whose store systemd hands over; it drops that of others."""
PASSIVE = (".target", ".mount", ".automount", ".swap")
"""Units that khod does not stop, and that systemd may stop with those that need them."""
ACTIONS = ("SuccessAction", "FailureAction", "StartLimitAction")
GONE, MASKED = "it has gone", "it is masked"
UNFIT, ENDED = "its conditions do not hold", "it has ended by itself"
TRIES_AGAIN = "it fails, and systemd tries again"
DECIDED = (GONE, MASKED, UNFIT, ENDED, TRIES_AGAIN)
"""Why a unit does not run after its start although nothing is left to do."""
DONE = "done"
"""The result of a job that has succeeded."""
ANSWERS = {f"{SYSTEMD}.NoSuchUnit": GONE, f"{SYSTEMD}.UnitMasked": MASKED}
SINCE_BOOT = ("OnBootUSec", "OnStartupUSec")
MICROSECOND = 1e-6
FAR_SECONDS = 900.0
"""Longer than the units are stopped."""
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
    if unit.active == "active" and name.endswith(PASSIVE):
        with suppress(ErrorAnswer):  # the unit has gone
            return UnitFacts(name, stops_unneeded=await _read(bus, unit.path, "StopWhenUnneeded", "Unit"))
        return None
    preserves = name.endswith(".service") and await _preserves_store(bus, unit.path)
    stored = await _count_stored_files(bus, name) if preserves else 0
    if unit.active in NOT_RUNNING or not name.endswith(STOPPABLE):
        return UnitFacts(name, unit.active, preserves_store=preserves, stored_files=stored)
    # Of a service hundreds of properties would have to be parsed, two are needed: for all units of a host that is the
    # difference between a tenth of a second and two seconds.
    kind, main_pid, accepts, fires_at_start = "", 0, False, False
    try:
        found = await _read_all(bus, unit.path, "Unit")
        if name.endswith(".service"):
            kind, main_pid = await _read(bus, unit.path, "Type"), await _read(bus, unit.path, "MainPID")
        if name.endswith(".socket"):
            accepts = await _read(bus, unit.path, "Accept", "Socket")
        if name.endswith(".timer"):
            fires_at_start = await _fires_at_start(bus, unit.path)
    except ErrorAnswer:  # the unit has gone
        return None

    def listed(*keys: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(other for key in keys for other in found.get(key, ())))

    return UnitFacts(
        name,
        aliases=listed("Names"),
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
        ends_host=next((action for key in ACTIONS if (action := found.get(key, "none")) != "none"), ""),
        frozen=found.get("FreezerState", "running") != "running",
        elapsed=found.get("SubState") == "elapsed",
        fires_at_start=fires_at_start,
        accepts=accepts,
        preserves_store=preserves,
        stored_files=stored,
    )


async def _fires_at_start(bus: Bus, path: str) -> bool:
    """Whether a timer that is set off by the boot has been, and comes next after FAR_SECONDS.

    Started again, it is set off at once: timer_enter_waiting() in src/core/timer.c, seen with systemd 262.
    """
    since_boot = time.monotonic() / MICROSECOND
    timers = await _read(bus, path, "TimersMonotonic", "Timer")
    if not any(base in SINCE_BOOT and offset < since_boot for base, offset, _next in timers):
        return False
    clocks = {"NextElapseUSecMonotonic": since_boot, "NextElapseUSecRealtime": time.time() / MICROSECOND}
    nexts = {now: await _read(bus, path, name, "Timer") for name, now in clocks.items()}
    return all(elapse == 0 or elapse - now > FAR_SECONDS / MICROSECOND for now, elapse in nexts.items())


async def find_storing(bus: Bus, names: Iterable[str]) -> tuple[str, ...]:
    """Return which of these services have files for the next kernel in their descriptor stores; BusError."""
    names = tuple(names)
    counts = await asyncio.gather(*(_count_stored_files(bus, name) for name in names))
    return tuple(name for name, count in zip(names, counts, strict=True) if count)


async def _count_stored_files(bus: Bus, name: str) -> int:
    try:
        stored = await Systemd(bus).list_stored_files(name)
    except ErrorAnswer:  # the unit has gone
        return 0
    return sum(file.startswith(FILES_FOR_NEXT_KERNEL) for file in stored)


async def _preserves_store(bus: Bus, path: str) -> bool:
    """Whether systemd hands over what a service has in its store."""
    try:
        return await _read(bus, path, "FileDescriptorStorePreserve") in PRESERVED
    except ErrorAnswer:  # the unit has gone, or this systemd has no such property
        return False


async def _read(bus: Bus, path: str, name: str, interface: str = "Service") -> Any:
    """Return one property of a unit."""
    answer = await bus.call_method((SYSTEMD, path, PROPERTIES), "Get", "ss", f"{SYSTEMD}.{interface}", name)
    return only_value("v", answer)[1]


async def _read_all(bus: Bus, path: str, interface: str) -> dict[str, Any]:
    answer = await bus.call_method((SYSTEMD, path, PROPERTIES), "GetAll", "s", f"{SYSTEMD}.{interface}")
    return {name: value for name, (_, value) in only_value("a{sv}", answer).items()}


async def find_timed_out(bus: Bus, names: Iterable[str]) -> list[str]:
    """Return the services among these units whose last start or stop did not end in time; BusError."""
    listed = await list_units(bus)
    services = [name for name in names if name.endswith(".service") and name in listed]
    results = [await _read(bus, listed[name].path, "Result") for name in services]
    return [name for name, result in zip(services, results, strict=True) if result == "timeout"]


def find_session_units(units: Iterable[UnitFacts]) -> dict[str, str]:
    """Return the services whose main process is the leader of a login session, or above it in the process tree."""
    above: set[int] = set()
    for path in sorted(SESSIONS.glob("*")) if SESSIONS.is_dir() else []:
        with suppress(OSError, ValueError):
            if path.is_file():  # an older logind has a FIFO of each session there
                leaders = [line[7:] for line in path.read_text().splitlines() if line.startswith("LEADER=")]
                above.update(*(_ancestors(int(leader)) for leader in leaders))
    return {unit.name: "an operator is logged in by it" for unit in units if unit.main_pid in above}


def _ancestors(pid: int) -> Iterable[int]:
    while pid > 1:
        yield pid
        pid = read_stat(pid).parent


async def list_running(bus: Bus, suffixes: Sequence[str]) -> set[str]:
    """Return the units with these suffixes of which anything runs; BusError."""
    return {name for name, unit in (await list_units(bus, suffixes)).items() if unit.active not in NOT_RUNNING}


async def reset_failed(bus: Bus, names: Iterable[str]) -> None:
    """Have systemd forget how often these units were started; BusError."""
    for name in names:
        with suppress(ErrorAnswer):  # it has gone
            await Systemd(bus).call_action("ResetFailedUnit", "s", name)


async def read_ends(bus: Bus, results: Mapping[str, str]) -> dict[str, str]:
    """Return why units do not run after their start jobs, which had these results; BusError."""
    listed = await list_units(bus)
    ends: dict[str, str] = {}
    for name, result in results.items():
        state = listed[name].active if name in listed else "inactive"
        if result != DONE:
            ends[name] = TRIES_AGAIN if state == "activating" else result
        elif state in ENDED_STATES:
            found = await Systemd(bus).read_properties(name, "Unit")
            left = ENDED if found.get("ConditionResult", True) else UNFIT
            ends[name] = "it has failed" if found.get("ActiveState") == "failed" else left
    return ends


async def run_jobs(method: str, names: Sequence[str], mode: str, awaited: set[str]) -> dict[str, str]:
    """Queue a job of each unit, in this order; return the results. BusError without systemd.

    The jobs are queued before any is waited for: systemd then orders them among themselves. `awaited` has the units
    whose jobs have not ended, and is empty afterwards. A cancelled wait leaves the jobs to systemd.
    """
    results: dict[str, str] = {}

    async def run(bus: Bus, name: str) -> None:
        try:
            results[name] = await Systemd(bus, name).run_job(method, mode)
        except ErrorAnswer as error:
            results[name] = ANSWERS.get(error.name, str(error))
        awaited.discard(name)

    awaited.update(names)
    try:
        async with systemd_bus() as bus:
            await asyncio.gather(*(run(bus, name) for name in names))
    finally:
        awaited.clear()
    return {name: results[name] for name in names}
