# SPDX-License-Identifier: LGPL-2.1-or-later
"""A host under test: the embedded kernel, a state directory, producers, and any number of khods one after the other."""

import asyncio
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

from khod.config import Config, Settings
from khod.engine import Engine
from khod.engine.cold_boot import BootEnds
from khod.engine.guard import Seen, Uevent, Watch
from khod.engine.queries import Pasts
from khod.engine.recorder import Sources
from khod.engine.resources import is_up
from khod.errors import ConfigError
from khod.handover.record import Record, Store
from khod.history.model import AttemptRecord
from khod.kernel.kexec import Kexec
from khod.kernel.luo import Luo
from khod.kernel.probe import Probed, probe_kho
from khod.kernel.sysfs import KHO
from khod.kernel.thread import Workers
from khod.model import NO_TERMS, Event, Terms
from khod.producers.barrier import Participant
from khod.producers.children import Children
from khod.producers.contents import KeptFiles
from khod.producers.health import HealthChecks
from khod.producers.hooks import Hook
from khod.producers.identity import process_of
from khod.producers.registrations import Registrations
from khod.producers.session_scan import Scanner, scan_processes
from khod.producers.sessions import Sessions
from khod.provenance.verify import verify_files
from khod.quiesce.host import Host as Around
from khod.simulated.kernel import SimulatedKernel
from khod.systemd import shutdown
from khod.systemd.watchdog import ManagerWatchdogs
from khod.target.target import Given, Request, Verify
from tests.unit.images import CPIO, bzimage

ACTIVE = f"{KHO}/active"
UNLOAD = 1  # KEXEC_FILE_UNLOAD, include/uapi/linux/kexec.h


@dataclass(frozen=True)
class Noted:
    """One call that changes the kernel: what, in which thread, and what the record on disk said at that moment."""

    what: str
    thread: int
    recorded: Record


class Kernel(SimulatedKernel):
    """The embedded kernel, watched. While `gate` is not set, writes to `active` block as a real one's may."""

    def __init__(self, root: Path, store: Store) -> None:
        super().__init__(root)
        self.noted: list[Noted] = []
        self.readers: set[int] = set()
        """Threads that read the outgoing tree."""
        self.synced: list[Noted | None] = []
        """For each sync(2) the call noted before it."""
        self.gate = threading.Event()
        self.gate.set()
        self._serializing = threading.Event()
        self._store = store

    def _note(self, what: str) -> None:
        self.noted.append(Noted(what, threading.get_ident(), self._store.read() or Record()))

    @property
    def calls(self) -> list[str]:
        return [noted.what for noted in self.noted]

    def read_file(self, path: str) -> bytes:
        if path == f"{KHO}/dt":
            self.readers.add(threading.get_ident())
        if path == ACTIVE and self._serializing.is_set():
            self.gate.wait()  # one mutex for whoever asks and whoever writes
        return super().read_file(path)

    def write_file(self, path: str, data: bytes) -> None:
        if path == ACTIVE:
            self._note(f"active={data.decode().strip()}")
            self._serializing.set()
            self.gate.wait()
        try:
            super().write_file(path, data)
        finally:
            self._serializing.clear()

    def kexec_file_load(self, kernel_fd: int, initrd_fd: int, cmdline: bytes, flags: int) -> None:
        self._note("unload" if flags & UNLOAD else "load")
        super().kexec_file_load(kernel_fd, initrd_fd, cmdline, flags)

    def sync_disks(self) -> None:
        self.synced.append(self.noted[-1] if self.noted else None)
        super().sync_disks()

    def reboot_kexec(self) -> None:
        self._note("reboot")
        super().reboot_kexec()

    @property
    def active(self) -> bool:
        return super().read_file(ACTIVE) == b"1\n"

    @property
    def loaded(self) -> bool:
        return self.read_file("/sys/kernel/kexec_loaded") == b"1\n"


