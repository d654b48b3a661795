# SPDX-License-Identifier: LGPL-2.1-or-later
"""The operations on a handover, one at a time: each moves the handover forward, or rolls it back."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, Protocol, TypeVar

from khod import model, preflight
from khod.concurrency.worker import Worker
from khod.config import Settings
from khod.engine import status
from khod.engine.attempt import Attempt, JumpUnderWay
from khod.engine.guard import Seen, Severity
from khod.engine.jump import Jump
from khod.engine.observer import Observer
from khod.engine.queries import Inhibitors, Queries, new_run
from khod.engine.recorder import NO_SOURCES, Recorder, Sources
from khod.engine.restoration import Restoration
from khod.engine.rollback import bound_seconds
from khod.engine.startup import Startup
from khod.engine.transaction import Transaction, told_error
from khod.errors import (
    Aborted,
    AlreadyLoaded,
    Busy,
    DeviceChanged,
    Failed,
    KhoError,
    NoKernelGiven,
    NotRolledBack,
    ProducerGone,
    Refused,
)
from khod.handover import reconcile
from khod.handover.machine import HELD, RESTING, Machine, remaining_steps
from khod.handover.record import Owner, Process, Record, Store
from khod.history.model import AttemptRecord
from khod.kernel.kexec import Kexec
from khod.kernel.next_arg import is_switched_on
from khod.kernel.probe import Probed
from khod.kernel.thread import Workers
from khod.model import Check, Event, EventKind, Observed, Phase, Step
from khod.preflight.handover import JUMP_OR_BEGIN_AGAIN, WAIT
from khod.producers.barrier import Barrier, Member, Participant, Verb
from khod.producers.peer import Peer, Registration
from khod.producers.peers import Peers
from khod.producers.registrations import Registrations
from khod.producers.registry import ProducerRegistry
from khod.producers.session_scan import Scanner, scan_processes
from khod.producers.sessions import Sessions, session_of
from khod.systemd.shutdown import Executor, Shutdown
from khod.target.target import Request, Target, take_target

T = TypeVar("T")
LOG = logging.getLogger(__name__)
SHUTDOWN_QUESTIONS = 3
"""How often systemd is asked whether the host goes down if it does not answer: during a shutdown it may be busy."""


class Watcher(Protocol):
    """What watches the host's devices: `khod.engine.guard.Guard`."""

    def start(self, abort: Iterable[str], record: Iterable[str], devices: Mapping[str, Iterable[str]]) -> None:
        """Watch from now on for devices of these subsystems, and for those of the producers."""

    def stop(self) -> None:
        """Stop watching."""

    def process_pending(self) -> None:
        """Report the events that wait, at once."""


async def _forget_attempt(_attempt: AttemptRecord) -> None:
    """Remember nothing."""


