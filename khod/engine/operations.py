"""What others may ask of khod, one operation at a time: each asks the kernel first, then moves the handover."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Protocol

from khod import model, preflight, reconcile
from khod.config import Config
from khod.engine import restore as arrival
from khod.engine import status
from khod.engine.steps import Actions
from khod.engine.transaction import Handover
from khod.errors import ConfigError, Failed, KhoError, RecordError, Refused, Unsupported, UsageError
from khod.executor import Executor
from khod.guard import Seen, Severity
from khod.inhibitors import Inhibitor
from khod.kernel.kexec import Kexec
from khod.kernel.probe import Probed
from khod.kernel.protocol import KhoKernel, Tree
from khod.kernel.thread import KernelThread
from khod.machine import HELD, RESTING, STEPS, Machine, left
from khod.model import Check, Event, Observed, Phase, Plan, Status, Step, Verdict
from khod.muster import Muster
from khod.plan import planned
from khod.preflight.facts import Facts
from khod.producers.barrier import Barrier, Member, Producer, Verb
from khod.producers.peers import Peer, Peers, Terms
from khod.record import Owner, Process, Record, Store
from khod.region import Region
from khod.sessions import Sessions, session_of
from khod.target import Request, Target, take

NO_TREE = {
    "out": "The kernel has one only in the active phase: khoctl activate",
    "in": "This kernel was not reached by a handover, or it handed nothing over.",
    "snapshot": "One is taken at activation: khoctl activate",
}


def new_run() -> str:
    """Name a handover: twelve hex digits, which mark the next kernel's command line too."""
    return uuid.uuid4().hex[:12]


NOTHING = Request()
"""A request without an image."""

CAN_END = HELD | {STEPS[step].doing for step in (Step.prepare, Step.freeze, Step.activate, Step.load)}
"""Phases that a veto may still end: before the jump is asked for."""


class Watcher(Protocol):
    """What watches the host's devices: `khod.guard.Guard`."""

    def start(self, abort: Iterable[str], record: Iterable[str], devices: Mapping[str, Iterable[str]]) -> None:
        """Watch from now on, for devices of these subsystems and of the producers."""

    def stop(self) -> None:
        """Watch no more."""

    def look(self) -> None:
        """Tell at once of what has come."""


