# SPDX-License-Identifier: LGPL-2.1-or-later
"""One khod on the modelled host: the one place that knows how khod is put together and spoken to.

It stands for `khod.daemon` and `khod.server`: builds the engine over the model's collaborators, serves producers'
connections, starts and stops it as systemd does.
"""

import asyncio
import functools
import typing
from asyncio import events
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import khod.engine.queries
import khod.kernel.account
import khod.kernel.luo
import khod.preflight.holders
import khod.producers.claim
import khod.producers.peer
import khod.producers.peers
import khod.producers.sessions
import khod.systemd.manager
import khod.systemd.shutdown
import khod.target.target
import khod.values
from khod.abi.statx import Statx
from khod.config import Config, Images, Settings
from khod.deferred import load_deferred
from khod.engine import Engine
from khod.engine.guard import Seen
from khod.engine.recorder import Sources
from khod.errors import KhoError
from khod.handover.machine import HELD, RESTING, STEPS
from khod.handover.record import Process as Identity
from khod.handover.record import Store
from khod.history.model import AttemptRecord, FileOrigin
from khod.history.trial import ImageTrial, Past
from khod.images import sealed
from khod.images.kernel import KernelImageInfo, UnpackedImage, unpack_image
from khod.images.sealed import Sealed
from khod.kernel import cmdline
from khod.kernel.kexec import Kexec
from khod.kernel.luo import Luo
from khod.kernel.memory import MemoryBounds
from khod.kernel.probe import Probed, probe_kho
from khod.kernel.thread import Workers
from khod.model import Event, Phase, Status, Step
from khod.producers.barrier import Participant
from khod.producers.sessions import Sessions
from khod.provenance.verify import TakenFile
from khod.simulated.kernel import build_image
from khod.systemd import fdstore, logind, shutdown
from khod.systemd.dbus import BusError
from khod.systemd.logind import Inhibitor
from khod.systemd.manager import Manager
from khod.target.target import Given, Request, Target
from tests.model.calls import KernelCalls
from tests.model.clock import VirtualLoop
from tests.model.connection import Connection, KeptRegistrations, Watcher, give
from tests.model.disk import Disk
from tests.model.faults import EXCEPTIONS, FOREVER, Faults, Fiber, Killed
from tests.model.kernel import RELEASE, STATELESS, ImageFile, MemoryKernel
from tests.model.patches import Replacement
from tests.model.process import Pool, PooledWorker, Process, status_of
from tests.model.systemd import KhodsStore, ServiceManager

CAN_END = HELD | {STEPS[step].doing for step in (Step.prepare, Step.freeze, Step.activate, Step.load)}
"""Phases in which a device that goes away, or a producer, ends the handover."""

load_deferred()  # before the files and the clock are those of the model
IMAGE = build_image()

get_type_hints = functools.cache(typing.get_type_hints)
"""Three quarters of the time that reading a record takes."""


@functools.cache
def about(kind: str) -> KernelImageInfo:
    """What an image of this kind says of itself."""
    with sealed.seal_pieces([IMAGE], "vmlinuz") as whole:
        bundle = unpack_image(whole, "x86_64", 1 << 30)
    if bundle.kernel is not whole:
        bundle.close()
    shown = replace(bundle.about, version=RELEASE[kind], banner="")
    return replace(shown, marks=frozenset()) if kind == STATELESS else shown


def replacements(khod_of: "Callable[[], Khod]") -> list[Replacement]:
    """What khod's modules find instead of what needs a real host; `khod_of` gives the one that runs."""
    return [
        (khod.target.target, "seal_request", lambda request, _bounds: khod_of()._take(request)),
        (khod.target.target, "build_target", lambda files, *arguments, **_: khod_of()._build(files, *arguments)),
        (khod.systemd.shutdown, "run_command", lambda *argv: khod_of()._systemctl(*argv)),
        (khod.systemd.manager, "ask_systemd", lambda question, _seconds: khod_of()._ask_systemd(question)),
        (khod.values, "get_type_hints", get_type_hints),
        (khod.producers.peer, "wait_ended", lambda process: khod_of()._ended(process)),
        (khod.producers.peers, "is_alive", lambda process: khod_of()._lives(process)),
        (khod.preflight.holders, "is_alive", lambda process: khod_of()._lives(process)),
        *(
            (module, "statx", statx)
            for module in (khod.kernel.account, khod.kernel.luo, khod.producers.claim, khod.producers.sessions)
        ),
    ]


def statx(fd: int) -> Statx:
    """Describe a file of the model's."""
    found = status_of(fd)
    return Statx(found.st_blksize, found.st_mode, found.st_ino, found.st_size, found.st_blocks, (0, found.st_dev))


