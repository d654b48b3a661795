# SPDX-License-Identifier: LGPL-2.1-or-later
"""Keeps the log of the run under way, and hands over the attempt that is made of it at its end.

It hears every event. Nobody waits for it, no error leaves it, and between the first `freeze` and the jump it only
collects: its lines are written in the thread of the record, before the record that announces the jump.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from khod.concurrency.worker import Worker
from khod.dataclass import dataclass
from khod.deferred import defer_module
from khod.engine.run_logs import FILE_SECONDS, RunLogs
from khod.errors import KhoError
from khod.handover.machine import RESTING
from khod.handover.record import Record
from khod.kernel.kexec import Kexec
from khod.kernel.thread import Workers
from khod.model import NO_TERMS, Check, Event, EventKind, FindingSource, Observed, Phase, Step

if TYPE_CHECKING:
    from khod.history import model as history
    from khod.history.log import Entry
    from khod.history.model import AttemptRecord, ClockReading, Departure
    from khod.preflight import boot_cost
    from khod.preflight import trial as preflight_trial
    from khod.target.target import Target
else:
    history = defer_module("khod.history.model")
    boot_cost = defer_module("khod.preflight.boot_cost")
    preflight_trial = defer_module("khod.preflight.trial")

LOG = logging.getLogger(__name__)
CLOCK_SECONDS = 1.0
"""Maximum seconds that anyone waits for a reading of the clocks."""
MAX_PENDING = 100_000
"""Maximum number of entries that wait to be written; further ones are dropped."""
ENDED = RESTING | {Phase.failed}
ARRIVED = (Phase.verified, Phase.degraded)


@dataclass(frozen=True)
class Sources:
    """Where the facts of a run come from; each is called in a task of its own, and may fail.

    `read_clocks` is called in a thread, `read_departure` with the path of the run's log.
    """

    read_clocks: Callable[[history.Moment], ClockReading] | None = None
    read_departure: Callable[[Path], Awaitable[Departure]] | None = None
    read_arrival: Callable[[history.KernelFacts], Awaitable[history.Arrival]] | None = None
    read_cold_boot: Callable[[], Awaitable[history.ColdBoot]] | None = None
    knows: Callable[[str], Awaitable[bool]] | None = None
    """Tells whether a run is remembered."""
    read_begin: Callable[[], float] | None = None
    """When this kernel has begun by CLOCK_MONOTONIC, which is quick to tell; None for 0, as in every real one."""


NO_SOURCES = Sources()
ABORTED = "The handover was aborted."
"""The reason of a rollback that has no other: somebody asked for it."""


class Recorder:
    """The log of one run at a time; `remember` takes the attempt at its end.

    `read_record` returns the current record, `spawn` starts a task that nobody waits for.
    """

    def __init__(
        self,
        state: Path,
        workers: Workers,
        kexec: Kexec,
        read_record: Callable[[], Record],
        spawn: Callable[[Coroutine[None, None, None]], None],
        remember: Callable[[AttemptRecord], Awaitable[None]],
        sources: Sources,
    ) -> None:
        self._kexec = kexec
        self._logs = RunLogs(state, workers)
        self._questions = workers.queries
        self._read_record = read_record
        self._spawn = spawn
        self._remember = remember
        self._sources = sources
        self._run = ""
        self._boot_id = ""
        self._arrival: Observed | None = None
        self._start: ClockReading | None = None
        self._pending: list[Entry] = []
        self._checks: list[Check] = []
        self._is_held = False
        """Whether nothing is written: producers are frozen."""
        self._has_moved = False
        """Whether the run has taken a step, so that the next phase at rest is its end."""
        self._is_arrived = False
        """Whether the run has led to this boot."""

    def note_start(self) -> None:
        """Read the clocks once for the next run of this boot: khod has started."""

        async def read() -> None:
            self._start = await self._read_clocks(history.Moment.start)

        if self._sources.read_clocks is not None:
            self._spawn(read())

    # Before the jump

    async def begin_run(self, record: Record, observed: Observed) -> None:
        """Begin the log of a new run."""
        self._run, self._boot_id = record.run, observed.boot_id
        self._has_moved = self._is_held = self._is_arrived = False
        origin = history.KernelFacts(
            observed.release, await _read_banner(self._questions, self._kexec), observed.boot_id, observed.cmdline
        )
        begun = record.begun
        terms = record.terms if record.terms != NO_TERMS else None
        self._pending = [history.RunBegun(record.run, begun.at, begun.by, origin, record.generation.value, terms)]
        if self._start is not None and self._start.boot_id == observed.boot_id:
            self._add(self._start)
        self.note_checks(self._checks)
        self._checks = []
        await self.read_clocks(history.Moment.begin)

    async def note_target(self, target: Target, *, at_once: bool) -> None:
        """Log the next kernel; the digests of its files are computed here, before anyone is told anything."""
        with suppress(KhoError, OSError):
            images = await self._questions.call_within(
                partial(preflight_trial.list_image_facts, target), "reading the image", FILE_SECONDS
            )
            about = target.apart.about if target.apart else None
            kernel = history.KernelFacts(
                about.version if about else "", about.banner if about else "", "", target.cmdline
            )
            costs = boot_cost.find_boot_costs(boot_cost.Boot.of_target(target))
            self._add(history.RunTarget(kernel, images, at_once, costs, target.origins))

    def note_checks(self, checks: list[Check]) -> None:
        """Log the checks before this handover; those before its run begins are kept until then."""
        if self._run:
            self._pending += checks
        else:
            self._checks += checks

    async def refuse_run(self, record: Record, observed: Observed, error: KhoError) -> None:
        """Remember an attempt that was refused before its first step; `record` is for one that has no log yet."""
        if not self._run:
            await self.begin_run(record, observed)
        run, found = self._release_run()
        await self._finish(run, history.RunEnd(Phase.idle, time.time(), str(error), refused=True), found)

    def note_event(self, event: Event) -> None:
        """Log an event of the run under way; one at rest ends a run that has taken a step."""
        if not self._run or event.run != self._run:
            return
        is_end = event.phase in ENDED and self._has_moved and not self._is_arrived
        # The phase at rest is the outcome of this boot: that of another run, or idle.
        outcome = Phase.failed if event.phase is Phase.failed else Phase.idle
        self._add(replace(event, boot_id=self._boot_id, phase=outcome if is_end else event.phase))
        if event.phase not in ENDED:
            self._has_moved = True
            if event.kind is EventKind.step_began and event.step == Step.freeze.value:
                self._is_held = True
            elif event.phase is Phase.rolling_back:
                self._is_held = False
            if not self._is_held:
                self.write_pending()
        elif is_end:
            run, found = self._release_run()
            self._spawn(
                self._finish(
                    run, history.RunEnd(outcome, time.time(), self._read_record().last_error or ABORTED), found
                )
            )

    async def read_clocks(self, moment: history.Moment) -> None:
        """Log the clocks of this moment; this waits at most CLOCK_SECONDS, and never while producers are frozen."""
        if (reading := await self._read_clocks(moment)) is not None:
            self._add(reading)

    async def _read_clocks(self, moment: history.Moment) -> ClockReading | None:
        if self._sources.read_clocks is None:
            return None
        try:
            read = partial(self._sources.read_clocks, moment)
            return await self._questions.call_within(read, "reading the clocks", CLOCK_SECONDS)
        except Exception as error:  # noqa: BLE001 - no figure is worth a handover
            LOG.debug("The clocks could not be read: %s", error)
            return None

    # After the jump

    def adopt_run(self, record: Record, observed: Observed, *, arrived: bool) -> None:
        """Go on with the log of the run of an earlier khod; with `arrived` it has led to this boot."""
        self._run, self._boot_id = record.run, observed.boot_id
        self._has_moved, self._is_arrived = True, arrived
        self._is_held = arrived  # producers wait for what they left
        if arrived:
            self._arrival = observed
            if self._sources.read_clocks is not None:
                self._spawn(self.read_clocks(history.Moment.arrival))

    async def measure_arrival(self, run: str) -> history.Timeline | None:
        """Return the timeline of the run that has led to this boot, as far as it is logged; None if it is not known."""
        if self._arrival is None or run != self._run or not self._is_arrived:
            return None
        boot_id = self._arrival.boot_id
        kernel = history.KernelFacts(self._arrival.release, "", boot_id)
        # The verification is about to be concluded, which is what a recovery ends with.
        concluded = Event(time.monotonic(), Phase.verified, "", run, at=time.time(), boot_id=boot_id)
        try:
            began = self._sources.read_begin() if self._sources.read_begin is not None else 0.0
            arrival = history.Arrival(kernel, began_monotonic=began)
            return await self._logs.read_timeline(run, [*self._pending, arrival, concluded])
        except Exception:  # the wall clock is used
            LOG.exception("The blackout could not be measured")
            return None

    def conclude_arrival(self, record: Record) -> None:
        """Remember the outcome of the handover into this boot, also where it is corrected later."""
        self._spawn(self._finish_arrival(record.arrived_run, _end_arrival(record)))

    async def _finish_arrival(self, run: str, end: history.RunEnd) -> None:
        """Remember the outcome at once, and again with what takes time to find out; another run may begin meanwhile."""
        if run != self._run or self._arrival is None:  # a correction
            await self._finish(run, end, [])
            return
        now, sources = self._arrival, self._sources
        _, found = self._release_run()
        kernel = history.KernelFacts(
            now.release, await _read_banner(self._questions, self._kexec), now.boot_id, now.cmdline
        )
        await self._finish(run, end, [*found, history.Arrival(kernel)])
        facts: list[Entry] = []
        if (reading := await self._read_clocks(history.Moment.end)) is not None:
            facts.append(reading)
        if sources.read_departure is not None:
            facts += await _gather(sources.read_departure(self._logs.path(run)))
        if sources.read_arrival is not None:
            facts += await _gather(sources.read_arrival(kernel))
        if facts:
            await self._finish(run, None, facts)

    def conclude_cold_boot(self, run: str, known: history.ColdBoot, observed: Observed) -> None:
        """Remember that the run ended as a cold boot: at once, and again when it is explained."""
        self._run, self._boot_id = run, observed.boot_id
        self._spawn(self._finish_cold_boot(run, known))

    async def _finish_cold_boot(self, run: str, known: history.ColdBoot) -> None:
        """Remember the cold boot; another run may begin meanwhile.

        Without the first time a khod that ends before the explanation would leave the image free to be tried again.
        """
        await self._finish(run, history.RunEnd(Phase.cold_boot, time.time(), known.reason), [known])
        found: list[Entry] = []
        reason = known.reason
        if self._sources.read_cold_boot is not None:
            found = await _gather(self._sources.read_cold_boot())
            reason = next((one.reason for one in found if isinstance(one, history.ColdBoot)), reason)
        if self._run == run:
            found = [*self._release_run()[1], *found]
        await self._finish(run, history.RunEnd(Phase.cold_boot, time.time(), reason), found)

    async def remember_left(self, record: Record) -> None:
        """Remember the runs that an earlier khod has logged and not come to remember: it was killed, or a disk full.

        Of the last runs `record` says how they ended; another one has no end.
        """
        knows = self._sources.knows
        if knows is None:
            return
        try:
            for run in await self._logs.list_runs():
                if run == self._run or await knows(run):
                    continue
                log = await self._logs.read(run)
                await self._finish(run, None if log.end else _end_left(record, run), [])
        except Exception:  # they are in their logs still
            LOG.exception("What an earlier khod has logged could not be remembered")

    # The log

    def _add(self, entry: Entry) -> None:
        if self._run and len(self._pending) < MAX_PENDING:
            self._pending.append(entry)

    def write_pending(self) -> None:
        """Queue the write of what is pending; what a full disk does not take is kept."""
        if self._pending and self._run:
            entries, self._pending = self._pending, []
            self._logs.append_later(self._run, entries)

    def _release_run(self) -> tuple[str, list[Entry]]:
        """Return the run under way and what is not written of it; the next events are those of another run."""
        run, found = self._run, self._pending
        self._run, self._pending, self._is_held = "", [], False
        return run, found

    async def _finish(self, run: str, end: history.RunEnd | None, found: list[Entry]) -> None:
        """Log what was `found`, and the end of a run if it is not logged yet; hand over the attempt made of its log."""
        entries = [*found, *([end] if end else [])]
        try:
            await self._remember(await self._logs.make_attempt(run, entries))
        except Exception:  # the handover is over, and its outcome in the record
            LOG.exception("The handover %s could not be remembered", run)


async def _read_banner(questions: Worker, kexec: Kexec) -> str:
    """Return the build banner of the running kernel, "" if it does not say it in time."""
    with suppress(KhoError, OSError):
        return await questions.call_within(kexec.banner, "saying its version", CLOCK_SECONDS)
    return ""


def _end_arrival(record: Record) -> history.RunEnd:
    """Return how the handover into this boot ended."""
    verdict = record.verdict
    assert verdict is not None, "it was concluded"
    trees = [
        f"{found.subject}: {found.text}"
        for found in verdict.findings
        if found.source is FindingSource.kernel and found.subject
    ]
    blackout = record.blackout_seconds, record.blackout_error_seconds
    return history.RunEnd(record.outcome, time.time(), verdict.reason, verdict, *blackout, trees)


def _end_left(record: Record, run: str) -> history.RunEnd | None:
    """Return how a run ended that is the record's, None of another one."""
    if run == record.arrived_run and record.outcome in ARRIVED and record.verdict is not None:
        return _end_arrival(record)
    if run != record.run or record.phase not in ENDED:
        return None
    outcome = record.phase if record.phase in (Phase.failed, Phase.cold_boot) else Phase.idle
    return history.RunEnd(outcome, time.time(), record.last_error)


async def _gather(reading: Awaitable[Entry]) -> list[Entry]:
    """Return what a source says, nothing after an error: then the attempt lacks that, and nothing else."""
    try:
        return [await reading]
    except Exception:  # no fact is worth an attempt that is not remembered
        LOG.exception("A fact of the handover could not be found out")
        return []
