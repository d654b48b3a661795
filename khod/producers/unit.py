# SPDX-License-Identifier: LGPL-2.1-or-later
"""Producers that are units of the service manager: frozen by their cgroup, or stopped, during the blackout.

They are told through org.freedesktop.systemd1 at its private socket, with one connection for each verb.

Seen on systemd 262: systemd does not stop a frozen unit. On the way into the kexec it skips the unit. Then
systemd-shutdown's SIGTERM kills what is frozen, but a process that catches SIGTERM is waited for as long as
DefaultTimeoutStopSec= says, inside the blackout. A unit that dies while it is frozen counts as frozen until a reboot,
or until nothing refers to it.

A stopped unit is started again by its name only. What systemd stops together with it is not started again, so an active
unit that requires it is a veto. A socket, timer or path that triggers it may start it during the blackout.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import field, replace
from fnmatch import fnmatchcase

from khod.dataclass import dataclass
from khod.errors import UsageError
from khod.producers.barrier import GONE, NOT_RECORDED, ParticipantVeto, ProducerCall, Verb
from khod.producers.commands import CommandRunner
from khod.producers.configured import Configured, one_line
from khod.producers.freezer import SLICE, thaw_group
from khod.producers.transient import TransientUnits
from khod.systemd.dbus import BusError, Disconnected, ErrorAnswer, systemd_bus
from khod.systemd.manager import Systemd, UnitState

FREEZE_METHODS = ("freeze", "stop")
NAME = re.compile(r"[A-Za-z0-9:_.\\@-]+\.(service|scope|slice|socket|mount|swap|target|timer|path|automount|device)")
MAX_UNIT_NAME_BYTES = 255
"""Maximum bytes of a unit's name (systemd's UNIT_NAME_MAX is 256 and counts the NUL)."""
VITAL = (
    "-.slice",
    "system.slice",
    "kho.slice",
    "init.scope",
    "-.mount",
    "kho-after*",
    "kho-handover*",
    "kho-hook-*",
    "kho-hooks*",
    "kho-sessions*",
    "kho-verify*",
    "dbus*",
    "systemd-journald*",
    "systemd-logind*",
    "systemd-udevd*",
    "systemd-userdbd*",
)
"""khod, what khod needs for an undo, and what every login and device of the host waits for."""

RETRY_SECONDS = 0.5
"""Seconds before a thaw connects again."""

OURS = "running"
"""The first word in the note of a unit that khod may freeze or stop, and so must thaw or start; with any other note the
unit is left alone. The method, the unit and its control group follow. If they are missing, an earlier khod wrote the
note, and the unit is that of the producer's file."""
UNTOUCHED = "left alone"
"""The note of a freeze that ended before systemd was told anything."""
INACTIVE = ("inactive", "failed")


