# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod: puts the pieces together and runs them until it is told to stop."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from khod import __version__
from khod.abi.calls import Calls, HostCalls
from khod.concurrency.worker import Worker
from khod.config import Settings
from khod.dataclass import dataclass
from khod.deferred import defer_module, load_deferred
from khod.early import restore as early_restore
from khod.early.restore import EarlyRestore
from khod.engine import Engine, journal, status
from khod.engine.guard import Guard
from khod.engine.resources import is_up
from khod.engine.sources import host_sources, simulated_sources
from khod.errors import ConfigError, Exit, Failed, KhoError, Refused, errno_text
from khod.handover.directory import STATE, lock_directory
from khod.handover.machine import RESTING
from khod.handover.record import Store
from khod.kernel import filesystems
from khod.kernel.kexec import Kexec
from khod.kernel.luo import Luo
from khod.kernel.probe import probe_kho
from khod.kernel.thread import Workers
from khod.metrics.source import MetricSource
from khod.metrics.textfile import TextFile
from khod.model import Event, Phase
from khod.producers import children, output
from khod.producers.children import Children
from khod.producers.commands import CommandRunner
from khod.producers.contents import KeptFiles
from khod.producers.directory import Directory
from khod.producers.health import HealthChecks
from khod.producers.registrations import Registrations
from khod.producers.session_scan import Scanner, scan_processes
from khod.producers.session_scanner import ask_scanner
from khod.producers.sessions import Sessions
from khod.producers.transient import TransientUnits
from khod.server.sockets import Sockets
from khod.systemd import fdstore, logind, shutdown
from khod.systemd.facts import BOOTED
from khod.systemd.notifier import notify_manager
from khod.systemd.shutdown import Executor, Shutdown
from khod.systemd.startup import wait_early_units, wait_hooks_unit
from khod.systemd.watchdog import ManagerWatchdogs
from khod.text import join_names, one_line
from khod.wire import SOCKET

if TYPE_CHECKING:
    import argparse

    from khod.engine import announcements
    from khod.history import trial as history_trial
    from khod.history.model import AttemptRecord
    from khod.provenance import verify as provenance
    from khod.quiesce import host as quiesce_host
    from khod.server import server
    from khod.simulated import kernel as simulated
else:
    argparse = defer_module("argparse")
    announcements = defer_module("khod.engine.announcements")
    history_trial = defer_module("khod.history.trial")
    provenance = defer_module("khod.provenance.verify")
    quiesce_host = defer_module("khod.quiesce.host")
    server = defer_module("khod.server.server")
    simulated = defer_module("khod.simulated.kernel")

FAREWELL = 2.0
"""Seconds clients have to take their last answers."""


@dataclass(frozen=True)
class Options:
    """The command line. `root` holds etc/; kernel paths hang from it too, unless simulated."""

    root: Path = Path("/")
    state: Path = Path(STATE)
    socket: Path = Path(SOCKET)
    simulate: Path | None = None

    @property
    def runs_on_systemd(self) -> bool:
        """Whether systemd runs this host, and khod drives its kernel."""
        return self.simulate is None and os.path.exists(BOOTED)

    @property
    def filesystems_note(self) -> Path | None:
        """The note of the file systems that are frozen; None where none may be."""
        return self.socket.parent / filesystems.NOTE_NAME if self.simulate is None else None


def parse_options(argv: list[str]) -> Options:
    """Read the command line."""
    if not argv:  # as the unit starts khod
        return Options()
    parser = argparse.ArgumentParser(prog="khod", description="Coordinates kernel live updates by Kexec HandOver.")
    parser.add_argument("--root", type=Path, default=Options.root, help="where etc/ is (default: /)")
    parser.add_argument("--state", type=Path, default=Options.state, help="where the record is kept")
    parser.add_argument(
        "--socket", type=Path, default=Options.socket, help="the Varlink socket, unless systemd passes one"
    )
    parser.add_argument("--simulate", type=Path, metavar="DIR", help="drive the embedded simulated kernel in DIR")
    parser.add_argument("--version", action="version", version=__version__)
    found = parser.parse_args(argv)
    return Options(found.root, found.state, found.socket, found.simulate)


