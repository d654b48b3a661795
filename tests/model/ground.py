# SPDX-License-Identifier: LGPL-2.1-or-later
"""The modelled host: what it is made of, how time passes on it, and how kernels follow each other."""

import asyncio
import itertools
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from khod.config import Checks, Config, Deadlines, Policy
from khod.errors import ConfigError
from khod.handover.directory import FILE_NAME
from khod.handover.session_names import session_of
from khod.model import Event, Status
from khod.producers.barrier import Participant
from tests.model import host, process
from tests.model.clock import Clock, Timeline, VirtualLoop
from tests.model.connection import Connection, give
from tests.model.disk import Disk
from tests.model.faults import Faults, Killed
from tests.model.host import CAN_END, Khod, Operation
from tests.model.invariants import Invariants
from tests.model.kernel import CMDLINE, V3, Image, MemoryKernel
from tests.model.patches import installed, operating_system
from tests.model.peer import Gone, PeerProcess
from tests.model.process import Process
from tests.model.producers import TABLE, FileProducer, Left, Service
from tests.model.systemd import ServiceManager

BASE = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())
STOP_SECONDS = 600.0
"""TimeoutStopSec= of the unit: then comes SIGKILL."""
START_AGAIN_SECONDS = 2.0
"""After a boot, until the service manager has started who connects."""
LONG = 100_000.0
"""Longer than anything waits."""

FILES = ("f0", "f1", "f2")
PEERS = ("p0", "p1")
NAMES = (*FILES, *PEERS)
VERBS = ("prepare", "freeze", "thaw", "cancel", "restore", "finish")
MARK = "khod.run="

CONFIGS = (
    Config(),
    Config(policy=Policy(after_daemon_died="resume")),
    Config(deadlines=Deadlines(prepare=5, freeze=2, activate=5, load=5, execute=5, rollback=5, restore=10)),
    Config(checks=Checks(formats="warn", claims="warn"), policy=Policy(max_failed_activations=100)),
    Config(policy=Policy(after_daemon_died="resume", after_forgetful_abort="warn"), deadlines=Deadlines(rollback=2)),
)


@dataclass(frozen=True)
class Setting:
    """What the host is like when an example begins: the producers' names, and whether those with a file restore."""

    kernel: str = V3
    files: tuple[str, ...] = ("f0", "f1")
    peers: tuple[str, ...] = ("p0",)
    config: int = 0
    chained: bool = False
    """Whether each producer is told after the one before it."""