async def _forget_attempt(_attempt: AttemptRecord) -> None:
    """The history is not modelled."""


async def _verify_nothing(*_asked: object) -> list[FileOrigin]:
    """Who made an image is not modelled."""
    return []


async def _know_run(_run: str) -> bool:
    return True


async def _know_no_past(digest: str) -> Past:
    return Past(ImageTrial(digest))


class Scene(Protocol):
    """What a khod needs of the host it runs on."""

    kernel: MemoryKernel
    disk: Disk
    faults: Faults
    systemd: ServiceManager
    config: Config
    world_loop: VirtualLoop
    registrations: list[str]
    """Lines of a file below /run."""

    def file_producers(self) -> list[Participant]:
        """Those with a file, as khod may tell them; ConfigError."""

    def process_by(self, pid: int) -> Process | None:
        """A producer's process, by its number."""

    def heard(self, event: Event) -> None:
        """What khod tells everyone."""

    def record_is_hidden(self) -> None:
        """A read says that there is no record, which is what an operator who removes it comes to."""

    def jumped(self, by: str) -> None:
        """The kernel that runs has gone."""

    def finished(self, session: str) -> None:
        """A session of the previous kernel was finished."""

    def synced(self) -> None:
        """Dirty pages were written back."""


@dataclass
class Operation:
    """Something that was asked of khod. `result` or `error` once it is over."""

    kind: str
    began: float
    task: "asyncio.Task[Any] | None" = None
    result: Any = None
    error: BaseException | None = None
    ended: float | None = None
    bound: float | None = None
    """Until when it must be over, in virtual time."""
    about: str = ""
    faults: int = 0
    """How many faults had fired when it began."""
    phase: Phase = Phase.idle
    """Where khod stood as it began."""
    alone: bool = True
    """Whether nothing else was under way then."""
    noted: bool = False
    """Whether the invariants have seen its end."""

    @property
    def over(self) -> bool:
        return self.ended is not None

    @property
    def outcome(self) -> str:
        if not self.over:
            return "under way"
        return "done" if self.error is None else f"{type(self.error).__name__}: {self.error}"


T = TypeVar("T")


class _AskedSystemd:
    """What `khod.systemd.manager.Systemd` tells of this host."""

    def __init__(self, khod: "Khod") -> None:
        self._khod = khod

    async def describe_manager(self) -> Manager:
        return Manager(262 if self._khod.scene.systemd.carries else 260, "")

    async def system_state(self) -> str:
        return "running" if self._khod.scene.systemd.job is None else "stopping"

    async def read_properties(self, _unit: str, _interface: str) -> dict[str, Any]:
        systemd = self._khod.scene.systemd
        await self._khod.async_point("systemd.asked", "before")
        if not systemd.answers:
            raise BusError("no answer")
        kexec = systemd.job is not None and systemd.job.kexec
        return {"ActiveState": "inactive", "Job": (17, "/job/17") if kexec else (0, "/")}


