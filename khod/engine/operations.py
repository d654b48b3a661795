# SPDX-License-Identifier: LGPL-2.1-or-later
"""The operations on a handover, one at a time: each moves the handover forward, or rolls it back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from khod import model
from khod.config import Settings
from khod.deferred import defer_module
from khod.engine.admission import Admission
from khod.engine.attempts import Attempts, Watcher
from khod.engine.background import Background
from khod.engine.cold_boot import BootEnds, ColdBootInquiry
from khod.engine.guard import Seen
from khod.engine.history import HISTORY_FILE, STOPPED, HistoryService
from khod.engine.interruptions import Interruptions
from khod.engine.judgement import Judgement
from khod.engine.jump import Jump
from khod.engine.lifecycle import Start, Stop
from khod.engine.observer import Observer
from khod.engine.producer_operations import ProducerOperations
from khod.engine.queries import Pasts, Queries, new_run
from khod.engine.quiescence import Quiescence
from khod.engine.recorder import NO_SOURCES, Recorder, Sources
from khod.engine.resources import Resources, is_up
from khod.engine.restoration import Restoration
from khod.engine.signals import Signals
from khod.engine.transaction import Transaction
from khod.engine.turn import Turn
from khod.engine.verification import Verification
from khod.engine.watchdog import JumpWatchdog
from khod.engine.way_back import WayBack
from khod.errors import KhoError, NotRolledBack, Refused
from khod.handover.machine import RESTING, Machine
from khod.handover.record import Owner, Process, Record, Store
from khod.kernel.kexec import Kexec
from khod.kernel.next_arg import is_switched_on
from khod.kernel.probe import Probed
from khod.kernel.thread import Workers
from khod.model import NO_TERMS, Event, Phase, Step, Terms
from khod.producers.barrier import Participant
from khod.producers.children import Children
from khod.producers.health import HealthChecks
from khod.producers.peer import Peer, Registration
from khod.producers.peers import Peers
from khod.producers.registrations import Registrations
from khod.producers.registry import ProducerRegistry
from khod.producers.session_scan import Scanner, scan_processes
from khod.producers.sessions import Sessions
from khod.systemd.logind import Inhibitors
from khod.systemd.shutdown import Executor, Shutdown
from khod.systemd.watchdog import ManagerWatchdogs

if TYPE_CHECKING:
    from khod.engine import attempt as attempt_module
    from khod.engine.attempt import Attempt
    from khod.history.model import AttemptRecord
    from khod.provenance import verify as provenance
    from khod.quiesce.host import Host
    from khod.target.target import Request, Verify
else:
    attempt_module = defer_module("khod.engine.attempt")
    provenance = defer_module("khod.provenance.verify")

NOWHERE = Path("/nonexistent")
"""A root without files of the operator."""


class Engine:
    """The handover of one host. `tell` is called with every change, in the event loop.

    `shutdown` asks systemd whether the host is on its way into the kexec; without it that is not known. `goes_down`
    asks whether the host is shut down in any way, `host_up` waits as in Resources. `make_host` returns what the step
    quiesce stops. `remember` takes each attempt at its end, with facts of `sources`, and `past` returns what the checks
    of an image are told of the past; without them the history does. `health` has the operator's checks, none by
    default, and `verify` finds out who made the files of the next kernel, by default on a host without keys.

    One class of this size: most of it wires the parts, each of which hears of several others.
    """

    def __init__(
        self,
        kexec: Kexec,
        prober: Callable[[], Probed],
        store: Store,
        settings: Settings,
        *,
        producers: Callable[[], list[Participant]],
        sessions: Sessions,
        guard: Callable[[Callable[[Seen], None]], Watcher],
        orderly: Executor,
        immediate: Executor,
        tell: Callable[[Event], None],
        inhibitors: Inhibitors | None = None,
        shutdown: Shutdown | None = None,
        goes_down: Callable[[], Awaitable[bool]] | None = None,
        host_up: Callable[[], Awaitable[None]] = is_up,
        workers: Workers | None = None,
        registrations: Registrations | None = None,
        scanner: Scanner = scan_processes,
        health: HealthChecks | None = None,
        verify: Verify | None = None,
        boot_ends: BootEnds | None = None,
        past: Pasts | None = None,
        watchdogs: ManagerWatchdogs | None = None,
        remember: Callable[[AttemptRecord], Awaitable[None]] | None = None,
        sources: Sources = NO_SOURCES,
        make_host: Callable[[], Host] | None = None,
    ) -> None:
        self.settings = settings
        self._executors = {False: orderly, True: immediate}
        self._inhibitors = inhibitors
        self._background = background = Background()
        self._signals = signals = Signals()
        self._resources = resources = Resources(
            kexec,
            store,
            workers or Workers(),
            settings,
            sessions,
            scanner,
            health or HealthChecks(NOWHERE, Children()),
            verify or (lambda *asked: provenance.verify_files(NOWHERE, Children(), *asked)),
            shutdown,
            host_up,
        )
        self.history = HistoryService(
            store.directory / HISTORY_FILE,
            settings,
            resources.workers.history,
            is_stopped=lambda: self._transaction.phase in STOPPED,
        )

        def note_and_tell(event: Event) -> None:
            recorder.note_event(event)
            tell(event)

        async def note_and_remember(attempt: AttemptRecord) -> None:
            await transaction.note_timeline(attempt.summary.run, attempt.timeline)
            await judgement.judge_again(attempt.summary.run)
            await (remember or self.history.remember)(attempt)

        self._recorder = recorder = Recorder(
            store.directory,
            resources.workers,
            kexec,
            lambda: self.record,
            background.spawn_task,
            note_and_remember,
            replace(
                sources,
                read_cold_boot=lambda: inquiry.explain_boot(),
                knows=sources.knows or self.history.knows,
            ),
        )
        # The lambdas name parts that are made further down: each hears of the other.
        watcher = guard(lambda seen: interruptions.on_device_event(seen))
        self._transaction = transaction = Transaction(
            store,
            resources.workers.disk,
            note_and_tell,
            watcher.process_pending,
            goes_down,
            recorder.write_pending,
        )
        inquiry = ColdBootInquiry(transaction, kexec.calls, boot_ends)
        peers = Peers(
            sessions,
            lambda peer: interruptions.on_peer_left(peer),
            lambda peer: interruptions.on_peer_came(peer),
            registrations,
            lambda error: interruptions.on_unkept_registration(error),
            lambda peer: restoration.restore_late(peer),
        )
        self.registry = registry = ProducerRegistry(producers, peers)
        self._observer = observer = Observer(kexec, prober, resources.workers)
        verification = Verification(transaction, resources)
        self._quiescence = quiescence = Quiescence(make_host, settings, registry, lambda: self._inhibitors)
        judgement = Judgement(transaction, recorder)
        restoration = Restoration(
            transaction,
            registry,
            verification,
            resources,
            signals=signals,
            spawn=background.spawn_task,
            judgement=judgement,
        )
        self.queries = queries = Queries(
            transaction,
            observer,
            registry,
            restoration,
            resources,
            inhibitors=lambda: self._inhibitors,
            past=past or self.history.past,
            signals=signals,
            quiescence=quiescence,
        )
        self._attempts = attempts = Attempts(
            transaction,
            observer,
            registry,
            watcher,
            JumpWatchdog(transaction, resources, watchdogs),
            resources,
            quiescence,
        )
        self._turn = turn = Turn(transaction, attempts, restoration, queries, signals)
        self._jump = jump = Jump(transaction, settings, turn.give_up_jump)
        interruptions = Interruptions(transaction, turn, jump, restoration, background)
        self._way_back = way_back = WayBack(
            transaction, attempts, turn, jump, queries, observer, registry, resources, signals
        )
        self._producer_operations = ProducerOperations(
            transaction, turn, registry, queries, restoration, attempts, observer, resources
        )
        self._admission = Admission(transaction, queries, observer, registry, resources, recorder)
        self._start = Start(
            transaction, observer, peers, attempts, restoration, jump, inquiry, background, resources, signals, recorder
        )
        self._stop = Stop(transaction, peers, attempts, way_back, jump, background, signals)

    @property
    def machine(self) -> Machine:
        """The machine of the handover."""
        return self._transaction.machine

    @property
    def record(self) -> Record:
        """The record of the handover."""
        return self._transaction.record

    @property
    def waiting_producers(self) -> list[str]:
        """The names of the producers whose answers are awaited."""
        return [member.producer.name for member in self.queries.members if member.is_waiting]

    @property
    def at_rest(self) -> bool:
        """Whether khod holds nothing, and no producer has anything to take back."""
        waiting = self.record.claims or self.queries.unknown_sessions
        return self._transaction.phase in RESTING and not waiting

    # Start and stop

    async def start(self) -> None:
        """Compare the record with the kernel and act on the result; operations wait for that, questions do not.

        Raises the error of a rollback that failed. The host is served all the same.
        """
        await self._start.start_engine()

    async def stop(self, *, jumping: bool | None, going_down: bool = False) -> None:
        """Stop: roll back what is held, unless the host is on its way into the kexec, as Stop.stop_engine says."""
        await self._stop.stop_engine(jumping=jumping, going_down=going_down)

    # Operations

    async def activate(self, *, by: str = "") -> None:
        """Bring producers and kernel to `active`; a failure rolls back everything. `by` is the caller, for people."""
        async with self._one_attempt(by):
            await self._open_attempt(await self._admission.check_may_start(None, by=by))
            await self._transaction.run_steps(self._attempts.remaining_steps(Step.activate), hold=False)

    async def kexec(self, request: Request, *, by: str = "") -> None:
        """Take the remaining steps up to the jump or, with `load_only`, up to the loaded image.

        `by` names the caller, for people. NotRolledBack if the jump may still happen, so that nothing was undone.
        """
        async with self._one_attempt(by, request.terms):
            record = await self._admission.check_may_start(request, by=by)
            target = await self._admission.build_target(request, record.run)
            attempt: Attempt | None = None
            try:
                if target is not None:
                    await self._admission.check_target(target)
                quiesces = self._quiescence.is_due(request, self.machine.done)
                at_once = not request.load_only and (request.now or (quiesces and self.queries.can_jump_itself))
                attempt = await self._open_attempt(record, at_once=at_once)
                self._transaction.note_terms(request.terms)
                if target is not None:
                    how = ", to jump at once (`now`)" if request.now and not request.load_only else ""
                    # If the operator has relaxed the check, files may be lost.
                    strict = self.settings.current.checks.formats not in ("warn", "off")
                    luo_off = strict and not is_switched_on(target.booted_line, "liveupdate")
                    about = target.apart.about if target.apart else None
                    self._transaction.note_target(
                        f"{target.describe()}{how}",
                        luo_off=luo_off,
                        release=about.version if about else "",
                        banner=about.banner if about else "",
                    )
                    await self._transaction.cancellation.wait_interruptibly(
                        self._recorder.note_target(target, at_once=at_once)
                    )
                attempt.set_target(target, self._executors[at_once], self._executors[False], request.units)
                if at_once:
                    # Most dirty pages are written before any producer is frozen; the executor's own sync then has
                    # little left.
                    await self._transaction.cancellation.wait_interruptibly(
                        self._resources.workers.files.call_within(
                            self._resources.kexec.sync_disks, "sync(2)", self.settings.current.deadlines.execute
                        )
                    )
                last = Step.load if request.load_only else Step.execute
                self._admission.check_window()
                if last is Step.execute:  # before the first step: nobody is frozen yet, unless an earlier call did that
                    await self._attempts.watchdog.arm(at_once=at_once)
                    if at_once:
                        await self._quiescence.guard_filesystems()
                await self._transaction.run_steps(
                    self._attempts.remaining_steps(last, quiesces=quiesces), hold=request.hold
                )
            except attempt_module.JumpUnderWay as error:
                raise NotRolledBack(error.what, where=error.where, remedy=error.remedy) from error
            finally:
                if attempt is not None:
                    attempt.drop_target()
                elif target is not None:
                    target.close()
                if self._transaction.phase is Phase.executing:
                    self._background.spawn_task(self._jump.watch_attempt(self._attempts.current_attempt()))
                else:
                    await self._quiescence.release_filesystems()
                    await self._attempts.watchdog.disarm()

    @asynccontextmanager
    async def _one_attempt(self, by: str, terms: Terms = NO_TERMS) -> AsyncIterator[None]:
        """Run one operation that begins a handover or goes on with it; a refusal before its first step is logged."""
        async with self._turn.one_operation():
            ended = self._transaction.rollbacks
            try:
                yield
            except KhoError as error:
                at_rest = self._transaction.phase in RESTING and self._transaction.rollbacks == ended
                if at_rest and (observed := self._observer.last) is not None:
                    record = self.record.begin_run(new_run(), observed, self.record.generation, by, terms)
                    self._background.spawn_task(self._recorder.refuse_run(record, observed, error))
                raise

    async def _open_attempt(self, record: Record, *, at_once: bool = False) -> Attempt:
        """Continue the attempt of this record, or begin it."""
        if record.run != self.record.run:
            about = record.run, record.boot_id, record.release, record.generation
            await self._transaction.cancellation.wait_interruptibly(
                self._resources.workers.disk.call_within(
                    lambda: self._resources.store.snapshots.prepare_snapshot(*about, self.settings.current.snapshots),
                    "making room for the snapshot",
                    self.settings.current.deadlines.prepare,
                )
            )
            self._transaction.begin_run(record)
            await self._recorder.begin_run(record, self._observer.require_last)
        self._transaction.note_sessions(self.queries.sighted, at_once=at_once)
        attempt = self._attempts.current_attempt()
        self._attempts.watch_devices(attempt)
        return attempt

    async def abort(self, *, force: bool = False, by: str = "") -> None:
        """Roll everything back; with `force` also what khod did not do, or cannot know. `by` names the caller."""
        await self._way_back.abort(force=force, by=by)

    async def forget_producer(self, name: str) -> None:
        """Free what a producer left before the jump, or stop expecting it back after a restart of khod.

        `name` may also be a LUO session of unknown owner. Refused if there is nothing of this name.
        """
        await self._producer_operations.forget_producer(name)

    async def retry_producer(self, name: str) -> None:
        """Tell a producer of any kind again to take back what it left before the jump; Refused if it does not."""
        await self._producer_operations.retry_producer(name)

    async def rehearse_producer(self, name: str) -> list[model.Producer]:
        """Take one producer through prepare, freeze, thaw and cancel, without the kernel; return its answers."""
        return await self._producer_operations.rehearse_producer(name)

    async def register_producer(self, name: str, owner: Owner, process: Process, terms: Registration) -> Peer:
        """Register a producer that has connected; it takes part from the next step on."""
        await self._signals.known.wait()
        await self.registry.peers.wait_hung_up(name)
        if self._transaction.phase is Phase.executing and not self.registry.peers.is_awaiting(name):
            raise Refused("The host is on its way into the next kernel", where=name, remedy="Connect again there.")
        return self.registry.register_peer(name, owner, process, terms, self.settings.current.producers.max_per_user)