class Ground:
    """One host: its parts, how time passes on it, how khod starts and ends on it, and its boots."""

    def __init__(self, setting: Setting = Setting(), known: frozenset[str] = frozenset()) -> None:
        self.setting = setting
        self.clock, self.faults = Clock(), Faults()
        self.timeline = Timeline(self.clock)
        self.world_loop = VirtualLoop(self.clock)
        self.timeline.loops = [self.world_loop]
        self._names, self._pids = itertools.count(1), itertools.count(100)
        self._directory = Path(tempfile.mkdtemp(prefix="khod-model-", dir=BASE))
        self.disk = Disk(self._directory, self._point)
        self.config = CONFIGS[setting.config]
        self.kernel = MemoryKernel(setting.kernel, lambda: str(self.new_uuid()))
        self.systemd = ServiceManager()
        self.left: dict[str, Left] = {}
        self.registrations: list[str] = []
        self.services: dict[str, Service] = {}
        self.files: dict[str, FileProducer] = {}
        self.shadows = {PEERS[0]: Service(PEERS[0], self, f"file {PEERS[0]}")}
        """Those with a file whose name is a peer's, too."""
        self.broken = False
        """Whether a file of a producer's cannot be read."""
        self.khod: Khod | None = None
        self.graveyard: list[Khod] = []
        self.events: list[Event] = []
        self.log: list[tuple[Any, ...]] = []
        self._waiting: list[asyncio.Future[None]] = []
        self.lose = self.cold = self.change = False
        """What the next jump comes to: nothing arrives, it is a plain reset, or the state arrives changed."""
        self.boot_by, self.boot_run, self.tree_arrived = "power", "", False
        self.invariants = Invariants(self, known)
        self._replacements = [*operating_system(self), *host.replacements(self._running)]
        for name in NAMES:
            peer = name in PEERS
            self.services[name] = (
                PeerProcess(name, self, self._connect, lambda: next(self._pids)) if peer else Service(name, self)
            )
        for number, name in enumerate(setting.files):
            self._add_file(name, after=setting.files[number - 1 : number] if setting.chained else ())
        with installed(self._replacements):
            self._start_peers()
            self.start_khod(2 * START_AGAIN_SECONDS)

    # What the host is made of

    def new_uuid(self) -> uuid.UUID:
        return uuid.UUID(int=(next(self._names) * 0x9E3779B97F4A7C15F39CC0605CEDC835) % (1 << 128))

    def file_producers(self) -> list[Participant]:
        if self.broken:
            raise ConfigError("not valid TOML", where="producers.d/f0.toml:1")
        return [self.files[name] for name in sorted(self.files)]

    def process_by(self, pid: int) -> Process | None:
        for service in self.services.values():
            if isinstance(service, PeerProcess) and service.process.pid == pid:
                return service.process
        return None

    def everyone(self) -> list[Service]:
        """Every holder of state there could be."""
        return [*self.services.values(), *self.shadows.values()]

    def peers(self) -> list[PeerProcess]:
        return [service for service in self.services.values() if isinstance(service, PeerProcess)]

    def heard(self, event: Event) -> None:
        self.events.append(event)
        self.invariants.heard(event)

    def record_is_hidden(self) -> None:
        self.invariants.damaged = self.invariants.removed = True

    def synced(self) -> None:
        self.disk.sync()

    def finished(self, session: str) -> None:
        self.invariants.finished(session)

    async def async_point(self, site: str, when: str) -> None:
        if self.khod is not None:
            await self.khod.async_point(site, when)

    async def khod_is_up(self) -> None:
        while self.khod is None:
            future = self.world_loop.create_future()
            self._waiting.append(future)
            await future

    def lost_member(self, service: Service) -> None:
        """A producer that took part is gone: the handover is to end."""
        khod = self.khod
        if not isinstance(service, PeerProcess) or khod is None or self.is_excused(service):
            return
        if khod.started and service.registered:
            self._must_end(f"{service.name} is gone")

    def is_excused(self, service: Service) -> bool:
        """Tell whether a producer may go: frozen, with the host on its way into the kexec, as systemd says."""
        systemd = self.systemd
        return service.frozen and self.kernel.loaded and systemd.job is not None and systemd.answers

    def _must_end(self, why: str) -> None:
        if self.khod is not None and self.khod.phase in CAN_END:
            self.invariants.must_end[self.khod.engine.record.run] = why

    def _point(self, site: str, when: str) -> None:
        if self.khod is not None:
            self.khod.point(site, when)

    def _running(self) -> Khod:
        if self.khod is None:
            raise Killed
        return self.khod

    def _connect(self, peer: PeerProcess) -> Connection:
        if self.khod is None or self.khod.stopping:
            raise Gone
        return Connection(self.khod, peer)

    def _add_file(self, name: str, after: tuple[str, ...] = ()) -> None:
        service = self.shadows.get(name) or self.services[name]
        self.files[name] = FileProducer(
            name,
            10.0,
            after,
            service=service,
            has_restore=name != FILES[-1],
            dead=self._dead_check(),
        )

    def _dead_check(self) -> Callable[[], bool]:
        return lambda: self.khod is None or not self.khod.process.alive

    def _start_peers(self) -> None:
        for peer in self.peers():
            if peer.name in self.setting.peers:
                self.world_loop.call_later(START_AGAIN_SECONDS, peer.start)

    # How time passes, and what ends

    def run(self, then: Any) -> None:
        """Let it go on: `end` until what was asked is over, a whole number of callbacks, or seconds."""
        if then == "end":
            self.settle()
        elif isinstance(then, int):
            self.timeline.run(turns=then)
        else:
            self.timeline.run(until=self.clock.now + then)
        self._reap()

    def settle(self) -> None:
        """Run until everything that was asked of khod is over, or will not be."""
        khod = self.khod
        if khod is None:
            self.timeline.run(until=self.clock.now)
            return
        bounds = [
            operation.bound for operation in khod.operations if operation.bound is not None and not operation.over
        ]
        until = max(bounds, default=self.clock.now + LONG)
        self.timeline.run(until=until, done=lambda: self.khod is not khod or not khod.process.alive or not khod.busy)

    def _reap(self) -> None:
        """Notice what has ended by itself."""
        khod = self.khod
        if khod is None:
            return
        for operation in khod.operations:
            if not operation.over or operation.kind not in ("stop", "start"):
                continue
            if operation.kind == "stop" or operation.error is not None:
                operation.noted = True
                self.invariants.ended(operation)
                self._kill()
                return

    def _asked(self, _operation: Operation, then: Any) -> None:
        self.run(then)

    def _kill(self, *, completes: bool = False) -> None:
        if self.khod is not None:
            self.khod.die(completes=completes)
            self._bury()

    def _bury(self) -> None:
        khod, self.khod = self.khod, None
        if khod is not None:
            self.graveyard.append(khod)
            if khod.loop in self.timeline.loops:
                self.timeline.loops.remove(khod.loop)

    def state(self) -> int:
        """The state the host is in, as a number: phase, steps done, kernel, record on disk, and what is true of all."""
        khod, kernel, found = self.khod, self.kernel, self.invariants.on_disk()
        own = ("", ()) if khod is None or not khod.process.alive else (khod.phase.name, khod.done)
        image = kernel.image
        loaded = None if image is None else (image.by, image.kind, image.tree is not None)
        record = (found.error, found.record.phase, found.record.done)
        truth = tuple(
            (service.truth, service.name in self.files, isinstance(service, PeerProcess) and service.registered)
            for service in self.everyone()
        )
        return hash((own, kernel.kind, kernel.active_by, loaded, record, truth))

    def image_of(self, kind: str) -> str:
        """An image by its kind; `same` is one of the kernel that runs."""
        return self.kernel.kind if kind == "same" else kind

    def start_khod(self, then: Any) -> None:
        """Do what the service manager does."""
        if self.khod is not None and self.khod.process.alive:
            return
        self._bury()
        khod = Khod(self, VirtualLoop(self.clock), next(self._pids))
        self.khod = khod
        khod.process.on_end.append(lambda: self._gone(khod))
        self.timeline.loops.append(khod.loop)
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            self.world_loop.call_soon(give, future, None)
        try:
            khod.build()
        except Killed:
            return
        except Exception as error:  # noqa: BLE001 - whatever keeps it from its start is a finding
            self.invariants.violated("start_comes_up", f"khod cannot be put together: {error!r}")
            return
        self._asked(khod.start(), then)

    def ask_status(self) -> Status | None:
        """What khod says of how it stands; None where it does not answer."""
        if (khod := self.khod) is None:
            return None
        operation = khod.begin("status", khod.engine.queries.status)
        self.timeline.run(until=self.clock.now + 5.0, done=lambda: operation.over or not khod.process.alive)
        if operation.over:
            operation.noted = True
            return operation.result if isinstance(operation.result, Status) else None
        if operation.task is not None:
            operation.task.cancel()
            self.timeline.run(turns=5)
        return None

    def _gone(self, khod: Khod) -> None:
        if khod.loop in self.timeline.loops:
            self.timeline.loops.remove(khod.loop)
        if self.khod is khod:
            self._bury()

    # Boots

    def jumped(self, by: str) -> None:
        """The kernel jumps into what is loaded; called by whoever makes it."""
        image = self.kernel.image
        assert image is not None, "checked before"
        self.invariants.jumps(by, image)
        orderly = by == "job"
        run = _run_of(image)
        arrives = image.kind == self.kernel.kind and not self.lose and not self.cold
        tree = self.kernel.carried(image) if arrives else None
        arrives = tree is not None  # the sessions, too: the tree says where they are
        self.left = self._what_left(arrives, carried=not orderly or self.systemd.carries)
        changed, cold = self.change, self.cold
        self.lose = self.cold = self.change = False
        self.tree_arrived = tree is not None and not changed
        if tree is not None and changed:
            tree = tree.replace(b"global-trace", b"GLOBAL-TRACE")
        self._kill()
        if not orderly:
            self.disk.lose_power(0)  # what was not synced before it is lost
        outgoing = arrives and (not orderly or self.systemd.carries)
        if cold:
            self.booted(self.kernel.kind, CMDLINE[self.kernel.kind], None, by="cold")
        else:
            self.booted(image.kind, image.cmdline, tree, by=by, run=run, outgoing=outgoing)
        if by == "khod":
            raise Killed

    def _what_left(self, arrives: bool, *, carried: bool) -> dict[str, Left]:
        left = {key: left for key, left in self.left.items() if not left.taken_back}
        for each in left.values():
            each.arrived = False  # whatever was not taken back is lost now
        for service in self.everyone():
            run = service.run
            if not (service.frozen and run):
                continue
            peer = isinstance(service, PeerProcess)
            file = self.files.get(service.name)
            session = session_of(run, service.name)
            held = self.kernel.luo.outgoing.get(session, {}) if peer else {}
            contents = dict.fromkeys((TABLE,) * len(held), next((memory.content for memory in held.values()), ""))
            left[service.key] = Left(
                service.name,
                run,
                peer or (file is not None and file.has_restore),
                contents,
                session if held else "",
                arrives and (carried or not held),
            )
        return left

    def booted(
        self, kind: str, line: str, tree: bytes | None, *, by: str, run: str = "", outgoing: bool = False
    ) -> None:
        """Another kernel runs, and nobody of the one before it."""
        self._kill()
        for left in self.left.values():
            left.arrived = left.arrived and by not in ("power", "cold")
        for service in self.everyone():
            service.boot()
        self.kernel.luo.jump(arrives=outgoing)
        self.kernel.boot(kind, line, tree)
        self.registrations.clear()
        self.systemd.boot(self.kernel.luo, orderly=by == "job")
        self.boot_by, self.boot_run = by, run
        self.invariants.booted()
        self._start_peers()

    # The end of an example

    def record_on_disk(self) -> bytes | None:
        """The record as it is in the page cache."""
        try:
            fd = os.open(self._directory / FILE_NAME, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            return os.read(fd, 1 << 20)
        finally:
            os.close(fd)

    def close(self) -> None:
        """End the example: nothing of it is run any more."""
        with installed(self._replacements):
            self._kill()
            for loop in (self.world_loop, *(khod.loop for khod in self.graveyard)):
                loop.bury()
        process.forget_all()
        shutil.rmtree(self._directory, ignore_errors=True)


def _run_of(image: Image) -> str:
    """The handover an image was loaded for, "" for somebody else's."""
    return next((word[len(MARK) :] for word in image.cmdline.split() if word.startswith(MARK)), "")