class Khod:
    """One incarnation of khod, from its start to its end."""

    def __init__(self, scene: Scene, loop: VirtualLoop, pid: int) -> None:
        self.scene, self.loop = scene, loop
        self.process = Process("khod", pid)
        self.connections: list[Connection] = []
        self.operations: list[Operation] = []
        self.pools: list[Pool] = []
        self.last_event: Event | None = None
        self.started = False
        self.stopping = False
        self._hanging: list[asyncio.Future[None]] = []
        loop.pools = self._in_pool
        self._default = Pool(self.process, loop, scene.faults, None)
        self.pools.append(self._default)

    def build(self) -> None:
        """Put it together, as its process does before it starts; `replacements` are in place."""
        previous = events._get_running_loop()
        events._set_running_loop(self.loop)
        try:
            self.engine = self._engine()
        finally:
            events._set_running_loop(previous)

    def _engine(self) -> Engine:
        scene = self.scene
        calls = KernelCalls(
            scene.kernel, self.process, self.point, lambda: scene.jumped("khod"), scene.synced, scene.finished
        )
        kexec = Kexec(calls)
        workers = Workers(
            kernel=self._worker("The kernel", 1),
            observer=self._worker("The kernel", 1, 64),
            disk=self._worker("The file system", 1),
            files=self._worker("A file system", 2),
            frozen=self._worker("A file system", 2),
            queries=self._worker("A check", 2, 256),
            history=self._worker("The history database", 1, 64),
        )
        store = KhodsStore(scene.systemd, self.point, self._settle)
        sessions = Sessions(
            Luo(calls),
            workers.kernel,
            store,
            passed=scene.systemd.pass_to(self.process),
            memory=lambda: MemoryBounds(1 << 40, 1 << 40),
        )
        jump = shutdown.make_immediate(kexec, workers, lambda: self.engine.settings.current.deadlines.execute)

        async def orderly() -> None:
            await shutdown.start_orderly(sessions=sessions.holds_any)

        def prober() -> Probed:
            self.point("prober", "before")
            return probe_kho(calls)

        return Engine(
            kexec,
            prober,
            Store(scene.disk.directory),
            Settings(scene.config),
            producers=self._producers,
            sessions=sessions,
            guard=self._made_guard,
            orderly=orderly,
            immediate=jump,
            workers=workers,
            tell=self._tell,
            inhibitors=self._inhibitors,
            shutdown=self._on_the_way_before_an_abort,
            goes_down=shutdown.goes_down,
            registrations=KeptRegistrations(self, scene.registrations),
            remember=_forget_attempt,
            past=_know_no_past,
            verify=_verify_nothing,
            sources=Sources(knows=_know_run),
        )

    # How it stands, by its own word

    @property
    def phase(self) -> Phase:
        return self.engine.machine.phase

    @property
    def reason(self) -> str:
        return self.engine._transaction.reason

    @property
    def done(self) -> tuple[Step, ...]:
        return self.engine.machine.done

    @property
    def calls_hang(self) -> bool:
        """Whether a blocking call of it is under way."""
        return any(pool.hung for pool in self.pools)

    @property
    def busy(self) -> bool:
        """Whether something that was asked of it is not over."""
        return any(not operation.over for operation in self.operations)

    @staticmethod
    def at_rest(status: Status) -> bool:
        """Whether khod says that nothing of its own is held anywhere."""
        return not status.stale and (status.phase in RESTING or status.phase is Phase.foreign)

    @staticmethod
    def says_foreign(status: Status) -> bool:
        """Whether khod says that somebody else is at work in the kernel."""
        return bool(getattr(status, "foreign", status.phase is Phase.foreign))

    @staticmethod
    def outcome(status: Status) -> Phase:
        """What the handover of this boot came to, by khod's word."""
        found = getattr(status, "outcome", status.phase)
        return found if isinstance(found, Phase) else status.phase

    @staticmethod
    def not_undone(status: Status) -> set[str]:
        """Steps that are reported as not put back, by name."""
        return set(status.left)

    # What is asked of it

    def begin(self, kind: str, work: Callable[[], Coroutine[Any, Any, Any]], about: str = "") -> Operation:
        """Ask something; it is begun with the loop's next turn."""
        operation = Operation(
            kind, self.loop.time(), about=about, faults=self.scene.faults.fired, phase=self.phase, alone=not self.busy
        )
        for other in self.operations:
            other.alone = other.alone and other.over
        operation.task = self.loop.create_task(self._carry_out(operation, work))
        self.operations = [each for each in self.operations if not (each.over and each.noted)]
        self.operations.append(operation)
        return operation

    async def _carry_out(self, operation: Operation, work: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        try:
            operation.result = await work()
        except Killed:
            raise
        except BaseException as error:  # noqa: BLE001 - the outcome, whatever it is
            operation.error = error
        operation.ended = self.loop.time()

    def serve(self, work: Coroutine[Any, Any, Any]) -> None:
        self.loop.create_task(work)

    def start(self) -> Operation:
        """Do what systemd's ExecStart= does."""

        async def start() -> None:
            with suppress(KhoError):
                await self.engine.start()
            self.started = True

        return self.begin("start", start)

    def stop(self) -> Operation:
        """Do what SIGTERM does."""

        async def stop() -> None:
            self.stopping = True
            jumping, going_down = await asyncio.gather(self._on_the_way(), shutdown.goes_down())
            await self.engine.stop(jumping=jumping, going_down=going_down)
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            if others:
                await asyncio.wait(others)

        return self.begin("stop", stop)

    def kexec(self, kind: str | None, *, now: bool, load_only: bool, hold: bool) -> Operation:
        """khoctl kexec, with an image of this kind or without one."""

        async def jump() -> None:
            given = None
            if kind is not None:
                fd = self.process.open(ImageFile(kind, IMAGE))
                given = Given(fd, kind)
            try:
                await self.engine.kexec(Request(given, now=now, load_only=load_only, hold=hold))
            finally:
                if given is not None:
                    self.process.close(given.fd)

        return self.begin("load" if load_only else "kexec", jump)

    def reload(self, config: Config) -> None:
        """systemctl reload."""
        self.engine.settings.current = config

    def release_hung(self) -> None:
        """Let whatever hangs for ever come back."""
        for pool in self.pools:
            pool.release()
        hanging, self._hanging = self._hanging, []
        for future in hanging:
            self.loop.call_soon(give, future, None)

    def die(self, *, completes: bool = False) -> None:
        """SIGKILL, or its kernel's end: none of it runs any more."""
        if not self.process.alive:
            return
        self.process.end()
        for connection in self.connections:
            connection.lost()
        for pool in self.pools:
            pool.abandon(completes=completes)

    # Its collaborators

    def point(self, site: str, when: str) -> None:
        """A call that is about to be made, or has been: it may fail, hang, or be the last."""
        if not self.process.alive:
            raise Killed
        faults = self.scene.faults
        if faults.kills(site, when):
            self.die()
            raise Killed
        fault = faults.at(site, when)
        if fault is None:
            return
        if fault.seconds:
            if Fiber.current is not None:
                Fiber.current.stall(fault.seconds)
            return
        if (site, fault.error) == ("disk.read", "ENOENT"):
            self.scene.record_is_hidden()
        raise EXCEPTIONS[fault.error](site)

    async def async_point(self, site: str, when: str) -> None:
        """The same for a coroutine."""
        if not self.process.alive or self.scene.faults.kills(site, when):
            self.die()
            raise Killed
        fault = self.scene.faults.at(site, when)
        if fault is None:
            return
        if fault.error:
            raise EXCEPTIONS[fault.error](site)
        if fault.seconds != FOREVER:
            await asyncio.sleep(fault.seconds)
            return
        future: asyncio.Future[None] = self.loop.create_future()
        self._hanging.append(future)
        await future

    def _producers(self) -> list[Participant]:
        self.point("producers", "before")
        return self.scene.file_producers()

    def _made_guard(self, happened: Callable[[Seen], None]) -> Watcher:
        self.guard = Watcher(self, happened)
        return self.guard

    def _tell(self, event: Event) -> None:
        self.point("tell", "before")
        self.last_event = event
        self.scene.heard(event)
        self.point("tell", "after")

    async def _settle(self) -> None:
        async with asyncio.timeout(fdstore.SETTLE_SECONDS):
            await self.async_point("fdstore.settle", "before")

    async def _inhibitors(self) -> list[Inhibitor] | None:
        try:
            async with asyncio.timeout(logind.ASKING):
                await self.async_point("inhibitors", "before")
        except TimeoutError:
            return None
        return []

    def _in_pool(self, pool: Any, function: Callable[[], Any]) -> "asyncio.Future[Any]":
        return self._default.run(function) if pool is None else pool.run(function)

    def _worker(self, subject: str, threads: int, max_waiting: int = 1 << 16) -> PooledWorker:
        made = Pool(self.process, self.loop, self.scene.faults, threads)
        self.pools.append(made)
        return PooledWorker(made, subject, max_waiting)

    def _lives(self, process: Identity) -> bool:
        """khod.producers.identity.is_alive."""
        found = self.scene.process_by(process.pid)
        return found is not None and found.alive and process == Identity(process.pid, process.pid)

    def _take(self, request: Request) -> list[TakenFile]:
        self.point("files.take", "before")
        assert request.kernel is not None, "a request with an image"
        kind = request.kernel.name
        return [TakenFile("kernel", Sealed(self.process.open(ImageFile(kind, IMAGE)), len(IMAGE), kind))]

    def _build(self, files: list[TakenFile], _request: Request, running: str, run: str, _bounds: Images) -> Target:
        whole = files[0].file
        line = cmdline.compose_cmdline(running, None, None, run, 2047)
        words = cmdline.compare_cmdlines(running, line)
        bundle = UnpackedImage(("bzImage",), whole, None, None, "", "", about(whole.name))
        return Target(whole, apart=bundle, cmdline=line, words=words)

    async def _systemctl(self, *_argv: str) -> tuple[int, str]:
        """What `khod.systemd.shutdown` runs."""
        await self.async_point("systemctl", "before")
        self.systemctl_kexec()
        await self.async_point("systemctl", "after")
        return 0, ""

    async def _ask_systemd(self, question: Callable[["_AskedSystemd"], Awaitable[T]]) -> T | None:
        try:
            return await question(_AskedSystemd(self))
        except BusError:
            return None

    def systemctl_kexec(self) -> None:
        """systemctl kexec was taken."""
        self.scene.systemd.begin(kexec=True, by="khod", run=self.engine.record.run)

    async def _on_the_way(self) -> bool | None:
        return await shutdown.kexec_job_pending()

    async def _on_the_way_before_an_abort(self) -> bool | None:
        return await shutdown.kexec_job_pending(shutdown.ASK_UNDO_SECONDS)

    async def _ended(self, process: Identity | None) -> None:
        """khod.producers.identity.wait_ended."""
        future: asyncio.Future[None] = self.loop.create_future()
        if process is None:
            await future
            return
        found = self.scene.process_by(process.pid)
        if found is None or not found.alive:
            return
        found.on_end.append(lambda: (self.loop.call_soon(give, future, None), None)[1])
        await future