class Quiet:
    """Stands for the guard: a host whose devices change when a test says so."""

    def __init__(self) -> None:
        self.watching = False
        self.devices: Mapping[str, Iterable[str]] = {}
        self.happened: Callable[[Seen], None] = lambda _seen: None

    def made(self, happened: Callable[[Seen], None]) -> "Quiet":
        self.happened = happened
        return self

    def start(self, abort: Iterable[str], record: Iterable[str], devices: Mapping[str, Iterable[str]]) -> None:
        self.watch, self.devices = Watch(frozenset(abort), frozenset(record)), devices
        self.watching = True

    def stop(self) -> None:
        self.watching = False

    def process_pending(self) -> None:
        """Nothing waits to be read."""

    def event(self, action: str, subsystem: str, device: str = "/sys/devices/x") -> None:
        """Let something happen; unheard where nobody watches."""
        seen = self.watch.judge_event(Uevent(action, subsystem, device))
        if self.watching and seen is not None:
            self.happened(seen)


class Living:
    """A process of a producer's: it may be ended."""

    def __init__(self, pid: int = 0) -> None:
        self._pid = pid or subprocess.Popen(["sleep", "infinity"]).pid
        found = process_of(self._pid)
        assert found is not None
        self.identity = found

    def end(self) -> None:
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = 0


def connect_apart(path: Path) -> tuple[Living, socket.socket]:
    """Connect from a process of its own: by the kernel's word the connection is that one's."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        pid = os.fork()
        if not pid:
            try:
                client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                client.connect(str(path))
                socket.send_fds(theirs, [b"0"], [client.fileno()])
                client.close()
                os.closerange(3, 1 << 12)  # what is open here must not stay open by it
                signal.pause()
            finally:
                os._exit(1)
        theirs.close()
        _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    return Living(pid), socket.socket(fileno=fds[0])


class KeptFds:
    """Stands for the service manager's store: descriptors by name that outlive an engine."""

    def __init__(self) -> None:
        self.kept: dict[str, int] = {}

    def store_fd(self, name: str, fd: int) -> None:
        self.kept[name] = os.dup(fd)

    def wait_sent(self) -> None:
        pass

    def remove_fd(self, name: str) -> None:
        if (fd := self.kept.pop(name, None)) is not None:
            os.close(fd)

    async def wait_settled(self) -> None:
        """Nothing is on its way."""

    def passed(self) -> dict[str, int]:
        """What the next khod is started with."""
        return {name: os.dup(fd) for name, fd in self.kept.items()}


async def _know_run(_run: str) -> bool:
    """Whatever was logged is remembered."""
    return True