class Engine:
    """The handover of one host. `tell` is called with every change, in the event loop.

    `shutdown` asks systemd whether the host is on its way into the kexec; without it that is not known. `goes_down`
    asks whether the host is shut down in any way. `remember` takes each attempt at its end, with facts of `sources`.

    One class of this size: every operation takes the same lock and drives the same transaction, and what ends a
    handover from outside must know which operation is under way.
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
        thread: Worker,
        tell: Callable[[Event], None],
        inhibitors: Inhibitors | None = None,
        shutdown: Shutdown | None = None,
        goes_down: Callable[[], Awaitable[bool]] | None = None,
        workers: Workers | None = None,
        registrations: Registrations | None = None,
        scanner: Scanner = scan_processes,
        remember: Callable[[AttemptRecord], Awaitable[None]] = _forget_attempt,
        sources: Sources = NO_SOURCES,
    ) -> None:
        self.settings = settings
        self._guard = guard(self._on_device_event)
        self._kexec = kexec
        self._store = store
        self._sessions = sessions
        self._executors = {False: orderly, True: immediate}
        self._thread = thread
        self._inhibitors = inhibitors
        self._shutdown = shutdown
        self._workers = workers or Workers(kernel=thread)
        self._busy = asyncio.Lock()
        self._known = asyncio.Event()
        """Set when the state of the host is known, and which producers may return. From then on producers register: a
        rollback at the start waits for them."""
        self._started = asyncio.Event()
        self._background: set[asyncio.Task[Any]] = set()
        self._recorder = recorder = Recorder(
            store.directory,
            self._workers.disk,
            self._workers.queries,
            kexec,
            lambda: self.record,
            self._spawn_task,
            remember,
            sources,
        )

        def record_and_tell(event: Event) -> None:
            recorder.note_event(event)
            tell(event)

        self._transaction = Transaction(
            store,
            self._workers.disk,
            record_and_tell,
            self._guard.process_pending,
            goes_down,
            recorder.write_pending,
        )
        peers = Peers(
            sessions,
            self._peer_left,
            self._peer_came,
            registrations,
            self._on_unkept_registration,
            self._peer_answered_late,
        )
        self.registry = ProducerRegistry(producers, peers)
        self._observer = Observer(kexec, prober, self._workers)
        self._restoration = Restoration(
            self._transaction,
            self.registry,
            store,
            kexec,
            self._workers,
            settings,
            scanner=scanner,
            busy=self._busy,
            spawn=self._spawn_task,
            recorder=recorder,
        )
        self._startup = Startup(self._transaction, self._observer, peers, store, kexec, self._workers, settings)
        self._jump = Jump(self._transaction, settings, self._give_up_jump)
        self.queries = Queries(
            self._transaction,
            self._observer,
            self.registry,
            self._restoration,
            sessions,
            store,
            kexec,
            self._workers,
            settings=settings,
            scanner=scanner,
            inhibitors=lambda: self._inhibitors,
            busy=self._busy,
            known=self._known,
            started=self._started,
        )

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
        try:
            async with self._busy:
                await self._start_engine()
        finally:
            self._known.set()
            self._started.set()

    async def _start_engine(self) -> None:
        self._recorder.note_start()
        found, observed, note = await self._startup.find_out()
        self._known.set()
        lacking = "" if self._observer.probed.kernel else f"no handover is possible: {self._observer.probed.what}"
        if found.action is reconcile.Action.verify or found.phase not in RESTING:
            self._recorder.adopt_run(self.record, observed, arrived=found.action is reconcile.Action.verify)
        elif found.phase is Phase.cold_boot and (left := self._startup.record_before(observed)) is not None:
            self._recorder.conclude_cold_boot(left, observed, found.reason)
        self._transaction.emit_event(found.reason or lacking or "khod started")
        try:
            match found.action:
                case reconcile.Action.verify:
                    await self._restoration.begin_restoration(observed, self._observer.probed.kernel, found.doubt, note)
                case reconcile.Action.roll_back:
                    if not await self._still_jumps(found.phase, observed):
                        await self._roll_back(Failed(found.reason))
                case reconcile.Action.resume:
                    self._watch_devices(self._current_attempt())
                case reconcile.Action.none if found.phase in RESTING:
                    await self._transaction.try_write_record(departure_served=True)
        finally:
            self._close_stray_sessions(observed)

    async def _still_jumps(self, phase: Phase, observed: Observed) -> bool:
        """Return whether the jump that an earlier khod requested may still come; if so, it is watched."""
        if phase is not Phase.executing or not observed.loaded or self._shutdown is None:
            return False
        if (down := await self._current_attempt().goes_down()) is False:
            return False
        self._transaction.emit_event(
            "the host is on its way into the next kernel: nothing is undone"
            if down
            else "systemd does not say whether the host is on its way into the next kernel: nothing is undone. "
            "If systemctl list-jobs shows no kexec.target: `Abort(force)`"
        )
        self._spawn_task(self._jump.watch_attempt(self._current_attempt()))
        return True

    def _close_stray_sessions(self, observed: Observed) -> None:
        """Close outgoing sessions that a handover of this boot left behind, of a producer that was never told anything.

        Other sessions are kept. A session from the previous kernel ends by `finish` or `forget`. A session whose owner
        is in no record stays, and is listed.
        """
        record = self.record
        ours = record.run not in ("", record.arrived_run) and record.boot_id == observed.boot_id
        if not ours or self._transaction.phase is Phase.inconsistent:
            return
        wanted = {session_of(record.run, holder.name) for holder in record.producers}
        if stray := [session for session in self._sessions.of_run(record.run) if session not in wanted]:
            for session in stray:
                self._sessions.close_session(session)
            self._transaction.emit_event(f"closed {len(stray)} LUO sessions that no producer was told of")

    async def stop(self, *, jumping: bool | None, going_down: bool = False) -> None:
        """Stop: roll back what is held, unless the host is on its way into the kexec (`jumping`).

        Another program may have requested the jump: with an image loaded, systemd 262 makes a kexec even of a plain
        `systemctl reboot`. Then the handover is completed up to the jump; if that fails, the image is unloaded and the
        host boots cold. If systemd does not say (None), the question is whether khod itself requested the jump: a
        rollback during a jump would lose the state for good. With `going_down` the host is shut down in any case: the
        record then says in which phase.
        """
        self.registry.peers.stop_remembering()
        if self._transaction.phase is Phase.verifying:
            for task in self._background:  # the next khod tells it again to those that did not finish
                task.cancel()
            return
        if jumping is None:
            jumping = self._transaction.phase is Phase.executing
        if jumping and Step.load in self.machine.done:
            await self._go_along()
            return
        if self._jump.in_kernel:
            return  # reboot(2) has not returned: nothing may be undone, and it cannot be waited for
        if self._busy.locked() or self._transaction.phase in HELD | {Phase.executing}:
            stopped = Failed("khod was stopped in the middle of a handover", where="abort")
            await self._end_and_undo(stopped, stopping=True, down=going_down)
        await self._transaction.settle_shutdown_note()
        await self._transaction.settle_record()

    async def _go_along(self) -> None:
        """The host goes into the kexec: bring the handover to where it may jump, or unload the image."""
        under_way = self._transaction.phase
        self._jump.go_along()
        async with self._busy:  # the operation under way ends first: at the jump it has requested, or rolled back
            with suppress(KhoError):
                if self._transaction.phase in HELD:
                    steps = remaining_steps(self.machine, self._observer.require_kernel.order, Step.execute)[:-1]
                    await self._transaction.run_steps(steps, hold=False)
                if self._transaction.phase in HELD:
                    await self._transaction.record_departure()
            if self._transaction.phase in RESTING:  # it was rolled back, and the host boots cold
                await self._transaction.note_interrupted(under_way)
        if self._transaction.phase is Phase.executing:
            await self._current_attempt().barrier.make_way()

    # Operations

    async def activate(self, *, by: str = "") -> None:
        """Bring producers and kernel to `active`; a failure rolls back everything. `by` is the caller, for people."""
        async with self._one_attempt(by):
            await self._open_attempt(await self._check_may_start(None, by=by))
            await self._transaction.run_steps(self._remaining_steps(Step.activate), hold=False)

    async def kexec(self, request: Request, *, by: str = "") -> None:
        """Take the remaining steps up to the jump or, with `load_only`, up to the loaded image.

        `by` names the caller, for people. NotRolledBack if the jump may still happen, so that nothing was undone.
        """
        async with self._one_attempt(by):
            record = await self._check_may_start(request, by=by)
            target = await self._build_target(request, record.run)
            attempt: Attempt | None = None
            try:
                if target is not None:
                    await self._check_target(target)
                attempt = await self._open_attempt(record, at_once=request.now and not request.load_only)
                if target is not None:
                    how = ", to jump at once (`now`)" if request.now and not request.load_only else ""
                    # If the operator has relaxed the check, files may be lost.
                    strict = self.settings.current.checks.formats not in ("warn", "off")
                    luo_off = strict and not is_switched_on(target.booted_line, "liveupdate")
                    self._transaction.note_target(f"{target.describe()}{how}", luo_off=luo_off)
                    await self._interruptible(self._recorder.note_target(target, at_once=request.now))
                attempt.set_target(target, self._executors[request.now])
                if request.now:
                    # Most dirty pages are written before any producer is frozen; the executor's own sync then has
                    # little left.
                    await self._interruptible(
                        self._workers.files.call_within(
                            self._kexec.sync_disks, "sync(2)", self.settings.current.deadlines.execute
                        )
                    )
                last = Step.load if request.load_only else Step.execute
                await self._transaction.run_steps(self._remaining_steps(last), hold=request.hold)
            except JumpUnderWay as error:
                raise NotRolledBack(error.what, where=error.where, remedy=error.remedy) from error
            finally:
                if attempt is not None:
                    attempt.drop_target()
                elif target is not None:
                    target.close()
                if self._transaction.phase is Phase.executing:
                    self._spawn_task(self._jump.watch_attempt(self._current_attempt()))

    async def abort(self, *, force: bool = False, by: str = "") -> None:
        """Roll everything back; with `force` also what khod did not do, or cannot know. `by` names the caller."""
        await self._wait_started()
        if self._transaction.phase is Phase.verifying:
            raise Refused("Producers are taking back what they left, which has no undo", remedy="khoctl verify")
        if self._transaction.phase is Phase.executing:
            await self._jump.check_may_be_called_back(self._current_attempt(), force=force)
        await self._end_and_undo(
            Aborted(f"The handover was aborted{f' by {by}' if by else ''}", where="abort"), force=force
        )

    async def _end_and_undo(
        self, cause: KhoError, *, force: bool = False, stopping: bool = False, down: bool = False
    ) -> None:
        """End and roll back the operation under way; only then ask the kernel, which may hang, and undo the rest."""
        under_way, ended = self._transaction.phase, self._transaction.rollbacks
        if self._busy.locked():
            self._transaction.cancel(cause)
        async with self._at_work():
            if under_way is Phase.rolling_back and self._transaction.rollbacks > ended and not down:
                if self._transaction.rollback_error is not None:  # the requested rollback was already under way
                    raise self._transaction.rollback_error
                return
            try:
                await self._put_back(cause, under_way, force=force, stopping=stopping, down=down)
            finally:  # even if this was refused, another cause may have come to end the handover
                await self._act_on_cause(quiet=True)

    async def _put_back(self, cause: KhoError, under_way: Phase, *, force: bool, stopping: bool, down: bool) -> None:
        if down and self._transaction.phase in RESTING and under_way not in RESTING:
            await self._transaction.note_interrupted(under_way)
        if failure := self._transaction.failure_after(cause):
            raise failure  # the operation under way has rolled back for this cause, but not everything
        if self._transaction.cause is cause:
            self._transaction.settle_cancel()  # it found nothing to end; any other cause must still be acted on
        observed = await self._observer.try_observe(self.settings.current.deadlines.observe)
        phase = self.queries.effective_phase(observed)
        foreign = observed is not None and reconcile.is_foreign(self._transaction.current_record(), observed)
        unrecorded = force and phase in RESTING and not self.record.run
        if phase is Phase.inconsistent or foreign or unrecorded:
            await self._take_over(phase, observed, force=force)
        elif phase in RESTING:
            self._transaction.settle_cancel()
            return
        elif phase is Phase.failed:
            self._transaction.attach_attempt(None)  # a producer's file may have been repaired since
        elif phase in HELD and Step.load in self.machine.done and not stopping:
            await self._jump.refuse_on_the_way(self._current_attempt())
        elif phase is Phase.executing:  # the request for the jump may have succeeded meanwhile
            await self._jump.check_may_be_called_back(self._current_attempt(), force=force or stopping)
        await self._roll_back(None, interrupted=phase if down else None, because=cause if stopping else None)

    async def _take_over(self, phase: Phase, observed: Observed | None, *, force: bool) -> None:
        """Take over what khod did not do, or what its record does not fully describe; Refused without `force`."""
        kernel = "the kernel was not asked" if observed is None else reconcile.describe_kernel(observed)
        if not force:
            raise Refused(
                f"khod did not do this, or cannot tell: {self._transaction.reason or phase.value}; {kernel}",
                where=phase.value,
                remedy="To put it back all the same: `Abort(force)`",
            )
        shown = observed or Observed("", "", active=True, loaded=True, arrived=False, cmdline="")
        unknown = phase is Phase.inconsistent or not self.record.boot_id or not self.record.run
        steps = reconcile.steps_to_undo(self.machine.done, shown, told=unknown)
        note = ""
        if self._transaction.phase is Phase.inconsistent:
            with suppress(KhoError):  # if this fails, a new record replaces it
                kept = await self._workers.disk.call_within(
                    self._store.set_aside, "keeping the record", self.settings.current.deadlines.observe
                )
                note = f"The record could not be read; it is kept as {kept}." if kept else ""
        taken = Phase.inconsistent if phase is Phase.inconsistent else Phase.foreign
        self._transaction.adopt_steps(taken, steps, shown, note)
        self._transaction.attach_attempt(None)

    async def forget_producer(self, name: str) -> None:
        """Free what a producer left before the jump, or stop expecting it back after a restart of khod.

        `name` may also be a LUO session of unknown owner. Refused if there is nothing of this name.
        """
        async with self._one_operation():
            record = self.record
            claims = tuple(holder for holder in record.claims if holder.name != name)
            if len(claims) < len(record.claims):
                await self._interruptible(
                    self.registry.peers.forget_claim(name, self.settings.current.deadlines.activate)
                )
                await self._transaction.note_claims(claims)
                self._transaction.emit_event(f"what {name} left is freed")
            elif name in self.queries.unknown_sessions:
                await self._interruptible(self._sessions.drop_session(name, self.settings.current.deadlines.activate))
                self._transaction.emit_event(f"the LUO session {name} is freed")
            elif self.registry.peers.give_up(name):
                self._transaction.emit_event(f"{name} is not expected to come back any more")
            else:
                raise Refused(
                    f"Producer {name} left nothing that waits for it, and is not expected back",
                    where=name,
                    remedy="khoctl check names those that are.",
                )

    async def retry_producer(self, name: str) -> None:
        """Tell a producer of any kind again to take back what it left before the jump; Refused if it does not."""
        async with self._one_operation():
            claim = next((holder for holder in self.record.claims if holder.name == name), None)
            if claim is None or self._transaction.phase not in RESTING:
                raise Refused(
                    f"Producer {name} left nothing that waits for it"
                    if claim is None
                    else f"A handover is under way ({self._transaction.phase.value}): nothing is given back meanwhile",
                    where=name,
                    remedy="khoctl status names those that something waits for." if claim is None else "khoctl status",
                )
            await self._restoration.retry_restore(claim)

    async def rehearse_producer(self, name: str) -> list[model.Producer]:
        """Take one producer through prepare, freeze, thaw and cancel, without the kernel; return its answers."""
        async with self._one_operation():
            observed = await self._interruptible(self._observe_kernel())
            if self._transaction.phase not in RESTING:
                raise Refused(
                    f"A producer cannot be tested now ({self._transaction.phase.value})",
                    remedy="khoctl status says more.",
                )
            if self.record.claims:
                raise Refused(
                    "Producers have not taken back what they left before the jump: a test could lose it",
                    where=", ".join(holder.name for holder in self.record.claims),
                    remedy="Start them first, or: khoctl producers forget NAME",
                )
            producer, answers = self.registry.find_producer(name), list[model.Producer]()

            def on_changed(member: Member) -> None:
                self._transaction.on_member_changed(member)
                if not member.is_waiting:
                    answers.append(member.to_model())

            record = self.record.begin_run(new_run(), observed, self.record.generation)
            try:
                with self._transaction.drive_aside(record):
                    self._transaction.attach_attempt(
                        self._new_attempt(Barrier.from_producers([producer], record.run, on_changed))
                    )
                    await self._transaction.run_steps((Step.prepare, Step.freeze), hold=False)
                    await self._transaction.roll_back(None, said="the test is over")
            finally:
                await self._transaction.try_write_record()
            return answers

    # Producers that connect

    async def register_producer(self, name: str, owner: Owner, process: Process, terms: Registration) -> Peer:
        """Register a producer that has connected; it takes part from the next step on."""
        await self._known.wait()
        if self._transaction.phase is Phase.executing and not self.registry.peers.is_awaiting(name):
            raise Refused("The host is on its way into the next kernel", where=name, remedy="Connect again there.")
        return self.registry.register_peer(name, owner, process, terms, self.settings.current.producers.max_per_user)

    def _peer_came(self, peer: Peer) -> None:
        where = peer.owner.unit or "no unit"
        self._transaction.emit_event(
            f"producer {peer.name} registered (user {peer.owner.uid}, {where})",
            EventKind.producer_waits,
            producer=Member(peer).to_model(),
        )
        if peer.claim.is_restoring and self._transaction.phase is not Phase.verifying:
            self._peer_answered_late(peer)

    def _peer_answered_late(self, peer: Peer) -> None:
        self._restoration.restore_late(peer)

    def _peer_left(self, peer: Peer) -> None:
        gone = Member(peer).to_model()
        self._transaction.emit_event(f"producer {peer.name} disconnected", EventKind.producer_waits, producer=gone)
        told = peer.claim.told
        if told is None or peer.claim.is_restoring:
            return
        cause = ProducerGone(
            f"Producer {peer.name} went away after it was told to {told.value}: its connection ended",
            kind=peer.kind,
            producer=peer.name,
            verb=told.value,
            remedy="Look why it ended, then begin again.",
        )
        attempt = self._transaction.attempt
        if attempt is not None and told is Verb.freeze and Step.load in self.machine.done:
            judgement = asyncio.ensure_future(self._judge_departure(attempt, cause))
            self._transaction.wait_for_judgement(judgement)
        else:
            self.cancel(cause)

    async def _judge_departure(self, attempt: Attempt, cause: KhoError) -> None:
        """End the handover because a frozen producer disconnected, unless the host is on its way into the kexec.

        In that case systemd has stopped the producer: what is ordered after khod is stopped before it. A frozen
        producer has handed over all it has, and when the host goes down nothing will thaw it.
        """
        excused: bool | None = None
        for _question in range(SHUTDOWN_QUESTIONS):
            if (excused := await attempt.goes_down()) is not None:
                break
        if not excused:  # without an answer the producer counts as dead
            self._cancel_attempt(attempt, cause)
            return
        attempt.going_down = True
        self._spawn_task(self._end_without_shutdown(attempt, cause))

    async def _end_without_shutdown(self, attempt: Attempt, cause: KhoError) -> None:
        """End the handover after all if the shutdown that excuses a producer's disconnection is cancelled."""
        await self._jump.until_called_off(attempt)
        attempt.going_down = False
        self._cancel_attempt(attempt, cause)

    def _on_unkept_registration(self, error: Exception) -> None:
        self._transaction.emit_event(
            f"producers would not be missed after a restart of khod, their list is not kept: {error}"
        )

    # What ends a handover

    def cancel(self, cause: KhoError) -> None:
        """End the handover under way for `cause`, if there is one that can still be ended."""
        if self._jump.going_down or not self._transaction.can_be_cancelled:
            return
        self._transaction.cancel(cause)
        if not self._busy.locked():
            self._spawn_task(self._end_held())

    def _cancel_attempt(self, attempt: Attempt, cause: KhoError) -> None:
        """End this attempt, but not one that has begun since."""
        if self._transaction.attempt is attempt:
            self.cancel(cause)

    async def _end_held(self) -> None:
        """Roll back a handover that waits for an operation; an operation that takes the lock before does the same."""
        async with self._at_work():
            await self._act_on_cause(quiet=True)

    async def _act_on_cause(self, *, quiet: bool = False) -> None:
        """Roll back for a cause that has ended the handover and was not acted on; raise the cause, unless `quiet`."""
        cause = self._transaction.cause
        if cause is None:
            return
        if self._transaction.phase not in HELD:
            self._transaction.settle_cancel()
            return
        try:
            await self._roll_back(cause)
        except KhoError:
            if not quiet:  # it is in the record, and every listener was told
                raise

    def _watch_devices(self, attempt: Attempt) -> None:
        """Watch for devices that appear or disappear during this attempt; Failed if that is not possible."""
        settings = self.settings.current.guard
        devices = {member.producer.name: member.producer.devices for member in attempt.barrier.members}
        self._guard.start(settings.abort, settings.record, devices)

    async def _wait_started(self) -> None:
        """Wait until khod's start is complete; Failed if it takes too long, because the kernel does not answer."""
        try:
            async with asyncio.timeout(self._start_seconds()):
                await self._started.wait()
        except TimeoutError:
            raise Failed(
                "khod has not come to the end of its start: the kernel does not say how it stands",
                where="abort",
                remedy="Look at the kernel log; khoctl status says what khod waits for.",
            ) from None

    def _start_seconds(self) -> float:
        """Return the maximum seconds of a start that asks the kernel once and rolls back, in any order of producers."""
        try:
            producers = self.registry.all_producers()
        except KhoError:
            producers = [*self.registry.peers.all_peers()]
        deadlines = self.settings.current.deadlines
        return deadlines.activate + bound_seconds(deadlines, ()) + sum(2 * producer.timeout for producer in producers)

    def _stop_watching(self) -> None:
        try:
            self._guard.stop()
        except Exception:  # the handover it watched is over
            LOG.exception("The guard could not be stopped")

    def _on_device_event(self, seen: Seen) -> None:
        sentence = seen.describe()
        self._transaction.emit_event(sentence, EventKind.device)
        if seen.severity is Severity.abort:
            self.cancel(
                DeviceChanged(
                    f"The hardware changed during the handover: {sentence}",
                    where="guard",
                    remedy="Begin again when it is quiet; guard.abort in khod.toml says what counts.",
                )
            )

    async def _give_up_jump(self, cause: KhoError) -> None:
        """Roll back a jump that does not happen."""
        async with self._at_work():
            if self._transaction.phase is Phase.executing:
                with suppress(KhoError):  # it is in the record, and every listener was told
                    await self._roll_back(cause)

    # The frame of an operation

    @asynccontextmanager
    async def _one_operation(self) -> AsyncIterator[None]:
        """Run one operation at a time; a second one is refused, not queued: the first may change what it would do."""
        await self._started.wait()
        if self._busy.locked() and not self._restoration.make_way():
            begun = self.record.begun if self._transaction.phase not in RESTING else model.Begun()
            raise Busy(
                f"Another operation is under way ({self._transaction.phase.value})"
                f"{f', begun by {begun.by}' if begun.by else ''}",
                where="khod",
                remedy=WAIT,
            )
        async with self._at_work():
            await self._act_on_cause()
            try:
                yield
            except KhoError as error:
                self._say_what_stays(error)
                raise
            except Exception as error:  # every error reaches the operator as a sentence
                raise told_error(error) from error
            finally:
                await self._act_on_cause()

    @asynccontextmanager
    async def _one_attempt(self, by: str) -> AsyncIterator[None]:
        """Run one operation that goes on with a handover or begins one; a refusal before its first step is logged."""
        async with self._one_operation():
            ended = self._transaction.rollbacks
            try:
                yield
            except KhoError as error:
                observed = self._observer.last
                if self._transaction.phase in RESTING and self._transaction.rollbacks == ended and observed is not None:
                    record = self.record.begin_run(new_run(), observed, self.record.generation, by)
                    self._spawn_task(self._recorder.refuse_run(record, observed, error))
                raise

    def _say_what_stays(self, error: KhoError) -> None:
        """Add the handover's phase to an error's remedy: it did not change, and producers may still be frozen."""
        phase = self._transaction.phase
        if phase in HELD and not isinstance(error, NotRolledBack):
            frozen = sum(member.told is Verb.freeze for member in self.queries.members)
            held = f", {frozen} producer{'' if frozen == 1 else 's'} frozen" if frozen else ""
            stays = f"The handover stays as it was: {phase.value}{held}. Try again, or: khoctl abort"
            error.remedy = f"{error.remedy} {stays}".strip()

    @asynccontextmanager
    async def _at_work(self) -> AsyncIterator[None]:
        """Hold the lock of the handover; afterwards the guard watches on only if the handover waits half-way."""
        try:
            async with self._busy:
                try:
                    yield
                finally:
                    if self._transaction.phase not in HELD:
                        self._stop_watching()
        finally:
            self._restoration.resume_claims()

    async def _check_may_start(self, request: Request | None, *, by: str) -> Record:
        """Refuse before anything is changed; else return the record to continue with, a new one if at rest.

        Without a request there is neither a load nor a jump.
        """
        if self.settings.error is not None:
            raise self.settings.error
        observed = await self._interruptible(self._observe_kernel())
        phase = self._transaction.phase
        if phase not in RESTING | HELD:
            raise Refused(
                f"A handover cannot go on from here ({phase.value}): {self._transaction.reason}",
                where="khod",
                remedy=status.PHASE_TEXT[phase][1],
            )
        if waiting := self.queries.absent_producers:
            names = ", ".join(found.name for found in waiting)
            self._transaction.emit_event(f"waiting for producers to connect again: {names}")
            await self._interruptible(self.registry.peers.wait_returned({found.name for found in waiting}))
        now = request is not None and request.now
        checks = await self._interruptible(self.queries.run_checks(observed, now=now))
        to_come = {"kexec": request is not None and Step.load not in self.machine.done}
        to_come["sessions"] = request is not None and not request.load_only  # only the jump ends them
        self._require_checks([check for check in checks if to_come.get(check.name, True)])
        if phase in HELD:
            return self.record
        return self.record.begin_run(new_run(), observed, self._observer.require_kernel.generation, by)

    async def _check_target(self, target: Target) -> None:
        observed = self._observer.last
        assert observed is not None, "the kernel was asked before"
        self._require_checks(await self._interruptible(self.queries.run_checks(observed, target)))
        self._transaction.emit_event(f"the next command line: {target.cmdline}", words=target.words)

    def _require_checks(self, checks: list[Check]) -> None:
        self._recorder.note_checks(checks)
        preflight.require_passed(checks)
        for line in preflight.overridden_findings(checks):
            self._transaction.emit_event(line)

    async def _open_attempt(self, record: Record, *, at_once: bool = False) -> Attempt:
        """Continue the attempt of this record, or begin it."""
        if record.run != self.record.run:
            about = record.run, record.boot_id, record.release, record.generation
            await self._interruptible(
                self._workers.disk.call_within(
                    lambda: self._store.snapshots.prepare_snapshot(*about, self.settings.current.snapshots),
                    "making room for the snapshot",
                    self.settings.current.deadlines.prepare,
                )
            )
            self._transaction.begin_run(record)
            assert self._observer.last is not None, "the kernel was asked before"
            await self._recorder.begin_run(record, self._observer.last)
        self._transaction.note_sessions(self.queries.sighted, at_once=at_once)
        attempt = self._current_attempt()
        self._watch_devices(attempt)
        return attempt

    async def _build_target(self, request: Request, run: str) -> Target | None:
        """Return the next kernel in memory, None if it is loaded already."""
        if request.kernel is None:
            if Step.load not in self.machine.done:
                raise NoKernelGiven(
                    "No kernel is loaded and none was given",
                    remedy="Name one with `kernel`.",
                )
            return None
        if Step.load in self.machine.done:
            raise AlreadyLoaded(
                "An image is already loaded: another cannot replace it",
                where="`kernel.image`",
                remedy=JUMP_OR_BEGIN_AGAIN,
            )
        observed = self._observer.last
        assert observed is not None, "the kernel was asked before"
        return await self._interruptible(
            take_target(self._workers.files, request, observed.cmdline, run, self.settings.current.images)
        )

    async def _interruptible(self, work: Coroutine[Any, Any, T]) -> T:
        return await self._transaction.wait_interruptibly(work)

    async def _roll_back(
        self, cause: KhoError | None, *, interrupted: Phase | None = None, because: KhoError | None = None
    ) -> None:
        self._current_attempt()
        await self._transaction.roll_back(cause, interrupted=interrupted, because=because)

    def _remaining_steps(self, last: Step) -> tuple[Step, ...]:
        return remaining_steps(self.machine, self._observer.require_kernel.order, last)

    async def _observe_kernel(self) -> Observed:
        return await self._observer.observe_kernel(self.settings.current.deadlines.activate)

    def _current_attempt(self) -> Attempt:
        """Return the attempt under way; make one if there is none yet (at a start, or before a first step)."""
        found = self._transaction.attempt
        if found is not None and not found.barrier.broken:
            return found
        changed, record = self._transaction.on_member_changed, self.record
        if self.machine.done:
            told = {Step.freeze: Verb.freeze, Step.prepare: Verb.prepare}  # neither: another program's image
            last = next((verb for step, verb in told.items() if step in self.machine.done), None)
            if self._transaction.phase is Phase.failed and record.producers:
                last = None
            barrier = self.registry.resume_barrier(record.run, changed, record.producers, last)
        else:
            barrier = self.registry.make_barrier(record.run, changed)
        attempt = self._new_attempt(barrier, everyone=self.registry.all_producers)
        attempt.adopt_steps(self.machine)
        self._transaction.attach_attempt(attempt)
        return attempt

    def _new_attempt(self, barrier: Barrier, *, everyone: Callable[[], list[Participant]] = list) -> Attempt:
        return Attempt(
            self._observer.probed.kernel,
            self._kexec,
            self._workers,
            self._store,
            self.settings,
            barrier,
            everyone=everyone,
            joined=self._watch_devices,
            shutdown=self._shutdown,
        )

    def _spawn_task(self, work: Coroutine[None, None, None]) -> None:
        """Run a task that nobody waits for; it ends with khod."""
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._on_background_end)

    def _on_background_end(self, task: "asyncio.Task[Any]") -> None:
        self._background.discard(task)
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            LOG.error("khod itself failed: %r", error)