class Engine:
    """One host's handover. `tell` is called with every change, from the event loop."""

    def __init__(
        self,
        kexec: Kexec,
        prober: Callable[[], Probed],
        store: Store,
        config: Config,
        *,
        producers: Callable[[], list[Producer]],
        sessions: Sessions,
        guard: Callable[[Callable[[Seen], None]], Watcher],
        orderly: Executor,
        immediate: Executor,
        thread: KernelThread,
        tell: Callable[[Event], None],
        inhibitors: Callable[[], Awaitable[Sequence[Inhibitor] | None]] | None = None,
    ) -> None:
        self.config = config
        self._guard = guard(self._happened)
        self._handover = Handover(store, tell, self._guard.look)
        self._kexec = kexec
        self._prober = prober
        self._store = store
        self._sessions = sessions
        self.muster = Muster(producers, Peers(sessions, self._peer_left, self._peer_came))
        self._aside: set[asyncio.Task[None]] = set()
        self._executors = {False: orderly, True: immediate}
        self._thread = thread
        self._inhibitors = inhibitors
        self._probed = Probed(None, "not yet probed", "")
        self._observed: Observed | None = None
        self._busy = asyncio.Lock()
        self._expecting = asyncio.Event()
        """Set when it is known who may come back: a rollback at the start waits for them."""
        self._started = asyncio.Event()

    @property
    def machine(self) -> Machine:
        """Where the handover stands."""
        return self._handover.machine

    @property
    def record(self) -> Record:
        """What is known of it."""
        return self._handover.record

    @property
    def waiting(self) -> list[str]:
        """The producers whose answer is waited for."""
        return [member.producer.name for member in self._members() if member.waiting]

    async def start(self) -> None:
        """Compare the record with the kernel and do what that calls for; whoever asks meanwhile waits."""
        try:
            async with self._busy:
                await self._start()
        finally:
            self._expecting.set()
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
        at_rest = found.action is reconcile.Action.none and found.phase in RESTING
        if at_rest:
            here.record = reconcile.settled(here.record, found, observed)
        restoring = at_rest or found.action is reconcile.Action.verify
        self.muster.peers.expect(here.record.producers, here.record.run, restoring=restoring)
        self._expecting.set()
        here.machine = Machine(found.phase, here.record.done if found.phase not in RESTING else ())
        lacking = "" if self._probed.kernel else f"no handover is possible: {self._probed.what}"
        here.say(found.reason or lacking or "khod started")
        try:
            match found.action:
                case reconcile.Action.verify:
                    await self._verify(observed)
                case reconcile.Action.roll_back:
                    await here.roll_back(Failed(found.reason), self._attempt())
                case reconcile.Action.resume:
                    self._watch(self._attempt())
                case reconcile.Action.none if at_rest:
                    await here.keep_if_possible()
        finally:
            known = {session_of(here.record.run, holder.name) for holder in here.record.producers}
            if lost := self._sessions.close_all_but(known):
                here.say(f"closed {len(lost)} LUO sessions that no producer was told of")

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
            try:
                if target is not None:
                    preflight.require(await self._checks(target))
                    self._handover.say(f"the next command line: {target.cmdline}", words=target.words)
                actions = await self._begin(record)
                actions.target, actions.executor = target, self._executors[request.now]
                if request.now:
                    # The bulk of the dirty pages goes out before anyone is frozen; the executor's own
                    # sync then has little left.
                    await asyncio.to_thread(self._kexec.sync)
                await self._forward(Step.load if request.load_only else Step.execute, hold=request.hold)
            finally:
                if self._handover.actions is not None:
                    self._handover.actions.target = None
                if target is not None:
                    target.close()

    async def abort(self, *, force: bool = False) -> None:
        """Put everything back. With `force` also what khod did not do."""
        here = self._handover
        await self._started.wait()
        if self._busy.locked():
            if self.machine.phase is Phase.executing:
                raise Refused("The jump is under way and cannot be called back", where="abort")
            here.call_off(Failed("The handover was called off", where="abort"))
        if self.machine.phase is Phase.verifying:
            raise Refused("Producers are taking back what they left, which has no undo", remedy="khoctl verify")
        async with self._at_work():
            here.go_on()
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
            elif phase is Phase.failed:
                here.actions = None  # what failed may have been mended in a file since
            await here.roll_back(None, self._attempt())

    async def check(self, request: Request = NOTHING) -> list[Check]:
        """Run the preflight checks without touching anything; those of an image where one is given."""
        async with self._looked_at(request) as (_, checks):
            return checks

    async def plan(self, request: Request) -> Plan:
        """Tell what a handover would do, and what its checks say, without touching anything."""
        async with self._looked_at(request) as (target, checks):
            everyone, deadlines = self.muster.everyone(), self.config.deadlines
            machine = self.machine if self.machine.phase in HELD else Machine()
            steps = planned(machine, self._kernel(), everyone, deadlines, request, target)
            return Plan(steps, checks, target.cmdline if target else "", target.words if target else [])

    @asynccontextmanager
    async def _looked_at(self, request: Request) -> AsyncIterator[tuple[Target | None, list[Check]]]:
        """The next kernel that is asked about, for as long as it is looked at, and every check there is."""
        await self._started.wait()
        await self._observe(self.config.deadlines.activate)
        target = await self._taken(request, self.record.run or new_run()) if request.kernel else None
        try:
            yield target, [*await self._checks(), *(await self._checks(target) if target else ())]
        finally:
            if target is not None:
                target.close()

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
        try:
            producers = await self.producers()
        except ConfigError:  # khoctl check says which file
            producers = [member.shown() for member in self._members()]
        return status.build(self._handover, phase, self._observed, self._probed, producers, stale=stale)

    async def snapshots(self) -> list[model.Snapshot]:
        """List the trees that were kept when they left, the newest first."""
        return await asyncio.to_thread(self._store.snapshots.known)

    async def scratch(self) -> list[Region]:
        """Give the regions the next kernel must fit into."""
        await self._started.wait()
        return await self._thread.call(self._kernel().scratch, "reading scratch", self.config.deadlines.observe)

    async def tree(self, side: str) -> Tree:
        """Read a state tree: `out`, `in`, `snapshot` for the last that left, or one that was kept by its id.

        Before any has left, `snapshot` is the last that was taken.
        v3 has no outgoing tree unless active. The kernel's thread reads it: a read while another
        thread leaves the active phase is v3's deadlock.
        """
        found: Tree | None = None
        if side == "snapshot":
            boot = self._observed.boot_id if self._observed else ""
            found = await asyncio.to_thread(self._store.snapshots.last, boot)
        elif side in ("in", "out"):
            kernel = self._kernel()
            read = kernel.arrived if side == "in" else lambda: kernel.tree() if kernel.active() is not False else None
            try:
                found = await self._thread.call(read, "reading the tree", self.config.deadlines.activate)
            except OSError as error:
                raise Failed(f"The tree cannot be read: {error}", where=str(error.filename)) from error
        else:
            found = await asyncio.to_thread(self._store.snapshots.read, side)
            if found is None:
                raise UsageError(
                    f"{side!r} names no state tree",
                    where="TREE",
                    remedy="One of out, in, snapshot, or an id: khoctl dt list",
                )
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
        if self.machine.phase is Phase.verifying:
            for task in self._aside:  # the next khod says it again to whoever did not finish
                task.cancel()
            return
        if jumping is None:
            jumping = self.machine.phase is Phase.executing
        if jumping and Step.load in self.machine.done:
            if self.machine.phase in HELD:
                steps = left(self.machine, self._kernel().order, Step.execute)[:-1]
                await self._handover.forward(steps, self._attempt(), hold=False)
                self._handover.machine = self.machine.begin(Step.execute)
                await self._handover.keep()
            await self._attempt().barrier.leave()
            return
        if self.machine.phase is Phase.executing:
            async with self._busy:  # the executor comes back soon, and then it is known whether the host goes
                pass
        if self._busy.locked() or self.machine.phase in HELD | {Phase.executing}:
            await self.abort()

    async def register(self, name: str, owner: Owner, process: Process, terms: Terms) -> Peer:
        """Take a producer in that has connected; it takes part from the next step on."""
        await self._expecting.wait()
        if self.machine.phase is Phase.executing and not self.muster.peers.awaits(name):
            raise Refused("The host is on its way into the next kernel", where=name, remedy="Connect again there.")
        return self.muster.register(name, owner, process, terms, self.config.producers.max_per_user)

    def _peer_came(self, peer: Peer) -> None:
        where = peer.owner.unit or "no unit"
        self._handover.say(f"producer {peer.name} registered (user {peer.owner.uid}, {where})", Member(peer).shown())
        peer.late = lambda: self._beside(self._late(peer))
        if peer.restoring and self.machine.phase in RESTING:
            peer.late()

    def _peer_left(self, peer: Peer) -> None:
        self._handover.say(f"producer {peer.name} left", Member(peer).shown())
        if peer.told and not peer.restoring:
            self.call_off(
                Refused(
                    f"Producer {peer.name} went away after it was told to {peer.told}: its connection ended",
                    where=f"{peer.kind} {peer.name}",
                    remedy="Look why it ended, then begin again.",
                )
            )

    async def forget(self, name: str) -> None:
        """Free what a producer left before the jump and will not claim: the next handover would lose it."""
        async with self._operation():
            await self.muster.peers.forget(name)
            here = self._handover
            here.record = replace(
                here.record, producers=tuple(holder for holder in here.record.producers if holder.name != name)
            )
            await here.keep()
            here.say(f"what {name} left is freed")

    async def producers(self) -> list[model.Producer]:
        """Every producer, in the order they are told, with its last answer."""
        await self._started.wait()
        return self.muster.shown(self._members())

    def _members(self) -> list[Member]:
        here = self._handover
        return here.actions.barrier.members if here.actions else []

    async def rehearse(self, name: str) -> list[model.Producer]:
        """Drive one producer through prepare, freeze, thaw and cancel, with the kernel left alone; its answers."""
        async with self._operation():
            here, observed = self._handover, await self._observe(self.config.deadlines.activate)
            if self.machine.phase not in RESTING:
                raise Refused(
                    f"A producer cannot be tested now ({self.machine.phase.value})", remedy="khoctl status says more."
                )
            if here.record.producers:
                raise Refused(
                    "Producers have not taken back what they left before the jump: a test could lose it",
                    where=", ".join(holder.name for holder in here.record.producers),
                    remedy="Start them first, or: khoctl producers forget NAME",
                )
            found = self.muster.find(name)
            before, record = here.machine, here.record
            here.machine, here.actions = Machine(), None
            here.record = replace(record, run=new_run(), boot_id=observed.boot_id, producers=(), timings=())
            answers: list[model.Producer] = []

            def heard(member: Member) -> None:
                here.heard(member)
                if not member.waiting:
                    answers.append(member.shown())

            actions = self._act(Barrier.of([found], here.record.run, heard))
            try:
                await here.forward((Step.prepare, Step.freeze), actions, hold=False)
                await here.roll_back(None, actions, said="the test is over")
            finally:
                if here.machine.phase is Phase.idle:
                    here.machine, here.record = before, record
                    await here.keep_if_possible()
            return answers

    def call_off(self, cause: KhoError) -> None:
        """End the handover under way for `cause`, if there is one that still can be ended."""
        if self.machine.phase not in CAN_END:
            return
        if self._busy.locked():
            self._handover.call_off(cause)
        else:
            self._beside(self._end(cause))

    async def _end(self, cause: KhoError) -> None:
        """Roll a handover back that waited for orders."""
        async with self._at_work():
            if self.machine.phase in HELD:
                with suppress(KhoError):  # it stands in the record, and everyone was told
                    await self._handover.roll_back(cause, self._attempt())

    def _watch(self, actions: Actions) -> None:
        """Watch for devices that come and go, while this attempt lasts; Failed where that is not possible."""
        actions.joined = lambda: self._watch(actions)
        settings = self.config.guard
        devices = {member.producer.name: member.producer.devices for member in actions.barrier.members}
        self._guard.start(settings.abort, settings.record, devices)

    def _happened(self, seen: Seen) -> None:
        sentence = seen.sentence()
        self._handover.say(sentence)
        if seen.severity is Severity.abort:
            self.call_off(
                Refused(
                    f"The hardware changed during the handover: {sentence}",
                    where="guard",
                    remedy="Begin again when it is quiet; guard.abort in khod.toml says what counts.",
                )
            )

    def _beside(self, work: Coroutine[None, None, None]) -> None:
        """Run something nobody waits for; it is ended with khod."""
        task = asyncio.ensure_future(work)
        self._aside.add(task)
        task.add_done_callback(self._aside.discard)

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
        self._handover.go_on()
        async with self._at_work():
            yield

    @asynccontextmanager
    async def _at_work(self) -> AsyncIterator[None]:
        """Hold the handover; afterwards the guard watches on only where it waits half-way."""
        async with self._busy:
            try:
                yield
            finally:
                if self.machine.phase not in HELD:
                    self._guard.stop()

    async def _ready(self, *, wants_load: bool) -> Record:
        """Refuse before anything is touched; else give the record to go on with, a fresh one from rest."""
        observed = await self._observe(self.config.deadlines.activate)
        if self.machine.phase not in RESTING | HELD | {Phase.foreign}:
            raise Refused(
                f"A handover cannot go on from here ({self.machine.phase.value}): {self._handover.reason}",
                where="khod",
                remedy=status.SAYS[self.machine.phase][1],
            )
        preflight.require([check for check in await self._checks() if wants_load or check.name != "kexec"])
        if self.machine.phase in HELD:
            return self.record
        return Record(
            run=new_run(),
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
            about = record.run, record.boot_id, record.release, record.generation
            await asyncio.to_thread(self._store.snapshots.prepare, *about, self.config.snapshots)
            here.machine, here.actions, here.record = Machine(), None, record
        actions = self._attempt()
        self._watch(actions)
        return actions

    async def _checks(self, target: Target | None = None) -> list[Check]:
        """Run the checks of this host, or those of the next kernel, after the kernel was asked how it stands."""
        observed = self._observed
        assert observed is not None, "the kernel was asked before"
        foreign = self._shown(observed) in (Phase.foreign, Phase.inconsistent)
        inhibitors = None if target or self._inhibitors is None else await self._inhibitors()
        facts = Facts(
            self._probed,
            self._kexec,
            observed,
            self._store,
            self.config,
            self.record,
            foreign,
            self.muster.everyone,
            inhibitors,
            target,
        )
        return await self._thread.call(lambda: preflight.run(facts), "the checks", self.config.deadlines.activate)

    async def _target(self, request: Request, run: str) -> Target | None:
        """Take the images into memory and look at them: slow, so long before anyone is frozen."""
        if request.kernel is None:
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
        return await self._taken(request, run)

    async def _taken(self, request: Request, run: str) -> Target:
        assert self._observed is not None, "the kernel was asked before"
        return await asyncio.to_thread(take, request, self._observed.cmdline, run, self.config.images)

    async def _forward(self, last: Step, *, hold: bool) -> None:
        steps = left(self.machine, self._kernel().order, last)
        await self._handover.forward(steps, self._attempt(), hold=hold)

    async def _verify(self, observed: Observed) -> None:
        """Hold what arrived against the snapshot, and give the producers back what they left."""
        here = self._handover
        await arrival.enter(here, observed)
        verdict = await arrival.look(
            here, self._store, self._probed.kernel, self._thread, self.config.deadlines.activate
        )
        barrier = self.muster.resumed(here.record.run, here.heard, here.record.producers, None)
        for member in barrier.members:
            if not member.producer.restores:
                member.told = ""  # it has nothing to take back, and is told nothing
        self._act(barrier)
        if barrier.broken:
            await arrival.conclude(here, arrival.unreadable(verdict, barrier.broken))
        elif any(member.producer.restores for member in barrier.members):
            # Not waited for here: a producer may start only after khod is ready.
            self._beside(self._bring_back(barrier, verdict))
        else:
            here.record = replace(here.record, producers=())
            await arrival.conclude(here, verdict)

    async def _bring_back(self, barrier: Barrier, verdict: Verdict) -> None:
        async with self._busy:
            verdict = await arrival.bring_back(self._handover, barrier, verdict, self.config.deadlines.restore)
            await arrival.conclude(self._handover, verdict)
        for peer in self.muster.peers.known():
            if peer.connected and peer.restoring:  # it came when nobody waited for it any more
                self._beside(self._late(peer))

    async def _late(self, peer: Peer) -> None:
        """Give a producer that comes after the verification what it left, and correct the verdict."""
        here = self._handover
        async with self._busy:
            verdict = here.record.verdict or Verdict()
            if here.machine.phase in RESTING and peer.restoring:
                barrier = Barrier.of([peer], here.record.run, here.heard)
                verdict = await arrival.bring_back(here, barrier, verdict, peer.timeout)
                if here.machine.phase in (Phase.verified, Phase.degraded):
                    await arrival.conclude(here, verdict)

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
        if here.actions is not None and not here.actions.barrier.broken:
            return here.actions
        if here.machine.done:
            last: Verb | None = Verb.freeze if Step.freeze in here.machine.done else Verb.prepare
            if here.machine.phase is Phase.failed and here.record.producers:
                last = None
            barrier = self.muster.resumed(here.record.run, here.heard, here.record.producers, last)
        else:
            barrier = self.muster.barrier(here.record.run, here.heard)
        return self._act(barrier, self.muster.everyone)

    def _act(self, barrier: Barrier, late: Callable[[], list[Producer]] = list) -> Actions:
        """Begin an attempt with this barrier; `late` gives those that may still join it."""
        here = self._handover
        kernel, config = self._probed.kernel, self.config
        here.actions = Actions(kernel, self._kexec, self._thread, self._store, config, barrier, late)
        here.actions.resume(here.machine.done)
        return here.actions

    def _kernel(self) -> KhoKernel:
        if self._probed.kernel is None:
            raise Unsupported(self._probed.what, remedy=self._probed.remedy)
        return self._probed.kernel