class Daemon:
    """One running khod."""

    def __init__(self, opts: Options, calls: Calls, passed: Mapping[str, int], early: EarlyRestore | None) -> None:
        self._options = opts
        self._passed = passed
        self._early = early
        self._stopping = asyncio.Event()
        self._status = journal.StatusText(self._status_text)
        self._barred_run = ""
        """The run after which an image was last said to be refused."""
        self._last = Event(0.0, Phase.idle, "", "")
        self._is_ready = False
        self._loading: threading.Thread | None = None
        self._settings = Settings.load(opts.root)
        workers = Workers()
        runtime = opts.socket.parent
        self._sessions = sessions = Sessions(
            Luo(calls),
            workers.kernel,
            fdstore.ServiceManager(),
            passed=self._passed,
            max_bytes=lambda: self._settings.current.producers.max_bytes,
            account=runtime / "outgoing",
            kept_files=KeptFiles(
                Worker("contents", "A file of a producer"),
                lambda: self._settings.current.verify,
                given_before=frozenset() if early else early_restore.read_told(f"{runtime}/{early_restore.NOTE_NAME}"),
            ),
        )
        kexec = Kexec(calls)
        jump = shutdown.make_immediate(
            kexec,
            workers,
            lambda: self._settings.current.deadlines.execute,
            opts.filesystems_note,
            journal.settle_journal if opts.runs_on_systemd else None,
        )
        self._host = _real_host(jump, sessions) if opts.simulate is None else _simulated_host(jump)
        self.engine = Engine(
            kexec,
            lambda: probe_kho(calls),
            Store(opts.state),
            self._settings,
            producers=Directory(opts.root, self._host.runner, opts.socket).load_producers,
            sessions=sessions,
            guard=Guard,
            orderly=self._host.orderly,
            immediate=self._host.immediate,
            workers=workers,
            tell=self._on_event,
            inhibitors=self._host.inhibitors,
            shutdown=self._host.is_jumping,
            goes_down=self._host.goes_down,
            host_up=self._host.host_up,
            registrations=Registrations(runtime / "registrations"),
            scanner=self._host.scanner,
            health=HealthChecks(opts.root, self._host.runner),
            verify=lambda *asked: provenance.verify_files(opts.root, self._host.runner, *asked),
            sources=host_sources(calls) if opts.simulate is None else simulated_sources(calls),
            remember=self._remember,
            watchdogs=self._host.watchdogs,
            make_host=self._host.make_around,
        )
        self._sockets: Sockets | None = None
        self._source = MetricSource(self.engine.queries.status, self.engine.history)
        self._metrics = TextFile(lambda: self._settings.current.metrics.directory, self._source.read)

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT, then put back what is held."""
        loop = asyncio.get_running_loop()
        if self._early is None:
            self._lock_record()
        children.adopt_orphans()
        output.start_outlets()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload_config)
        self._sockets = Sockets(self._open_sockets(), self._make_server)
        if self._early is not None:
            self._take_over(self._early, self._sockets)
        watching = asyncio.ensure_future(journal.feed_watchdog())
        starting = asyncio.ensure_future(self.engine.registry.start_supervisors())
        try:
            await self._start_engine()
            notify_manager("READY=1")
            self._is_ready = True
            self._load_rest()
            await self._stopping.wait()
            notify_manager("STOPPING=1")
            await self._stop_engine()
        finally:
            watching.cancel()
            starting.cancel()
            await self._sockets.close(FAREWELL)

    def _take_over(self, early: EarlyRestore, sockets: Sockets) -> None:
        """End the early restore, and go on with its sessions, its comparisons and its clients."""
        clients = early.stop(self._sessions.take_over)
        for client in clients:
            if client.is_told and client.claim is not None:
                for file in client.claim.files:
                    self._sessions.kept_files.note_unchanged(client.claim.name, file.name, file.size, file.pages)
        sockets.take_over(clients)

    def _make_server(self, sockets: Sequence[socket.socket]) -> server.Server:
        return server.Server(self.engine, sockets, lambda: self._settings.current.access, self._source.read)

    async def _start_engine(self) -> None:
        """Find out how the host stands, and roll back what is due; it is served whatever comes of that.

        With a wrong configuration the defaults do for a rollback, and for giving back what arrived; where nothing of
        that is left to do, ConfigError ends khod.
        """
        with _more_time():
            try:
                await self.engine.start()
            except Exception as error:  # noqa: BLE001 - the host is served, and its operator told
                _log_error(error)
        gc.freeze()  # or a quarter of the time that a thousand producers take is a look for garbage among the modules
        gc.enable()
        if self._settings.error is not None:
            if self.engine.at_rest:
                raise self._settings.error
            _log_error(f"The defaults are used, and no handover begins: {self._settings.error}")

    def _load_rest(self) -> None:
        """Import what the way back did not need, once no producer waits for its state."""
        if self._loading is None and self._is_ready and self.engine.machine.phase is not Phase.verifying:
            self._loading = threading.Thread(target=_load_and_freeze, name="imports", daemon=True)
            self._loading.start()
            self._metrics.update_soon()

    async def _stop_engine(self) -> None:
        """Put back what is held, unless the host is on its way into the kexec."""
        with _more_time():
            jumping, going_down = await asyncio.gather(self._host.is_jumping_at_stop(), self._host.goes_down())
            await self.engine.stop(jumping=jumping, going_down=going_down)

    def _lock_record(self) -> None:
        """Refuse to run beside another khod on the same record: it would take the other's handover for a dead one's."""
        try:
            self._options.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise Failed(
                f"The directory of the record cannot be made: {errno_text(error)}",
                where=str(self._options.state),
                remedy="mkdir -m 700 /var/lib/khod; systemctl restart kho-handover",
            ) from error
        try:
            lock_directory(str(self._options.state))
        except BlockingIOError:
            raise Refused(
                "Another khod is running", where=str(self._options.state), remedy="systemctl status kho-handover"
            ) from None

    def _open_sockets(self) -> list[socket.socket]:
        """Take the sockets systemd passed; that of the metrics (kho-metrics.socket) is one more way to the same."""
        metrics = self._passed.get("metrics")
        return [self._open_socket(), *([] if metrics is None else [socket.socket(fileno=metrics)])]

    def _open_socket(self) -> socket.socket:
        """Take the socket systemd passed, else make one.

        Anyone may connect: each method asks the kernel who is calling, as systemd's own Varlink
        services do.
        """
        if (passed := self._passed.get("varlink")) is not None:
            return socket.socket(fileno=passed)
        path = self._options.socket
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        sock.bind(str(path))
        path.chmod(0o666)
        return sock

    def _on_event(self, event: Event) -> None:
        if self._sockets is not None:
            self._sockets.publish_event(event)
        journal.write_event(event, entered=event.phase is not self._last.phase, record=self.engine.record)
        if self._last.phase is Phase.verifying and event.phase in RESTING and self.engine.record.verdict is not None:
            announcements.announce_findings(self.engine.record.verdict.findings, event.run)
        self._metrics.note_phase(event.phase)
        if event.producer is None:
            self._last = event
        elif event.phase is not self._last.phase:
            self._last = replace(self._last, phase=event.phase)
        self._status.mark_changed()
        self._load_rest()

    def _status_text(self) -> str:
        """The status text: where it stands, and who is waited for or what happened last."""
        waiting = join_names(self.engine.waiting_producers)
        return f"{status.PHASE_TEXT[self._last.phase][0]} {f'Waiting for {waiting}' if waiting else self._last.message}"

    async def _remember(self, attempt: AttemptRecord) -> None:
        """Keep an attempt that has ended; the metrics count it, and the journal says what follows from it."""
        if attempt.cold_boot is not None:
            announcements.announce_cold_boot(attempt.cold_boot, attempt.summary.run)
        await self.engine.history.remember(attempt)
        await self._announce_barred(attempt)
        self._metrics.update_soon()

    async def _announce_barred(self, attempt: AttemptRecord) -> None:
        """Say that the image of an attempt is refused from now on, if it is."""
        is_known = attempt.summary.run == self._barred_run  # an attempt is remembered again with more of its facts
        if (
            is_known
            or attempt.target is None
            or not attempt.target.images
            or not history_trial.counts_against_image(attempt)
        ):
            return
        with suppress(KhoError):  # the history is not to be had, and the check says so
            digest = history_trial.trial_digest(attempt.target.images)
            trial = await self.engine.history.trial(digest)
            if trial.failures >= self._settings.current.trial.failures:
                self._barred_run = attempt.summary.run
                name = attempt.target.images[0].name
                announcements.announce_image_barred(name, digest, trial.reason, attempt.summary.run)

    def _reload_config(self) -> None:
        journal.notify_reloading()
        try:
            self._settings.reload(self._options.root)
        except ConfigError as error:
            _log_error(f"The configuration stays as it was: {error}")
            notify_manager(f"STATUS={one_line(f'The configuration stays as it was: {error}')}")
        notify_manager("READY=1")


@dataclass(frozen=True)
class _StartAgain:
    """After the simulated kernel's jump, be the khod that its next kernel starts."""

    jump: shutdown.Immediate

    @property
    def in_kernel(self) -> bool:
        """As of the jump."""
        return self.jump.in_kernel

    async def __call__(self, require_rest: Executor | None = None) -> None:
        try:
            await self.jump(require_rest)
        except simulated.Rebooted:
            sys.stdout.flush()
            os.execv(sys.executable, [sys.executable, "-m", "khod", *sys.argv[1:]])  # noqa: S606


