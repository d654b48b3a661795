"""Runs the machine: one operation at a time, every step recorded before it is taken, all undone on failure."""

import asyncio
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NoReturn

from khod import cmdline, preflight, reconcile, status, verify
from khod.actions import Actions, Target
from khod.config import Config
from khod.errors import ConfigError, Failed, KhoError, NotRolledBack, RecordError, Refused, Unsupported, UsageError
from khod.executor import Executor
from khod.images import recognise, sealed
from khod.kernel.explain import FORGOT
from khod.kernel.kexec import Kexec
from khod.kernel.probe import Probed
from khod.kernel.protocol import AbortKind, KhoKernel, Tree
from khod.kernel.thread import KernelThread
from khod.machine import HELD, RESTING, Machine, left
from khod.model import Check, Event, Generation, Observed, Order, Phase, Status, Step, StepTiming
from khod.producers.barrier import Barrier
from khod.producers.hooks import Hook
from khod.record import Record, Store

INTERRUPTIBLE = frozenset({Step.prepare, Step.freeze})
"""Steps an abort may cut short: they wait for producers. A kernel call is waited for."""

NO_TREE = {
    "out": "The kernel has one only in the active phase: khoctl activate",
    "in": "This kernel was not reached by a handover, or it handed nothing over.",
    "snapshot": "One is taken at activation: khoctl activate",
}


@dataclass(frozen=True)
class Request:
    """What `khoctl kexec` asks for. File descriptors stay the caller's; None is not given."""

    kernel_fd: int | None = None
    kernel_name: str = ""
    initrd_fd: int | None = None
    initrd_name: str = ""
    cmdline: str | None = None
    append: str | None = None
    now: bool = False
    load_only: bool = False
    hold: bool = False