@dataclass(frozen=True)
class Unit(Configured):
    """A unit; `how` is "freeze" for its cgroup's freezer, "stop" for a stop and a start."""

    unit: str = ""
    how: str = "freeze"
    group: str = ""
    """The path of its control group at `prepare`, as in /proc/PID/cgroup; "" if there was none, or if the note lacks
    it."""
    runner: CommandRunner = field(default_factory=TransientUnits, compare=False, repr=False)
    """Runs the command that thaws a control group; systemd is there, as it has the unit."""
    kind: str = "unit"

    @classmethod
    def by_note(cls, name: str, note: str) -> "Unit | None":
        """Return the producer that left this note; None if the note does not name the unit."""
        return None if note in (OURS, NOT_RECORDED) else cls(name)

    async def _carry_out(self, telling: ProducerCall) -> str | None:
        """Freeze or stop the unit at `freeze`, and undo that at `thaw`; the next kernel starts units by itself."""
        ours = None if telling.verb is Verb.prepare else self._as_prepared(telling.note)
        it = ours or self
        verbs: dict[Verb, Step] = {Verb.prepare: it._check_unit, Verb.freeze: it._freeze_unit, Verb.thaw: it._thaw_unit}
        step = verbs.get(telling.verb)
        if step is None or (telling.verb is Verb.thaw and ours is None):
            return None
        with _bus_errors_as_vetoes():
            while True:
                try:
                    async with systemd_bus() as bus:
                        return await step(Systemd(bus, it.unit), telling)
                except Disconnected as error:
                    # systemd may be re-executing itself; an undo is told again until its time is over.
                    if telling.verb is not Verb.thaw or self.timeout <= RETRY_SECONDS:
                        raise
                    telling.not_yet(f"{error}; khod connects again", None)
                await asyncio.sleep(RETRY_SECONDS)

    async def _make_way(self, note: str) -> None:
        """Kill the processes of the unit if it is frozen.

        A process that catches SIGTERM does not get it while it is frozen, and systemd-shutdown waits for it as long as
        DefaultTimeoutStopSec= says (90 s), in the middle of the blackout.
        """
        ours = self._as_prepared(note)
        if ours is not None and ours.how == "freeze":
            with _bus_errors_as_vetoes():
                async with systemd_bus() as bus:
                    await Systemd(bus, ours.unit).kill_processes()

    @property
    def _record_note(self) -> str:
        """The note of a unit that khod may freeze or stop: its file may name another unit by the time of the thaw."""
        return f"{OURS} {self.how} {self.unit} {self.group}"

    def _as_prepared(self, note: str) -> "Unit | None":
        """Return the unit of a note; None if it is to be left alone, ParticipantVeto if that is not known.

        If nothing is recorded, khod may have frozen the unit: systemd says whether it is frozen.
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

    async def _check_unit(self, systemd: Systemd, telling: ProducerCall) -> None:
        state = await systemd.read_state()
        telling.note = found = require_state(state, self.unit)
        if found != OURS:
            return
        for name in state.names:  # an alias may hide a vital unit
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

    async def _freeze_unit(self, systemd: Systemd, telling: ProducerCall) -> None:
        prepared, telling.note = telling.note, UNTOUCHED
        state = await systemd.read_state()
        found = require_state(state, self.unit)
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

    async def _refuse_company(self, systemd: Systemd, state: UnitState) -> None:
        for name in state.required_by:
            if (await systemd.read_state(name)).active not in INACTIVE:
                raise ParticipantVeto(f"{name} depends on {self.unit}: it would stop too, and not be started again")

    async def _stop_unit(self, systemd: Systemd, telling: ProducerCall) -> None:
        telling.not_yet("systemd stops it", None)
        # "fail": a job that another program has queued meanwhile is not replaced.
        result = await systemd.run_job("StopUnit", "fail")
        state = await systemd.read_state()
        if result != "done" or state.active not in INACTIVE:
            raise ParticipantVeto(f"the stop of {self.unit} ended as {result}, and it is {state.active}")

    async def _thaw_unit(self, systemd: Systemd, telling: ProducerCall) -> str | None:
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

    async def _unfreeze_unit(self, systemd: Systemd, state: UnitState, telling: ProducerCall) -> None:
        if state.active in INACTIVE:
            raise ParticipantVeto(f"{self.unit} died while it was frozen, and systemd does not let it start again")
        try:
            await systemd.call_action("ThawUnit", "s", self.unit)
        except ErrorAnswer:
            group = await systemd.control_group() if telling.note == NOT_RECORDED else self.group
            if not await thaw_group(group, self.name, self.runner):
                raise
        else:
            if not (state := await systemd.read_state()).is_thawed:
                raise ParticipantVeto(f"{self.unit} is {state.freezer} after ThawUnit")

    def _may_hold_frozen(self, state: UnitState) -> bool:
        """Whether units in this slice may be frozen although the slice itself is not.

        systemd freezes the units of a slice one after the other, and the slice last. At the first error it returns
        (slice_freezer_action() in src/core/slice.c), and the slice's FreezerState has not changed.
        """
        return self.unit.endswith(SLICE) and state.freezer == "running" and state.active not in INACTIVE

    async def _start_unit(self, systemd: Systemd, state: UnitState, telling: ProducerCall) -> None:
        if state.active == "active" and not state.job:
            return
        telling.not_yet("systemd starts it", None)
        # "replace": khod's own stop may still be under way.
        result = await systemd.run_job("StartUnit", "replace")
        state = await systemd.read_state()
        if state.active != "active":
            raise ParticipantVeto(f"the start of {self.unit} ended as {result}, and it is {state.active}")


@contextmanager
def _bus_errors_as_vetoes() -> Iterator[None]:
    try:
        yield
    except BusError as error:
        raise ParticipantVeto(str(error)) from None


Step = Callable[[Systemd, ProducerCall], Awaitable[str | None]]


def check_unit(unit: str) -> None:
    """Raise UsageError for an invalid name of a unit, and for units that the host or khod cannot do without."""
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


def require_state(state: UnitState, unit: str) -> str:
    """Return OURS for a unit that runs, a word for one to be left alone; ParticipantVeto for any other state."""
    if state.load in ("not-found", "bad-setting", "error"):
        raise ParticipantVeto(f"{unit} cannot be loaded: systemd says {state.load}")
    if state.active in INACTIVE:
        return "inactive"
    if state.freezer.startswith("frozen"):
        return "frozen"
    if (state.active, state.freezer) == ("active", "running"):
        return OURS
    raise ParticipantVeto(
        f"{unit} is {state.active if state.freezer == 'running' else state.freezer}, neither active nor at rest"
    )
