# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a client may ask khod: nothing here changes the host, and nothing here waits for an operation."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from khod import model
from khod.concurrency.bounded import run_within
from khod.config import Config
from khod.deferred import defer_module
from khod.engine import status
from khod.engine.observer import Observer
from khod.engine.quiescence import Quiescence
from khod.engine.resources import Resources
from khod.engine.restoration import Restoration
from khod.engine.signals import Signals
from khod.engine.transaction import Transaction
from khod.errors import ConfigError, Failed, KhoError, Refused, UsageError
from khod.handover import reconcile
from khod.handover.machine import HELD, RESTING, Machine
from khod.handover.session_names import session_of
from khod.kernel.protocol import Tree
from khod.model import NO_TERMS, Check, Event, Observed, Phase, Plan, Status
from khod.producers.barrier import Member
from khod.producers.registrations import RegisteredProducer
from khod.producers.registry import ProducerRegistry
from khod.producers.session_scan import SightedSessions
from khod.region import Region
from khod.systemd.logind import Inhibitors

if TYPE_CHECKING:
    from khod import preflight
    from khod.engine import plan, rollback
    from khod.history import trial as history_trial
    from khod.history.model import ImageFacts
    from khod.preflight import facts as preflight_facts
    from khod.preflight import handover as preflight_handover
    from khod.preflight import trial as preflight_trial
    from khod.producers import session_holders
    from khod.quiesce.host import Survey
    from khod.target import target as next_kernel
    from khod.target.target import Target
else:
    plan = defer_module("khod.engine.plan")
    rollback = defer_module("khod.engine.rollback")
    history_trial = defer_module("khod.history.trial")
    preflight = defer_module("khod.preflight")
    preflight_facts = defer_module("khod.preflight.facts")
    preflight_handover = defer_module("khod.preflight.handover")
    preflight_trial = defer_module("khod.preflight.trial")
    session_holders = defer_module("khod.producers.session_holders")
    next_kernel = defer_module("khod.target.target")

T = TypeVar("T")
LOG = logging.getLogger(__name__)
NAMED = {"out": "outgoing tree", "in": "incoming tree", "snapshot": "snapshot"}
NO_TREE = {
    "out": "The kernel has one only in the active phase: khoctl activate",
    "in": "This kernel was not reached by a handover, or it handed nothing over.",
    "snapshot": "One is taken at activation: khoctl activate",
}
Pasts = Callable[[str], Awaitable["history_trial.Past"]]
"""Returns what the checks of an image are told of the past, by its digest; Failed if that cannot be read."""


def new_run() -> str:
    """Return a new id of a handover: twelve hex digits, which also mark the next kernel's command line."""
    return os.urandom(6).hex()


