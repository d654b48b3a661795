"""What others may ask of khod, one operation at a time: each asks the kernel first, then moves the handover."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

from khod import preflight, reconcile, status, verify
from khod.actions import Actions
from khod.config import Config
from khod.errors import ConfigError, Failed, KhoError, RecordError, Refused, Unsupported, UsageError
from khod.executor import Executor
from khod.handover import Handover
from khod.kernel.kexec import Kexec
from khod.kernel.probe import Probed
from khod.kernel.protocol import KhoKernel, Tree
from khod.kernel.thread import KernelThread
from khod.machine import HELD, RESTING, Machine, left
from khod.model import Check, Event, Generation, Observed, Phase, Status, Step, Verdict
from khod.producers.barrier import Barrier, Verb
from khod.producers.hooks import Hook
from khod.record import Record, Store
from khod.target import Request, Target, take

NO_TREE = {
    "out": "The kernel has one only in the active phase: khoctl activate",
    "in": "This kernel was not reached by a handover, or it handed nothing over.",
    "snapshot": "One is taken at activation: khoctl activate",
}


class Engine:
    """One host's handover. `tell` is called with every change, from the event loop."""

    def __init__(
        self,
        kexec: Kexec,
        prober: Callable[[], Probed],
        store: Store,
        config: Config,
        *,
        producers: Callable[[], list[Hook]],
        orderly: Executor,
        immediate: Executor,
        thread: KernelThread,
        tell: Callable[[Event], None],
    ) -> None:
        self.config = config
        self._handover = Handover(store, tell)
        self._kexec = kexec
        self._prober = prober
        self._store = store
        self._producers = producers
        self._executors = {False: orderly, True: immediate}
        self._thread = thread
        self._probed = Probed(None, "not yet probed", "")
        self._observed: Observed | None = None
        self._busy = asyncio.Lock()
        self._started = asyncio.Event()

    @property
    def machine(self) -> Machine:
        """Where the handover stands."""
        return self._handover.machine

    @property
    def record(self) -> Record:
        """What is known of it."""
        return self._handover.record

    async def start(self) -> None:
        """Compare the record with the kernel and do what that calls for; whoever asks meanwhile waits."""
        try:
            async with self._busy:
                await self._start()
        finally:
            self._started.set()

    async def _start(self) -> None:
        try:
            record: Record | RecordError | None = self._store.read()
        except RecordError as error:
            record = error
        here = self._handover
        here.record = record if isinstance(record, Record) else Record()
        observed = await self._observe(self.config.deadlines.activate)
        found = reconcile.reconcile(record, observed, self.config.policy.after_daemon_died)
        here.reason = found.reason
        here.machine = Machine(found.phase, here.record.done if found.phase not in RESTING else ())
        lacking = "" if self._probed.kernel else f"no handover is possible: {self._probed.what}"
        here.say(found.reason or lacking or "khod started")
        match found.action:
            case reconcile.Action.verify:
                await self._verify(observed)
            case reconcile.Action.roll_back:
                await here.roll_back(Failed(found.reason), self._attempt())
            case reconcile.Action.resume:
                self._attempt()
            case reconcile.Action.none if found.phase in RESTING:
                here.record = reconcile.settled(here.record, found, observed)
                await here.keep_if_possible()

    async def activate(self) -> None:
        """Bring producers and kernel to `active`. On failure everything is back as it was."""
        async with self._operation():
            await self._begin(await self._ready(wants_load=False))
            await self._forward(Step.activate, hold=False)

    async def kexec(self, request: Request) -> None:
        """Do what is left, up to the jump or, with `load_only`, the loaded image."""
        async with self._operation():
            record = await self._ready(wants_load=Step.load not in self.machine.done)
            target = await self._target(request, record.run)
            actions = await self._begin(record)
            actions.target, actions.executor = target, self._executors[request.now]
            try:
                if request.now:
                    # The bulk of the dirty pages goes out before anyone is frozen; the executor's own
                    # sync then has little left.
                    await asyncio.to_thread(self._kexec.sync)
                await self._forward(Step.load if request.load_only else Step.execute, hold=request.hold)
            finally:
                actions.target = None
                if target is not None:
                    target.close()

    async def abort(self, *, force: bool = False) -> None:
        """Put everything back. With `force` also what khod did not do."""
        here = self._handover
        await self._started.wait()
        if self._busy.locked():
            if self.machine.phase is Phase.executing:
                raise Refused("The jump is under way and cannot be called back", where="abort")
            here.abort_asked.set()
        async with self._busy:
            here.abort_asked.clear()
            observed = await self._observe(self.config.deadlines.rollback)
            phase = self._shown(observed)
            if phase in (Phase.foreign, Phase.inconsistent):
                if not force:
                    raise Refused(
                        f"This is not khod's to put back: {here.reason or phase.value}; {reconcile.said(observed)}",
                        where=phase.value,
                        remedy="To do it all the same: khoctl abort --force",
                    )
                here.machine = Machine(phase, reconcile.due(self.machine.done, observed))
            elif phase in RESTING:
                return
            await here.roll_back(None, self._attempt())

    async def check(self) -> list[Check]:
        """Run the preflight checks without touching anything."""
        return await self._checks(await self._observe(self.config.deadlines.activate))

    async def status(self) -> Status:
        """Tell how it stands.

        Asks the kernel only while no operation does, and waits for it no longer than
        deadlines.observe: reading `active` blocks while the kernel serializes.
        """
        await self._started.wait()
        stale = self._busy.locked()
        if not stale:
            try:
                await self._observe(self.config.deadlines.observe)
            except KhoError:
                stale = True
        phase = self._shown(None if stale else self._observed)
        return status.build(self._handover, phase, self._observed, self._probed, stale=stale)

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

    async def stop(self, *, jumping: bool | None) -> None:
        """End: roll back what is held, unless the host is on its way into the kexec.

        Somebody else may have pulled the trigger: with an image loaded systemd 262 makes a kexec even of
        a plain `systemctl reboot`. Then the state goes along in good order, or, where that fails, the image
        is unloaded and the host boots cold. Where systemd does not say (None), what khod asked for itself
        counts: to roll back under a jump would lose the state for good.
        """
        if jumping is None:
            jumping = self.machine.phase is Phase.executing
        if jumping and Step.load in self.machine.done:
            if self.machine.phase in HELD:
                steps = left(self.machine, self._kernel().order, Step.execute)[:-1]
                await self._handover.forward(steps, self._attempt(), hold=False)
                self._handover.machine = self.machine.begin(Step.execute)
                await self._handover.keep()
            return
        if self.machine.phase is Phase.executing:
            async with self._busy:  # the executor comes back soon, and then it is known whether the host goes
                pass
        if self._busy.locked() or self.machine.phase in HELD | {Phase.executing}:
            await self.abort()

    async def now(self) -> Event:
        """How it stands, as an event."""
        await self._started.wait()
        return Event(time.monotonic(), self._shown(self._observed), self._handover.reason, self.record.run)

    @asynccontextmanager
    async def _operation(self) -> AsyncIterator[None]:
        """One at a time; whoever comes second is refused, not queued: the first may change what it meant."""
        await self._started.wait()
        if self._busy.locked():
            raise Refused(
                f"Another operation is under way ({self.machine.phase.value})",
                where="khod",
                remedy="Wait for it, or: khoctl abort",
            )
        self._handover.abort_asked.clear()
        async with self._busy:
            yield

    async def _ready(self, *, wants_load: bool) -> Record:
        """Refuse before anything is touched; else give the record to go on with, a fresh one from rest."""
        observed = await self._observe(self.config.deadlines.activate)
        if self.machine.phase not in RESTING | HELD | {Phase.foreign}:
            raise Refused(
                f"A handover cannot go on from here ({self.machine.phase.value}): {self._handover.reason}",
                where="khod",
                remedy=status.SAYS[self.machine.phase][1],
            )
        checks = await self._checks(observed)
        preflight.require([check for check in checks if wants_load or check.name != "kexec"])
        if self.machine.phase in HELD:
            return self.record
        return Record(
            run=uuid.uuid4().hex[:12],
            boot_id=observed.boot_id,
            release=observed.release,
            generation=self._kernel().generation,
            handovers=self.record.handovers,
            previous_release=self.record.previous_release,
            suspect=self.record.suspect,
            failed_activations=self.record.failed_activations,
        )

    async def _begin(self, record: Record) -> Actions:
        """Go on with the attempt of this record, or begin it."""
        here = self._handover
        if record is not here.record:
            await asyncio.to_thread(self._store.prepare_snapshot)
            here.machine, here.actions, here.record = Machine(), None, record
        return self._attempt()

    async def _checks(self, observed: Observed) -> list[Check]:
        foreign = self._shown(observed) in (Phase.foreign, Phase.inconsistent)
        facts = preflight.Facts(
            self._probed, self._kexec, observed, self._store, self.config, self.record, foreign, self._producers
        )
        return await self._thread.call(lambda: preflight.run(facts), "the checks", self.config.deadlines.activate)

    async def _target(self, request: Request, run: str) -> Target | None:
        """Take the images into memory and look at them: slow, so long before anyone is frozen."""
        if request.kernel_fd is None:
            if Step.load not in self.machine.done:
                raise Refused(
                    "No image is loaded and none was given", where="kexec", remedy="Add --image and --initrd."
                )
            return None
        if Step.load in self.machine.done:
            raise Refused(
                "This handover has its image already: another one would be ignored",
                where="--image",
                remedy="Jump into it with: khoctl kexec. Or begin again with: khoctl abort",
            )
        assert self._observed is not None
        running, limit = self._observed.cmdline, self.config.images.max_size
        return await asyncio.to_thread(take, request, request.kernel_fd, running, run, limit)

    async def _forward(self, last: Step, *, hold: bool) -> None:
        steps = left(self.machine, self._kernel().order, last)
        await self._handover.forward(steps, self._attempt(), hold=hold)

    async def _verify(self, observed: Observed) -> None:
        """Hold what arrived against the snapshot."""
        here, kernel = self._handover, self._probed.kernel
        here.machine = Machine(Phase.verifying)
        try:
            snapshot = self._store.snapshot()
            arrived = None
            if kernel is not None:
                deadline = self.config.deadlines.activate
                arrived = await self._thread.call(kernel.arrived, "reading the state that arrived", deadline)
            verdict = verify.compare(snapshot, arrived, here.record.generation, self._generation())
        except (KhoError, OSError) as error:
            verdict = Verdict(reason=str(error))
        here.machine = here.machine.to(Phase.degraded if verdict.reason else Phase.verified)
        here.reason = verdict.reason
        began = here.record.window_began_at
        here.record = replace(
            here.record,
            verdict=verdict,
            last_error=verdict.reason,
            boot_id=observed.boot_id,
            previous_release=here.record.release,
            release=observed.release,
            suspect="",
            failed_activations=0,
            handovers=here.record.handovers + 1,
            blackout_seconds=time.time() - began if began else None,
        )
        await here.keep_if_possible()
        here.say(verdict.reason or f"the state of {len(verdict.arrived)} producers: {', '.join(verdict.arrived)}")

    async def _observe(self, deadline: float) -> Observed:
        """Ask the kernel how it stands, in its own thread."""

        def look() -> tuple[Probed, Observed]:
            probed = self._probed if self._probed.kernel is not None else self._prober()
            return probed, reconcile.observe(self._kexec, probed.kernel)

        try:
            self._probed, observed = await self._thread.call(look, "saying how it stands", deadline)
        except OSError as error:
            raise Failed(f"The kernel cannot be asked: {error}", where=str(error.filename)) from error
        self._observed = observed
        return observed

    def _shown(self, observed: Observed | None) -> Phase:
        """The machine's phase, unless what the kernel says contradicts it."""
        under_way = self._busy.locked() and self.machine.phase not in RESTING | HELD | {Phase.foreign}
        if observed is None or under_way:
            return self.machine.phase
        return reconcile.shown(self._handover.current(), observed)

    def _attempt(self) -> Actions:
        """The actions of the attempt under way; made where it has none yet (a start, a first step)."""
        here = self._handover
        if here.actions is None or here.actions.barrier.broken:
            try:
                told = Verb.freeze if Step.freeze in here.machine.done else Verb.prepare
                barrier = Barrier(
                    self._producers(), here.record.run, here.say, told=told if here.machine.done else None
                )
            except ConfigError as error:
                if self.machine.phase in RESTING:
                    raise
                barrier = Barrier([], here.record.run, here.say)
                barrier.broken = error
            here.actions = Actions(self._probed.kernel, self._kexec, self._thread, self._store, self.config, barrier)
        return here.actions

    def _generation(self) -> Generation:
        return self._probed.kernel.generation if self._probed.kernel else Generation.none

    def _kernel(self) -> KhoKernel:
        if self._probed.kernel is None:
            raise Unsupported(self._probed.what, remedy=self._probed.remedy)
        return self._probed.kernel
