# SPDX-License-Identifier: LGPL-2.1-or-later
"""The step `quiesce`: the rest of the host is stopped while the producers still work, and started again by the undo.

So the blackout, which begins with `freeze`, holds the jump alone. Stop jobs, not `systemctl isolate`: that stops units
with RemainAfterExit= and loses transient units for good (seen with systemd 262).
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Protocol

from khod.dataclass import dataclass
from khod.deferred import defer_module
from khod.errors import Failed, Refused
from khod.kernel.filesystems import FrozenFileSystems
from khod.producers.commands import CommandRunner
from khod.quiesce.outcome import Started
from khod.quiesce.selection import KHOD_UNITS, STOPPABLE, Selection, find_ended, select_units
from khod.quiesce.thaw_guard import ThawGuard
from khod.text import join_names

if TYPE_CHECKING:
    from khod.quiesce import last_acts, units
    from khod.systemd import dbus, logind, manager
else:
    last_acts = defer_module("khod.quiesce.last_acts")
    units = defer_module("khod.quiesce.units")
    dbus = defer_module("khod.systemd.dbus")
    logind = defer_module("khod.systemd.logind")
    manager = defer_module("khod.systemd.manager")

ASK_SECONDS = 15.0
"""Seconds systemd has to describe all units; no producer is frozen meanwhile."""
JOB_PAUSES = 10
JOB_SECONDS = 0.5
"""Jobs get this time, that often, to end by themselves, as the stop of user-runtime-dir@UID.service after a logout."""
ROUNDS = 3
"""How often what was started meanwhile (by a bus call, a device, a program) is stopped again."""
REST_SECONDS = 5.0
"""Seconds systemd has, while the producers are frozen, to say whether the host is still at rest."""
JOB_RESULTS = {"canceled": "started again meanwhile"}
"""What it means of a stop job that systemd ended with this result."""
WAIT = "Wait for them: systemctl list-jobs, systemctl status. To stop nothing: `Kexec(now)`"
KEEP_MORE = "Keep what it needs, too: quiesce.keep in /etc/kho/khod.toml. To stop nothing: `Kexec(now)`"
KEEP_IT = "Stop it by hand, or keep it: quiesce.keep in /etc/kho/khod.toml. To stop nothing: `Kexec(now)`"


@dataclass(frozen=True)
class Survey:
    """What a quiesce would do on this host now.

    `jobs` has what is under way with units that do not stay, a unit each: the kind of its queued job, or "stopping" for
    one that ends by itself. `stores` are units with files that only `systemctl kexec` hands over; `may_store` has
    all that could get them.
    """

    selection: Selection = field(default_factory=Selection)
    jobs: Mapping[str, str] = field(default_factory=dict)
    stores: tuple[str, ...] = ()
    may_store: tuple[str, ...] = ()

    def find_obstacle(self) -> str:
        """Return what is in the way before anything is stopped, "" for nothing."""
        if self.jobs:
            names = join_names(f"{unit} ({kind})" for unit, kind in sorted(self.jobs.items()))
            return f"systemd has jobs under way: {names}"
        return "; ".join(self.selection.obstacles)

    def require_clear(self) -> Survey:
        """Return this survey; Refused if something is in the way."""
        if obstacle := self.find_obstacle():
            remedy = WAIT if self.jobs else KEEP_IT
            raise Refused(f"The host cannot be quiesced: {obstacle}", where="quiesce", remedy=remedy)
        return self


class Host(Protocol):
    """The host around khod and the producers. `keep` has the units, or patterns of names, that stay, with the reason.

    A cancelled call may have half of its effect, which start_units undoes.
    """

    @property
    def awaited_units(self) -> Collection[str]:
        """The units whose stop or start is waited for now."""

    async def survey_units(self, keep: Mapping[str, str]) -> Survey:
        """Return what a quiesce would do, once the jobs under way have ended or had time to; Failed without systemd."""

    async def stop_units(self, names: Sequence[str], keep: Mapping[str, str], seconds: float) -> tuple[str, ...]:
        """Stop these units and what is started meanwhile, then write what a shutdown would have written.

        Returns the units that have files now which only `systemctl kexec` hands over: a service may store them in its
        stop. Refused if one does not stop within `seconds`.
        """

    async def require_rest(self) -> None:
        """Refused if an immediate jump would now lose what it would not have lost when stop_units returned.

        That is a unit that was started since, a file that only `systemctl kexec` hands over, and a shutdown of the host
        that somebody else has begun. Failed without systemd.
        """

    async def start_units(self, names: Sequence[str], seconds: float) -> Started:
        """Start these units again, and nothing with them. Raises nothing."""

    async def guard_filesystems(self) -> bool:
        """Have them thawed if khod dies while they are frozen; whether they will be frozen. Raises nothing."""

    async def release_filesystems(self) -> None:
        """End that guard, once they are thawed."""


@dataclass(frozen=True)
class _Rest:
    """A host at rest: the units that were to stay, with the reasons, and what was found when the others had stopped."""

    keep: Mapping[str, str]
    running: frozenset[str]
    may_store: tuple[str, ...]


class SystemdHost:
    """A host that systemd runs; `runner` runs the commands of last_acts, and the guard of the file systems."""

    def __init__(self, runner: CommandRunner, filesystems: FrozenFileSystems) -> None:
        self._runner = runner
        self._guard = ThawGuard(runner, filesystems)
        self._has_acted = False
        """Whether the end of this boot was written."""
        self._awaited: set[str] = set()
        self._at_rest: _Rest | None = None
        """How the units were left; None while nothing is stopped."""
        self._staying: frozenset[str] = frozenset()
        """While the units are stopped: those that are to stay, which the undo starts if they end with the others."""

    @property
    def awaited_units(self) -> Collection[str]:
        """As Host has it."""
        return self._awaited

    async def survey_units(self, keep: Mapping[str, str]) -> Survey:
        """As Host has it."""
        survey = await self._read_survey(keep)
        for _ in range(JOB_PAUSES):
            if not survey.jobs:
                break
            await asyncio.sleep(JOB_SECONDS)
            survey = await self._read_survey(keep)
        return survey

    async def _read_survey(self, keep: Mapping[str, str]) -> Survey:
        try:
            async with asyncio.timeout(ASK_SECONDS), dbus.systemd_bus() as bus:
                found = await units.read_units(bus)
                jobs = await units.list_jobs(bus)
        except (dbus.BusError, TimeoutError) as error:
            raise _undescribed_error(error) from error
        wanted = dict.fromkeys(KHOD_UNITS, "it is khod's") | dict(keep)
        selection = select_units(found, wanted, units.find_session_units(found))
        # A service that ends by itself has no job: it may come back by Restart=, or still put away what it holds.
        stopping = [unit.name for unit in found if unit.active == "deactivating" and unit.name.endswith(STOPPABLE)]
        jobs = _without_own(dict.fromkeys(stopping, "stopping") | jobs, keep)
        storing = [unit for unit in found if unit.preserves_store and unit.name != "kho-handover.service"]
        stores = tuple(unit.name for unit in storing if unit.stored_files)
        return Survey(selection, jobs, stores, tuple(unit.name for unit in storing))

    async def stop_units(self, names: Sequence[str], keep: Mapping[str, str], seconds: float) -> tuple[str, ...]:
        """As Host has it."""
        try:
            async with asyncio.timeout(seconds):
                stores = await self._stop_rounds(names, keep)
                self._has_acted = True
                await last_acts.carry_out(self._runner)
                return stores
        except TimeoutError:
            left = await _describe_left(names)
            raise Refused(
                f"The host did not come to rest within {seconds:g} s: {left}", where="quiesce", remedy=KEEP_IT
            ) from None
        except dbus.BusError as error:
            raise Failed(
                f"systemd did not stop the host's units: {error}", where="quiesce", remedy="Look at systemctl status."
            ) from error

    async def guard_filesystems(self) -> bool:
        """As Host has it."""
        return await self._guard.start()

    async def release_filesystems(self) -> None:
        """As Host has it."""
        await self._guard.stop()

    async def _stop_rounds(self, names: Sequence[str], keep: Mapping[str, str]) -> tuple[str, ...]:
        async with dbus.systemd_bus() as bus:
            listed = await units.list_units(bus, STOPPABLE)
            late = await units.find_timed_out(bus, names)  # in an earlier start or stop
        self._staying = frozenset(name for name, unit in listed.items() if unit.active == "active").difference(names)
        stopped: set[str] = set()
        for _ in range(ROUNDS):
            stopped.update(names)
            results = await units.run_jobs("StopUnit", names, "replace", self._awaited)
            if failed := {name: result for name, result in results.items() if result != units.DONE}:
                stuck = "; ".join(f"{name}: {JOB_RESULTS.get(why, why)}" for name, why in failed.items())
                raise Refused(f"Units could not be stopped: {stuck}", where="quiesce", remedy=KEEP_IT)
            await _require_stopped_in_time(names, late)
            survey = await self.survey_units(keep)
            names = survey.selection.stopped
            if not names:
                survey.require_clear()
                # One that was started after the first survey was to be stopped, and a later round has done that.
                if ended := find_ended(self._staying - stopped, survey.selection.running):
                    raise Refused(
                        f"Was to stay, and ended when others were stopped: {join_names(ended)}",
                        where="quiesce",
                        remedy=KEEP_MORE,
                    )
                self._staying = frozenset()
                running = frozenset(survey.selection.running)
                self._at_rest = _Rest(dict(keep), running, survey.may_store)
                return survey.stores
        raise Refused(f"Started again each time: {join_names(names)}", where="quiesce", remedy=KEEP_IT)

    async def require_rest(self) -> None:
        """As Host has it."""
        rest = self._at_rest
        assert rest is not None, "stop_units has returned"
        try:
            async with asyncio.timeout(REST_SECONDS), dbus.systemd_bus() as bus:
                system = manager.Systemd(bus)
                state, running, jobs, storing, goes_down = await asyncio.gather(
                    system.system_state(),
                    units.list_running(bus, STOPPABLE),
                    units.list_jobs(bus),
                    units.find_storing(bus, rest.may_store),
                    logind.is_shutting_down(),
                )
        except (dbus.BusError, TimeoutError) as error:
            raise _undescribed_error(error) from error
        if goes_down is None:
            raise Refused(
                "logind does not say whether somebody shuts the host down",
                where="quiesce",
                remedy="Look at systemctl status systemd-logind. To ask nobody: `Kexec(now)`",
            )
        if state == "stopping" or goes_down:
            raise Refused(
                "Somebody has begun to shut the host down",
                where="quiesce",
                remedy="It goes down without a handover. Who: systemctl list-jobs, journalctl -u systemd-logind.",
            )
        if storing:  # it would not be khod's jump if there had been any when the units were stopped
            raise Refused(
                f"Has stored files for the next kernel while the host was stopped: {join_names(sorted(storing))}",
                where="quiesce",
                remedy="Only `systemctl kexec` hands them over. Try again: khod jumps by it where such files are.",
            )
        if running <= rest.running and not _without_own(jobs, rest.keep):
            return
        # Seldom, as the full survey takes its time: most of these end at once, or belong to khod or to a producer.
        survey = await self._read_survey(rest.keep)
        if started := dict.fromkeys((*survey.selection.stopped, *survey.jobs)):  # a oneshot at work has a job
            raise Refused(
                f"Started, or being stopped, while the host was stopped: {join_names(started)}",
                where="quiesce",
                remedy=KEEP_IT,
            )

    async def start_units(self, names: Sequence[str], seconds: float) -> Started:
        """As Host has it."""
        self._at_rest = None
        try:
            async with asyncio.timeout(seconds):
                # Its jobs go on over a daemon-reexec, which only hangs up on khod.
                return await dbus.ask_again(lambda: self._start_units(names))
        except TimeoutError:
            left = [name for name, state in (await _read_states(names)).items() if state != "active"]
            return Started(dict.fromkeys(left, f"not started within {seconds:g} s"))
        except dbus.BusError as error:
            return Started(dict.fromkeys(names, f"systemd was not asked: {error}"))

    async def _start_units(self, names: Sequence[str]) -> Started:
        async with dbus.systemd_bus() as bus:
            if await manager.Systemd(bus).system_state() == "stopping":
                return Started()  # the host is shut down: what was stopped stays so, as everything else
            names = (*names, *find_ended(self._staying, await units.list_running(bus, STOPPABLE)))
            await units.reset_failed(bus, names)  # StartLimitBurst= may allow no further start
        # Not "replace": systemd would start what they want, too, which an operator may have stopped before.
        results = await units.run_jobs("StartUnit", names, "ignore-requirements", self._awaited)
        async with dbus.systemd_bus() as bus:
            reasons = await units.read_ends(bus, results)
        self._staying = frozenset()
        if self._has_acted:
            await last_acts.take_back(self._runner)
            self._has_acted = False
        left = {name: why for name, why in reasons.items() if why in units.DECIDED}
        return Started({name: why for name, why in reasons.items() if name not in left}, left)


def _without_own(jobs: Mapping[str, str], keep: Iterable[str]) -> dict[str, str]:
    """Return the jobs of units that are neither khod's nor to stay.

    khod may have been asked by a unit that is being started: kho-handover@NAME.service, or the operator's own.
    """
    own = ("kho-*", *keep)
    return {unit: kind for unit, kind in jobs.items() if not any(fnmatchcase(unit, pattern) for pattern in own)}


def _undescribed_error(error: Exception) -> Failed:
    return Failed(
        f"systemd does not describe its units: {str(error) or 'no answer'}",
        where="quiesce",
        remedy="Look at systemctl status. To stop nothing: `Kexec(now)`",
    )


async def _require_stopped_in_time(names: Sequence[str], before: Collection[str]) -> None:
    """Refused if systemd had to kill one of these units: what it held was not put away in order.

    `before` are those of which something had not ended in time before the stop.
    """
    async with dbus.systemd_bus() as bus:
        late = [name for name in await units.find_timed_out(bus, names) if name not in before]
    if late:
        raise Refused(
            f"Not stopped within TimeoutStopSec=, and killed: {join_names(late)}", where="quiesce", remedy=KEEP_IT
        )


async def _read_states(names: Sequence[str]) -> dict[str, str]:
    """Return the ActiveState of these units, "unknown" where systemd does not answer."""
    try:
        async with asyncio.timeout(ASK_SECONDS), dbus.systemd_bus() as bus:
            listed = await units.list_units(bus)
    except (dbus.BusError, TimeoutError):
        return dict.fromkeys(names, "unknown")
    return {name: listed[name].active if name in listed else "inactive" for name in names}


async def _describe_left(names: Sequence[str]) -> str:
    states = await _read_states(names)
    left = [f"{name} is {state}" for name, state in states.items() if state not in manager.ENDED_STATES]
    return join_names(left) or "other units were started all the time"