class Engine:
    """One host's handover. `tell` is called with every change, from the event loop."""

    def __init__(self, kexec: Kexec, prober: Callable[[], Probed], store: Store, config: Config, *,
                 producers: Callable[[], list[Hook]], orderly: Executor, immediate: Executor,
                 thread: KernelThread, tell: Callable[[Event], None]) -> None:
        self.config = config
        self.machine = Machine()
        self.record = Record()
        self._kexec = kexec
        self._prober = prober
        self._store = store
        self._producers = producers
        self._executors = {False: orderly, True: immediate}
        self._thread = thread
        self._tell = tell
        self._probed = Probed(None, "not yet probed", "")
        self._observed: Observed | None = None
        self._reason = ""
        self._actions: Actions | None = None
        self._busy = asyncio.Lock()
        self._abort = asyncio.Event()

    # What others ask for

    async def start(self) -> None:
        """Compare the record with the kernel and do what that calls for."""
        async with self._busy:
            try:
                record: Record | RecordError | None = self._store.read()
            except RecordError as error:
                record = error
            self.record = record if isinstance(record, Record) else Record()
            observed = await self._observe(self.config.deadlines.activate)
            found = reconcile.reconcile(record, observed, self.config.policy.after_daemon_died)
            self._reason = found.reason
            self.machine = Machine(found.phase, self.record.done if found.phase not in RESTING else ())
            self._say(found.reason or "khod started")
            match found.action:
                case reconcile.Action.verify:
                    await self._verify(observed)
                case reconcile.Action.roll_back:
                    await self._roll_back(Failed(found.reason), self._attempt())
                case reconcile.Action.resume:
                    self._attempt()
                case _:
                    await self._settle(record, found.phase, observed)

    async def activate(self) -> None:
        """Bring producers and kernel to `active`. On failure everything is back as it was."""
        async with self._operation():
            await self._ready(wants_load=False)
            if Step.activate in self.machine.done:
                return
            await self._forward(Step.activate, hold=False)

    async def kexec(self, request: Request) -> None:
        """Do what is left, up to the jump or, with `load_only`, the loaded image."""
        async with self._operation():
            await self._ready(wants_load=Step.load not in self.machine.done)
            target = await self._target(request)
            if request.now:
                # The bulk of the dirty pages goes out before anyone is frozen; the executor's own
                # sync then has little left.
                await asyncio.to_thread(self._kexec.sync)
            await self._forward(Step.load if request.load_only else Step.execute, hold=request.hold,
                                target=target, executor=self._executors[request.now])

    async def abort(self, *, force: bool = False) -> None:
        """Put everything back. With `force` also what khod did not do."""
        if self._busy.locked():
            if self.machine.phase is Phase.executing:
                raise Refused("The jump is under way and cannot be called back", where="abort")
            self._abort.set()
        async with self._busy:
            self._abort.clear()
            observed = await self._observe(self.config.deadlines.rollback)
            phase = self._shown(observed)
            if phase in (Phase.foreign, Phase.inconsistent):
                if not force:
                    raise Refused(f"This is not khod's to put back: {self._why(phase, observed)}",
                                  where=phase.value, remedy="To do it all the same: khoctl abort --force")
                done = [*self.machine.done]
                done += [step for step, fact in ((Step.activate, observed.active), (Step.load, observed.loaded))
                         if fact and step not in done]
                self.machine = Machine(phase, tuple(done))
            elif self.machine.phase in RESTING:
                return
            await self._roll_back(None, self._attempt())

    async def check(self) -> list[Check]:
        """Run the preflight checks without touching anything."""
        observed = await self._observe(self.config.deadlines.observe)
        return await self._thread.call(lambda: preflight.run(self._facts(observed)), "the checks",
                                       self.config.deadlines.observe * 5)

    async def status(self) -> Status:
        """Tell how it stands. Asks the kernel only while no operation does, and waits for it no longer
        than deadlines.observe: reading `active` blocks while the kernel serializes."""
        stale = self._busy.locked()
        if not stale:
            try:
                await self._observe(self.config.deadlines.observe)
            except KhoError:
                stale = True
        return self._status(stale)

    async def stop(self, *, jumping: bool) -> None:
        """End: roll back what is held, unless the host is on its way into the kexec."""
        if jumping and Step.load in self.machine.done:
            if self.machine.phase is Phase.loaded:  # somebody else pulled the trigger
                self.machine = self.machine.begin(Step.execute)
                await self._keep()
            return
        if self._busy.locked() or self.machine.phase in HELD:
            await self.abort()

    async def tree(self, side: str) -> Tree:
        """Read a state tree: `out`, `in` or `snapshot`.

        v3 has no outgoing tree unless active. The kernel's thread reads it: a read while another
        thread leaves the active phase is v3's deadlock.
        """
        found: Tree | None = None
        if side == "snapshot":
            found = await asyncio.to_thread(self._store.snapshot)
        elif side in ("in", "out"):
            kernel = self._kernel()
            read = kernel.arrived if side == "in" else lambda: kernel.tree() if kernel.active() is not False else None
            try:
                found = await self._thread.call(read, "reading the tree", self.config.deadlines.activate)
            except OSError as error:
                raise Failed(f"The tree cannot be read: {error}", where=str(error.filename)) from error
        else:
            raise UsageError(f"{side!r} is no side", where="Tree", remedy="One of: out, in, snapshot.")
        if found is None:
            raise Refused(f"There is no `{side}` tree now", where=side, remedy=NO_TREE[side])
        return found

    def now(self) -> Event:
        """How it stands, as an event."""
        return Event(time.monotonic(), self._shown(self._observed), self._reason, self.record.run)

    # The way forward

    def _operation(self) -> "asyncio.Lock":
        if self._busy.locked():
            raise Refused(f"Another operation is under way ({self.machine.phase.value})", where="khod",
                          remedy="Wait for it, or: khoctl abort")
        self._abort.clear()
        return self._busy

    async def _ready(self, *, wants_load: bool) -> None:
        """Refuse before anything is touched."""
        if self.machine.phase not in RESTING | HELD:
            raise Refused(f"A handover cannot go on from here ({self.machine.phase.value}): {self._reason}",
                          where="khod", remedy="First: khoctl abort")
        observed = await self._observe(self.config.deadlines.activate)
        checks = await self._thread.call(lambda: preflight.run(self._facts(observed)), "the checks",
                                         self.config.deadlines.activate)
        preflight.require([check for check in checks if wants_load or check.name != "kexec"])
        if self.machine.phase in RESTING:
            self.machine = Machine(self.machine.phase)
            self._actions = None
            same = self.record.boot_id == observed.boot_id
            self.record = Record(run=uuid.uuid4().hex[:12], boot_id=observed.boot_id, release=observed.release,
                                 generation=self._kernel().generation, handovers=self.record.handovers,
                                 previous_release=self.record.previous_release,
                                 suspect=self.record.suspect if same else "",
                                 failed_activations=self.record.failed_activations if same else 0)
        self._attempt()

    async def _target(self, request: Request) -> Target | None:
        """Take the images into memory and look at them: slow, so long before anyone is frozen."""
        if request.kernel_fd is None:
            if Step.load not in self.machine.done:
                raise Refused("No image is loaded and none was given", where="kexec", remedy="Add --image and --initrd.")
            return None
        if Step.load in self.machine.done:
            raise Refused("This handover has its image already: another one would be ignored", where="--image",
                          remedy="Jump into it with: khoctl kexec. Or begin again with: khoctl abort")
        assert self._observed is not None
        running, run, limit = self._observed.cmdline, self.record.run, self.config.images.max_size
        kernel_fd, initrd_fd = request.kernel_fd, request.initrd_fd

        def take() -> Target:
            kernel = sealed.seal(kernel_fd, "image", request.kernel_name, limit)
            initrd = None
            try:
                if initrd_fd is not None:
                    initrd = sealed.seal(initrd_fd, "initrd", request.initrd_name, limit)
                    recognise.initrd(initrd)
                longest = recognise.kernel(kernel).cmdline_limit
                return Target(kernel, initrd, cmdline.compose(running, request.cmdline, request.append, run, longest))
            except KhoError:
                kernel.close()
                if initrd is not None:
                    initrd.close()
                raise

        return await asyncio.to_thread(take)

    async def _forward(self, last: Step, *, hold: bool, target: Target | None = None,
                       executor: Executor | None = None) -> None:
        actions = self._attempt()
        actions.target, actions.executor = target, executor
        try:
            for step in left(self.machine, self._order(), last):
                await self._step(step, actions, hold=hold)
        finally:
            actions.target = None
            if target is not None:
                target.close()
        await self._keep()

    async def _step(self, step: Step, actions: Actions, *, hold: bool) -> None:
        before = self.machine
        try:
            self._not_aborted()
            self.machine = self.machine.begin(step)
            await self._keep()
            self._say(step.value)
            began = time.monotonic()
            if step is Step.activate:
                self.record = replace(self.record, window_began_at=time.time())
            await self._interruptibly(step, actions)
            timing = StepTiming(step.value, began, time.monotonic() - began)
            self.record = replace(self.record, timings=(*self.record.timings, timing))
            if step is Step.activate and actions.snapshot is not None:
                self.record = replace(self.record, snapshot=actions.snapshot.digest)
            self.machine = self.machine.finish(step)
            self._say(f"{step.value} took {timing.seconds:.3f} s")
        except (KhoError, OSError) as error:
            cause = error if isinstance(error, KhoError) else Failed(str(error))
            if step is Step.activate:
                self.record = replace(self.record, failed_activations=self.record.failed_activations + 1)
            if hold and before.phase in HELD:
                await self._hold(step, before, actions, cause)
            await self._roll_back(cause, actions)

    async def _interruptibly(self, step: Step, actions: Actions) -> None:
        if step not in INTERRUPTIBLE:
            await actions.do(step)
            return
        work, abort = asyncio.ensure_future(actions.do(step)), asyncio.ensure_future(self._abort.wait())
        try:
            await asyncio.wait({work, abort}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
                await asyncio.wait({work})
                self._not_aborted()
            await work
        finally:
            abort.cancel()

    def _not_aborted(self) -> None:
        if self._abort.is_set():
            raise Failed("The handover was called off", where="abort")

    # The way back

    async def _hold(self, step: Step, before: Machine, actions: Actions, cause: KhoError) -> NoReturn:
        """Put only the failed step back and stay where it began, as --hold asks."""
        await actions.undo(step)
        self.machine = replace(before, phase=before.phase)
        self._reason = cause.what
        self.record = replace(self.record, last_error=str(cause))
        await self._keep()
        self._say(f"held at {before.phase.value}: {cause.what}")
        raise NotRolledBack(f"{cause.what}; held at {before.phase.value} as asked", where=cause.where,
                            remedy=f"{cause.remedy} To go back: khoctl abort".strip())

    async def _roll_back(self, cause: KhoError | None, actions: Actions) -> None:
        """Undo every step done, the last first; a step that cannot be undone does not stop the others.

        Raises `cause`, or NotRolledBack where something is left; returns where the operator asked for it.
        """
        self.machine = replace(self.machine.to(Phase.rolling_back))
        if cause is not None:
            self.record = replace(self.record, last_error=str(cause))
        await self._keep_if_possible()
        self._say(cause.what if cause else "called off")
        failures: list[str] = []
        for step in reversed(self.machine.done):
            try:
                if step is Step.activate:
                    self._note_forgotten(actions)
                await actions.undo(step)
            except KhoError as error:
                failures.append(str(error))
                self._say(f"{step.value} could not be put back: {error.what}")
            else:
                self.machine = self.machine.undone(step)
        self.machine = self.machine.to(Phase.failed if failures else Phase.idle)
        self._reason = "; ".join(failures)
        if failures:
            self.record = replace(self.record, last_error=self._reason)
        await self._keep_if_possible()
        self._say("not everything is back" if failures else "everything is back as it was")
        if failures:
            began = f"{cause.what}. " if cause else ""
            raise NotRolledBack(f"{began}Not everything could be put back: {self._reason}",
                                where=", ".join(step.value for step in self.machine.done),
                                remedy="Look at the kernel log, then try again: khoctl abort")
        if cause is not None:
            raise cause

    def _note_forgotten(self, actions: Actions) -> None:
        if actions.kernel.abort is AbortKind.forgets:
            self.record = replace(self.record, suspect=FORGOT[AbortKind.forgets])

    # After the jump

    async def _verify(self, observed: Observed) -> None:
        """Hold what arrived against the snapshot."""
        self.machine = Machine(Phase.verifying)
        kernel = self._probed.kernel
        try:
            snapshot = self._store.snapshot()
            arrived = None if kernel is None else await self._thread.call(kernel.arrived, "reading the state that arrived",
                                                                          self.config.deadlines.activate)
            verdict = verify.compare(snapshot, arrived, self.record.generation)
        except (KhoError, OSError) as error:
            verdict = verify.Verdict(reason=str(error))
        good = not verdict.reason
        blackout = time.time() - self.record.window_began_at if self.record.window_began_at else None
        self.machine = self.machine.to(Phase.verified if good else Phase.degraded)
        self._reason = verdict.reason
        self.record = replace(
            self.record, verdict=verdict, last_error=verdict.reason, boot_id=observed.boot_id,
            previous_release=self.record.release, release=observed.release, suspect="", failed_activations=0,
            handovers=self.record.handovers + 1, blackout_seconds=blackout)
        await self._keep_if_possible()
        self._say(verdict.reason or f"{len(verdict.arrived)} producers' state arrived: {', '.join(verdict.arrived)}")

    async def _settle(self, record: Record | RecordError | None, phase: Phase, observed: Observed) -> None:
        """Keep what the start found, unless that would overwrite what an operator must see."""
        if isinstance(record, RecordError) or phase not in RESTING:
            return
        if phase is Phase.cold_boot:
            self.record = replace(self.record, last_error=self._reason, release=observed.release,
                                  previous_release=self.record.release)
        self.record = replace(self.record, boot_id=observed.boot_id, release=observed.release)
        await self._keep_if_possible()

    # What is known

    async def _observe(self, deadline: float) -> Observed:
        """Ask the kernel how it stands, in its own thread."""

        def look() -> tuple[Probed, Observed]:
            probed = self._probed if self._probed.kernel is not None else self._prober()
            kernel = probed.kernel
            return probed, Observed(
                boot_id=self._kexec.boot_id(), release=self._kexec.release(), cmdline=self._kexec.cmdline(),
                active=None if kernel is None else kernel.active(), loaded=self._kexec.loaded(),
                arrived=kernel is not None and kernel.arrived() is not None)

        try:
            self._probed, self._observed = await self._thread.call(look, "saying how it stands", deadline)
        except OSError as error:
            raise Failed(f"The kernel cannot be asked: {error}", where=str(error.filename)) from error
        return self._observed

    def _shown(self, observed: Observed | None) -> Phase:
        """The machine's phase, unless the kernel contradicts it."""
        phase = self.machine.phase
        if observed is None or self._busy.locked() and phase not in RESTING | HELD:
            return phase
        if phase is Phase.failed and not observed.active and not observed.loaded:
            return phase
        if phase in (Phase.foreign, *RESTING):
            if observed.active or observed.loaded:
                return Phase.foreign
            return Phase.idle if phase is Phase.foreign else phase
        if phase in HELD and not reconcile.agrees(self._current(), observed):
            return Phase.inconsistent
        return phase

    def _why(self, phase: Phase, observed: Observed) -> str:
        return f"{self._reason}; {reconcile.said(observed)}" if self._reason else f"{phase.value}, {reconcile.said(observed)}"

    def _status(self, stale: bool) -> Status:
        phase, observed, record = self._shown(None if stale else self._observed), self._observed, self.record
        summary, remedy = status.SAYS[phase]
        members = self._actions.barrier.members if self._actions else []
        known = self._probed.kernel
        if known is None and phase in RESTING:
            summary, remedy = f"{summary} No handover is possible: {self._probed.what}.", remedy or self._probed.remedy
        return Status(
            phase=phase, summary=summary, remedy=remedy, exit_code=status.exit_code(phase).value,
            generation=known.generation if known else Generation.none,
            kernel_active=observed.active if observed else None, kernel_loaded=observed.loaded if observed else None,
            kernel_release=observed.release if observed else "", boot_id=observed.boot_id if observed else "",
            run=record.run, done=[step.value for step in self.machine.done],
            left=[step.value for step in self.machine.done] if phase is Phase.failed else [],
            waiting_for=[member.producer.name for member in members if member.waiting],
            producers=[member.shown() for member in members], verdict=record.verdict,
            previous_release=record.previous_release, handovers=record.handovers,
            blackout_seconds=record.blackout_seconds, timings=list(record.timings),
            last_error=record.last_error if phase not in (Phase.foreign, Phase.inconsistent) else self._reason,
            stale=stale)

    def _facts(self, observed: Observed) -> preflight.Facts:
        foreign = self._shown(observed) in (Phase.foreign, Phase.inconsistent)
        return preflight.Facts(self._probed, self._kexec, observed, self._store, self.config, self.record, foreign,
                               self._producers)

    def _attempt(self) -> Actions:
        """The actions of the attempt under way; made where it has none yet (a start, a first step)."""
        if self._actions is None:
            try:
                producers = self._producers()
                barrier = Barrier(producers, self.record.run, self._say)
            except ConfigError as error:
                if self.machine.phase in RESTING:
                    raise
                self._say(f"producers are left out: {error}")
                barrier = Barrier([], self.record.run, self._say)
            self._actions = Actions(self._kernel(), self._kexec, self._thread, self._store, self.config, barrier)
        return self._actions

    def _kernel(self) -> KhoKernel:
        if self._probed.kernel is None:
            raise Unsupported(self._probed.what, remedy=self._probed.remedy)
        return self._probed.kernel

    def _order(self) -> Order:
        return self._kernel().order

    def _current(self) -> Record:
        return replace(self.record, phase=self.machine.phase, done=self.machine.done)

    async def _keep(self) -> None:
        self.record = self._current()
        await asyncio.to_thread(self._store.write, self.record)

    async def _keep_if_possible(self) -> None:
        """Write the record on the way back: a full disk must not keep the kernel from being put back."""
        try:
            await self._keep()
        except RecordError as error:
            self._say(str(error))

    def _say(self, message: str) -> None:
        self._tell(Event(time.monotonic(), self.machine.phase, message, self.record.run))