@dataclass(frozen=True)
class _Host:
    """Everything around the kernel in which a real host and the simulated one differ: who jumps, and who is asked.

    `orderly` and `immediate` make the jump. `is_jumping` tells whether the host is on its way into the kexec, None
    where nobody can tell; `goes_down` whether it is shut down at all. `host_up` is as in `khod.engine.resources`.
    """

    orderly: Executor
    immediate: Executor
    inhibitors: logind.Inhibitors | None
    is_jumping: Shutdown
    is_jumping_at_stop: Shutdown
    """The same with more time for the answer: khod is stopped, and has nothing else to do."""
    goes_down: Callable[[], Awaitable[bool]]
    host_up: Callable[[], Awaitable[None]]
    runner: CommandRunner
    """Runs the commands of hooks."""
    scanner: Scanner
    """Finds the LUO sessions of every process."""
    watchdogs: ManagerWatchdogs | None
    """Arms the hardware watchdog; None where nobody does."""
    make_around: Callable[[], quiesce_host.Host] | None
    """Returns what quiesce stops; None where nobody can."""


def _real_host(jump: shutdown.Immediate, sessions: Sessions) -> _Host:
    booted = os.path.exists(BOOTED)
    runner = TransientUnits() if booted else Children()
    return _Host(
        lambda: shutdown.start_orderly(sessions=sessions.holds_any),
        jump,
        logind.shutdown_inhibitors,
        lambda: shutdown.kexec_job_pending(shutdown.ASK_UNDO_SECONDS),
        shutdown.kexec_job_pending,
        shutdown.goes_down,
        wait_hooks_unit if booted else is_up,
        runner,
        ask_scanner if booted else scan_processes,
        ManagerWatchdogs() if booted else None,
        (lambda: quiesce_host.SystemdHost(runner, jump.filesystems)) if booted else None,
    )