class Host:
    """Everything below one directory. `engine()` is a khod that has just been executed; it was not started."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = Config()
        self.hooks: list[Participant] = []
        self.guard = Quiet()
        self.broken: ConfigError | None = None
        self.events: list[Event] = []
        self.sources = Sources(knows=_know_run)
        """Where the facts of a run come from."""
        self.attempts: list[AttemptRecord] = []
        """What was remembered, each time it was."""
        self.fdstore = KeptFds()
        self.workers: Workers | None = None
        self.around: Around | None = None
        """What quiesce stops; without it there is no such step."""
        """Whose threads make the calls of every khod; None for threads of its own."""
        self.shutdown: shutdown.Shutdown | None = None
        """What says whether the host is on its way into the kexec; None where nobody can tell."""
        self.registrations: Path | None = None
        """Where registrations outlive a khod; None where they do not."""
        self.goes_down: Callable[[], Awaitable[bool]] | None = None
        """What says whether the host is shut down, in whatever way; None where nobody can tell."""
        self.host_up: Callable[[], Awaitable[None]] = is_up
        """What waits for the services that hooks and health checks may need."""
        self.scanner: Scanner = scan_processes
        """What finds the LUO sessions of every process."""
        self.boot_ends: BootEnds = lambda _here, _until: []
        """What the journal has of the boots before."""
        self.watchdogs: ManagerWatchdogs | None = None
        """What arms the hardware watchdog; None where nobody does."""
        self.verify: Verify = partial(verify_files, directory, Children())
        """What finds out who made the files of the next kernel."""
        self.past: Pasts | None = None
        """What the history has of an image; None where there is no history."""
        self.told = directory / "told"
        (directory / "state").mkdir()
        self.store = Store(directory / "state")
        self.kernel = Kernel(directory / "kernel", self.store)
        self.prober: Callable[[], Probed] = lambda: probe_kho(self.kernel)
        self._remembering: list[asyncio.Future[AttemptRecord]] = []
        self._waiting: list[tuple[Callable[[Event], bool], asyncio.Future[Event]]] = []
        (directory / "vmlinuz").write_bytes(bzimage())
        (directory / "initrd").write_bytes(CPIO)

    def producers(self) -> list[Participant]:
        if self.broken is not None:
            raise self.broken
        return list(self.hooks)

    def engine(self, **executors: shutdown.Executor) -> Engine:
        workers = self.workers or Workers()
        kexec, thread = Kexec(self.kernel), workers.kernel
        jump = shutdown.make_immediate(kexec, workers, 10)
        return Engine(
            kexec,
            self.prober,
            self.store,
            Settings(self.config),
            producers=self.producers,
            sessions=Sessions(
                Luo(self.kernel),
                thread,
                self.fdstore,
                passed=self.fdstore.passed(),
                kept_files=KeptFiles(thread, lambda: self.config.verify),
            ),
            guard=self.guard.made,
            orderly=executors.get("orderly", jump),
            immediate=executors.get("immediate", jump),
            tell=self._tell,
            shutdown=self.shutdown,
            goes_down=self.goes_down,
            host_up=self.host_up,
            workers=workers,
            registrations=Registrations(self.registrations) if self.registrations else None,
            scanner=self.scanner,
            health=HealthChecks(self.directory, Children()),
            verify=self.verify,
            boot_ends=self.boot_ends,
            past=self.past,
            watchdogs=self.watchdogs,
            remember=self._remember,
            sources=self.sources,
            make_host=None if self.around is None else self._find_around,
        )

    def _find_around(self) -> Around:
        assert self.around is not None
        return self.around

    async def _remember(self, attempt: AttemptRecord) -> None:
        self.attempts.append(attempt)
        for future in self._remembering:
            future.set_result(attempt)
        self._remembering.clear()

    async def remembered(self, count: int = 1) -> AttemptRecord:
        """The newest attempt, once `count` were remembered."""
        while len(self.attempts) < count:
            future: asyncio.Future[AttemptRecord] = asyncio.get_running_loop().create_future()
            self._remembering.append(future)
            await future
        return self.attempts[-1]

    async def started(self, **executors: shutdown.Executor) -> Engine:
        engine = self.engine(**executors)
        await engine.start()
        return engine

    def _tell(self, event: Event) -> None:
        self.events.append(event)
        for wanted, future in self._waiting:
            if not future.done() and wanted(event):
                future.set_result(event)

    async def seen(self, wanted: Callable[[Event], bool]) -> Event:
        """The next event that is `wanted`."""
        future: asyncio.Future[Event] = asyncio.get_running_loop().create_future()
        self._waiting.append((wanted, future))
        return await future

    def hook(
        self,
        name: str,
        scripts: Mapping[str, str] = MappingProxyType({}),
        *,
        timeout: float = 10.0,
        after: tuple[str, ...] = (),
    ) -> None:
        """Add a producer that notes each verb it is told; `scripts` by verb are run after the note."""
        verbs = ("prepare", "freeze", "thaw", "cancel")
        commands = {
            verb: ["/bin/sh", "-c", f"echo {name} {verb} >> {self.told}\n{scripts.get(verb, '')}"] for verb in verbs
        }
        self.hooks.append(Hook(name, timeout, after, commands=commands))

    @property
    def verbs(self) -> list[str]:
        """What producers were told, in order: `NAME VERB`."""
        return self.told.read_text().splitlines() if self.told.exists() else []

    @contextmanager
    def request(
        self,
        image: str = "vmlinuz",
        initrd: str | None = "initrd",
        *,
        load_only: bool = False,
        hold: bool = False,
        terms: Terms = NO_TERMS,
    ) -> Iterator[Request]:
        """A request with open files, as the server makes one."""
        fds = [os.open(self.directory / name, os.O_RDONLY) for name in (image, initrd) if name is not None]
        try:
            initrds = (Given(fds[1], initrd),) if initrd else ()
            yield Request(Given(fds[0], image), initrds, load_only=load_only, hold=hold, terms=terms)
        finally:
            for fd in fds:
                os.close(fd)

    @property
    def record(self) -> Record:
        """The record on disk."""
        record = self.store.read()
        assert record is not None, "there is no record"
        return record

    async def kexec(
        self, engine: Engine, *, load_only: bool = False, hold: bool = False, terms: Terms = NO_TERMS
    ) -> None:
        with self.request(load_only=load_only, hold=hold, terms=terms) as request:
            await engine.kexec(request)