class Queries:
    """The read-only side of khod.

    `inhibitors` returns the function that lists the inhibitors at this time, or None.

    One class of this size: one method for each question of the interface, and what several of them share.
    """

    def __init__(
        self,
        transaction: Transaction,
        observer: Observer,
        registry: ProducerRegistry,
        restoration: Restoration,
        resources: Resources,
        *,
        inhibitors: Callable[[], Inhibitors | None],
        past: Pasts,
        signals: Signals,
        quiescence: Quiescence,
    ) -> None:
        self._transaction = transaction
        self._observer = observer
        self._registry = registry
        self._restoration = restoration
        self._sessions = resources.sessions
        self._store = resources.store
        self._kexec = resources.kexec
        self._workers = resources.workers
        self._settings = resources.settings
        self._scanner = resources.scanner
        self._health = resources.health
        self._verify = resources.verify
        self._inhibitors = inhibitors
        self._past = past
        self._busy = signals.busy
        self._known = signals.known
        self._started = signals.started
        self.sighted = SightedSessions()
        """LUO sessions of other processes, as they were last found."""
        self._quiescence = quiescence
        self._surveyed: Survey | None = None
        self._looking: asyncio.Future[SightedSessions] | None = None

    async def status(self) -> Status:
        """Return the state of the host, also while khod starts.

        The kernel is asked only while no operation is under way, and for at most deadlines.observe seconds, because
        reading `active` blocks while the kernel serializes. While the host is on its way into the next kernel nothing
        is asked: systemd stops khod then, and the caller would get no answer.
        """
        deadline = self._settings.current.deadlines.observe
        with suppress(TimeoutError):
            async with asyncio.timeout(deadline):
                await self._known.wait()
        busy = self._busy.locked() or self._transaction.phase is Phase.executing
        observed = None if busy else await self._observer.try_observe(deadline)
        sighted = self.sighted if busy else await self._sighted_within(deadline)
        try:
            producers = self._registry.status_rows(self.members)
        except ConfigError:  # khoctl check says which file
            producers = [member.to_model() for member in self.members]
        return status.build_status(
            self._transaction,
            self.effective_phase(observed),
            self._observer.last,
            self._observer.probed,
            producers,
            claims=[*(holder.name for holder in self._transaction.record.claims), *self.unknown_sessions],
            absent=[registered.name for registered in self.absent_producers],
            units=self._quiescence.awaited_units,
            sighted=sighted,
            stale=observed is None,
        )

    async def current_event(self) -> Event:
        """Return the state as an event, once it is known."""
        await self._known.wait()
        phase, record = self.effective_phase(self._observer.last), self._transaction.record
        return Event(time.monotonic(), phase, self._transaction.reason, record.run, at=time.time())

    async def producers(self) -> list[model.Producer]:
        """Return every producer with its last answer, in the order in which they are told."""
        return self._registry.status_rows(self.members)

    @property
    def members(self) -> list[Member]:
        """The producers that were told something in the attempt under way, or that take back what they left."""
        attempt = self._transaction.attempt
        return attempt.barrier.members if attempt else self._restoration.members

    @property
    def absent_producers(self) -> list[RegisteredProducer]:
        """Producers registered before khod was restarted that have not returned.

        Those of the attempt are left out: the attempt waits for them.
        """
        counted_on = {holder.name for holder in self._transaction.record.producers}
        return [registered for registered in self._registry.peers.absent_producers if registered.name not in counted_on]

    @property
    def unknown_sessions(self) -> list[str]:
        """The LUO sessions that khod was given and whose owner is in no record: they are kept."""
        record = self._transaction.record
        claimed = {session_of(record.arrived_run, holder.name) for holder in record.claims}
        own = set(self._sessions.of_run(record.run)) if record.run and record.run != record.arrived_run else set()
        return [name for name in self._sessions.session_names if name not in claimed | own]

    async def check(self, request: next_kernel.Request | None = None) -> list[Check]:
        """Run the preflight checks, with those of an image if one is given; nothing is changed."""
        async with self._inspect_target(request or next_kernel.Request()) as (_, checks):
            return checks

    async def plan(self, request: next_kernel.Request) -> Plan:
        """Return what a handover would do, and the results of its checks; nothing is changed."""
        async with self._inspect_target(request) as (target, checks):
            everyone, deadlines = self._registry.all_producers(), self._config_for(request).deadlines
            machine = self._transaction.machine if self._transaction.phase in HELD else Machine()
            survey = self._surveyed if self._quiescence.is_due(request, machine.done) else None
            steps = plan.plan_steps(
                machine, self._observer.require_kernel, everyone, deadlines, request, target, survey
            )
            words = target.words if target else []
            bound = rollback.bound_seconds(deadlines, everyone, deadlines.quiesce_undo if survey else 0.0)
            if target is None:
                return Plan(steps, checks, "", words, bound)
            release = target.apart.about.version if target.apart else ""
            digests = [image.digest for image in await self._list_images(target)]
            return Plan(steps, checks, target.cmdline, words, bound, release, digests)

    async def snapshots(self) -> list[model.Snapshot]:
        """Return the trees that were kept when they left, the newest first."""
        found = await self._ask_kernel(self._store.snapshots.list_snapshots, "listing the snapshots")
        return [replace(snapshot, outcome=self._came_to(snapshot)) for snapshot in found]

    def _came_to(self, snapshot: model.Snapshot) -> str:
        """Return the outcome of a snapshot's handover, as far as the record of this boot has it."""
        record, phase = self._transaction.record, self._transaction.phase
        if not snapshot.run:
            return ""
        if snapshot.run == record.arrived_run:
            return record.outcome.value
        if snapshot.run == record.run and phase not in RESTING:
            return phase.value
        here = self._observer.last is not None and snapshot.boot_id == self._observer.last.boot_id
        return "rolled_back" if here else ""

    async def scratch(self) -> list[Region]:
        """Return the memory regions into which the next kernel must fit."""
        await self._started.wait()
        return await self._ask_kernel(self._observer.require_kernel.scratch_regions, "reading scratch")

    async def tree(self, side: str) -> Tree:
        """Return a state tree: `out`, `in`, `snapshot` for the last one that left, or the id of one that was kept.

        If none has left yet, `snapshot` is the last one taken. v3 has an outgoing tree only while active. The kernel's
        thread reads it, because v3 deadlocks if it is read while another thread leaves the active phase. Refused if
        there is no such tree now, UsageError if the id is not known.
        """
        found: Tree | None = None
        if side == "snapshot":
            boot = self._observer.last.boot_id if self._observer.last else ""
            found = await self._ask_kernel(lambda: self._store.snapshots.last_tree(boot), "reading the snapshot")
        elif side in ("in", "out"):
            await self._started.wait()
            kernel = self._observer.require_kernel
            read = (
                kernel.arrived_tree
                if side == "in"
                else lambda: kernel.outgoing_tree() if kernel.is_active() is not False else None
            )
            try:
                deadline = self._settings.current.deadlines.activate
                found = await self._workers.kernel.call_within(read, "reading the tree", deadline)
            except OSError as error:
                raise Failed(f"The tree cannot be read: {error}", where=str(error.filename)) from error
        else:
            found = await self._ask_kernel(lambda: self._store.snapshots.read_tree(side), "reading the snapshot")
            if found is None:
                raise UsageError(
                    f"No such state tree: {side!r}",
                    where="TREE",
                    remedy="One of out, in, snapshot, or an id: khoctl dt list",
                )
        if found is None:
            raise Refused(f"There is no {NAMED[side]} now", remedy=NO_TREE[side])
        return found

    def effective_phase(self, observed: Observed | None) -> Phase:
        """Return the machine's phase, unless the kernel contradicts it."""
        phase = self._transaction.phase
        under_way = self._busy.locked() and phase not in RESTING | HELD
        if observed is None or under_way:
            return phase
        return reconcile.effective_phase(self._transaction.current_record(), observed)

    @property
    def can_jump_itself(self) -> bool:
        """Whether khod may call reboot(2) after a quiesce: systemd has no files of others to hand over."""
        return self._surveyed is not None and not self._surveyed.stores

    async def run_checks(
        self, observed: Observed, target: Target | None = None, *, request: next_kernel.Request | None = None
    ) -> list[Check]:
        """Run the checks of this host, or those of the next kernel if `target` is given.

        `observed` is the kernel's state, read before. Without a request there is neither a load nor a jump.
        """
        deadline = self._settings.current.deadlines.activate
        survey: Survey | KhoError | None = None
        if target is None:
            await self._find_sessions()
            if self._quiescence.is_due(request, self._transaction.machine.done):
                survey = await self._survey_host(request)
        current = self._transaction.current_record()
        phase = self.effective_phase(observed)
        foreign = reconcile.is_foreign(current, observed) or phase is Phase.inconsistent
        ask, config = self._inhibitors(), self._config_for(request)
        facts = preflight_facts.Facts(
            self._observer.probed,
            self._kexec,
            observed,
            self._store,
            config,
            self._transaction.record,
            foreign,
            self._registry.all_producers,
            None if target or ask is None else await ask(),
            target,
            outgoing=await self._outgoing_tree(observed) if target or config.producers.require_kernel else None,
            unknown_sessions=self.unknown_sessions,
            absent=self.absent_producers,
            sighted=self.sighted,
            now=request is not None and request.now,
            survey=survey,
            health=self._health.load_checks,
            past=await self._read_past(target),
        )
        return await self._workers.queries.call_within(lambda: preflight.run_checks(facts), "the checks", deadline)

    def _config_for(self, request: next_kernel.Request | None) -> Config:
        """Return the configuration for a request, under its terms or those of the handover under way."""
        terms = request.terms if request is not None else NO_TERMS
        if terms == NO_TERMS and self._transaction.phase in HELD:
            terms = self._transaction.record.terms
        return self._settings.under(terms)

    async def _survey_host(self, request: next_kernel.Request | None) -> Survey | KhoError:
        """Return what a quiesce would do, or why that is not known; `can_jump_itself` is of this."""
        self._surveyed = None
        try:
            self._surveyed = await self._quiescence.survey_host(request.units if request else ())
        except KhoError as error:
            return error
        return self._surveyed

    async def _read_past(self, target: Target | None) -> preflight_facts.PastFact | None:
        """Return what the history has for the checks of the next kernel; None without one."""
        if target is None:
            return None
        deadline = self._settings.current.deadlines.activate
        try:
            images = await self._list_images(target)
            return preflight_facts.PastFact(await run_within(deadline, self._past(history_trial.trial_digest(images))))
        except (KhoError, OSError, TimeoutError) as error:
            return preflight_facts.PastFact(None, str(error))
        except Exception as error:
            LOG.exception("The history could not be asked")
            return preflight_facts.PastFact(None, f"khod itself failed: {error!r}")

    async def _list_images(self, target: Target) -> list[ImageFacts]:
        """Return the files of the next kernel with their digests, which are computed once."""
        deadline = self._settings.current.deadlines.activate
        hashing = partial(preflight_trial.list_image_facts, target)
        return await self._workers.files.call_within(hashing, "hashing the image", deadline)

    async def _find_sessions(self) -> SightedSessions:
        """Find the LUO sessions of other processes, and keep them in `sighted`."""
        calls, own, deadline = (
            self._kexec.calls,
            lambda: self._sessions.session_names,
            self._settings.current.deadlines.activate,
        )
        try:
            found = await self._workers.queries.call_within(
                lambda: session_holders.find_sessions(calls, own, scanner=self._scanner),
                "looking for LUO sessions",
                deadline,
            )
        except (KhoError, OSError) as error:
            found = SightedSessions(unseen=str(error))
        except Exception as error:
            LOG.exception("LUO sessions could not be looked for")
            found = SightedSessions(unseen=f"khod itself failed: {error!r}")
        self.sighted = found
        return found

    async def _sighted_within(self, seconds: float) -> SightedSessions:
        """Return the sessions found within `seconds`, else those that were last found.

        systemd may be slow to answer; the search then continues.
        """
        if self._looking is None or self._looking.done():
            self._looking = asyncio.ensure_future(self._find_sessions())
        await asyncio.wait({self._looking}, timeout=seconds)
        if self._looking.done():
            return self._looking.result()
        return replace(self.sighted, unseen=f"to look for them takes longer than {seconds:g} s; ask again")

    async def _outgoing_tree(self, observed: Observed) -> Tree | None:
        """Return the outgoing tree, if the kernel has one now; the kernel's thread reads it, as v3 requires."""
        kernel = self._observer.probed.kernel
        if kernel is None or observed.active is False:
            return None
        try:
            deadline = self._settings.current.deadlines.observe
            return await self._workers.kernel.call_within(kernel.outgoing_tree, "reading the tree", deadline)
        except (KhoError, OSError):
            return None

    async def take_target(self, request: next_kernel.Request, observed: Observed, run: str) -> Target:
        """Return the next kernel of a request in memory, verified; Refused or UsageError if a file cannot be used."""
        config = self._settings.current
        return await next_kernel.take_target(
            self._workers.files,
            request,
            observed.cmdline,
            run,
            config.images,
            self._verify,
            enforce=config.checks.provenance not in ("warn", "off"),
        )

    async def _ask_kernel(self, function: Callable[[], T], what: str) -> T:
        return await self._workers.queries.call_within(function, what, self._settings.current.deadlines.activate)

    @asynccontextmanager
    async def _inspect_target(self, request: next_kernel.Request) -> AsyncIterator[tuple[Target | None, list[Check]]]:
        """Yield the next kernel of a request, which is closed afterwards, and the results of all checks."""
        await self._started.wait()
        observed = await self._observer.observe_kernel(self._settings.current.deadlines.activate)
        run = self._transaction.record.run or new_run()
        target, unusable = None, []
        if request.kernel:
            try:
                target = await self.take_target(request, observed, run)
            except Refused as error:  # an empty file, one too large: the other checks are reported all the same
                unusable = [
                    preflight.unusable_check("image" if error.where == request.kernel.name else "initrd", error)
                ]
        try:
            phase, current = self.effective_phase(observed), self._transaction.current_record()
            first = preflight_handover.check_handover(
                phase, current, busy=self._busy.locked(), takes_image=request.kernel is not None
            )
            of_host = await self.run_checks(observed, request=request)
            of_target = await self.run_checks(observed, target) if target else unusable
            yield target, [first, *of_host, *of_target]
        finally:
            if target is not None:
                target.close()