def _simulated_host(jump: shutdown.Immediate) -> _Host:
    """It jumps at once or not at all, and nobody shuts it down."""

    async def never() -> bool:
        return False

    again = _StartAgain(jump)
    return _Host(again, again, None, never, never, never, is_up, Children(), scan_processes, None, None)


@contextmanager
def _more_time() -> Iterator[None]:
    """Have the service manager wait, for as long as this lasts."""
    extending = asyncio.ensure_future(journal.extend_timeout())
    try:
        yield
    finally:
        extending.cancel()


def _load_and_freeze() -> None:
    load_deferred()
    gc.freeze()  # as at the start


def _log_error(what: object) -> None:
    journal.write_stderr(f"khod: {what}")


def main(passed: Mapping[str, int], early: EarlyRestore | None) -> None:
    """Run khod; exits with 2 where the configuration is wrong.

    `passed` are the descriptors from the service manager, by name; `early` is the early restore, if one is under way.
    """
    opts = parse_options(sys.argv[1:])
    logging.basicConfig(handlers=[journal.Handler()])
    calls = HostCalls(opts.root) if opts.simulate is None else simulated.SimulatedKernel(opts.simulate)
    # First: a khod that died at the jump may have left them frozen.
    filesystems.FrozenFileSystems(calls, opts.filesystems_note).thaw_all()
    try:
        asyncio.run(_run_daemon(opts, calls, passed, early))
    except ConfigError as error:
        _log_error(error)
        sys.exit(Exit.usage)
    except KhoError as error:
        _log_error(error)
        sys.exit(error.exit)
    finally:
        journal.flush_workers()


async def _run_daemon(opts: Options, calls: Calls, passed: Mapping[str, int], early: EarlyRestore | None) -> None:
    if opts.runs_on_systemd:
        await wait_early_units()  # before any thread is started: the AppArmor profile is entered by this one alone
    journal.start_workers()
    await Daemon(opts, calls, passed, early).run()
