# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod-vm: a virtual machine as a producer, whose guest lives through the host's kexec.

It starts QEMU with the guest's RAM in a memfd. `prepare` hands the RAM over, `freeze` stops the guest and hands over
QEMU's device state, `restore` starts QEMU in the next kernel with both. A khod-vm that was killed leaves QEMU running,
and the next one takes it over.
"""

import argparse
import asyncio
import json
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import systemd.daemon

from khod import wire
from khod.concurrency.command import run_command
from khod.errors import KhoError, Unreachable
from khod.producer import Handler, Producer, Step, Veto
from khod.text import join_names
from khod.vm.agent import set_guest_clock
from khod.vm.kept import KeptProcess
from khod.vm.migration import announce_guest, check_portable, continue_guest, load_state, save_state, sync_disks
from khod.vm.monitor import PAUSED_STATE, RUNNING_STATES, NotYet, VmError
from khod.vm.process import QemuProcess, VmProcess, have_same_files
from khod.vm.settings import VmSettings, load_settings

LOG = logging.getLogger("khod-vm")
RUNTIME = Path("/run/khod-vm")
FREEZE = "freeze"
STATE, ABOUT = "state", "about"
"""Names of files that are handed over; the others are the guest's RAM, by the names of its memory backends."""
UNDO_SECONDS = 60.0
"""The time for an undo that khod did not ask for: it was lost meanwhile."""
RETRY_SECONDS = 1.0
REPORT_SECONDS = 1.0
"""At most this often khod is told what is waited for."""
MAX_ABOUT_BYTES = 1 << 20


@dataclass(frozen=True)
class About:
    """What the next khod-vm must know: the command line with the machine type, and whether the guest was running."""

    command: list[str]
    running: bool
    frozen_at: float
    is_memory_apart: bool = True
    """Whether the RAM is in its files alone, and not also in QEMU's state."""


class Supervisor:
    """One virtual machine with its file in `settings`, and its sockets in `directory`."""

    def __init__(self, settings: VmSettings, directory: Path) -> None:
        self._settings = settings
        self._frozen = directory / "frozen"
        """There while the guest is stopped for a handover; "running" in it if it ran before."""
        self._qemu: QemuProcess = KeptProcess(settings) if settings.qmp else VmProcess(settings, directory)
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._changed = asyncio.Event()
        self._turn = asyncio.Lock()
        """Held for one verb."""
        self._ram_bytes = 0
        """What QEMU will save of the RAM with the device state, as of `prepare`."""
        self._state = -1
        """The device state while the guest is stopped for a handover."""
        self._about: About | None = None
        """What belongs to that state, once it is complete."""
        self._setting_clock: asyncio.Future[None] | None = None
        self._refused = ""
        """Why the guest could not be taken back: its files are kept by khod."""
        self._producer = Producer(
            settings.name,
            prepare=self._handler(self._prepare),
            freeze=self._handler(self._freeze),
            thaw=self._handler(self._thaw),
            restore=self._handler(self._restore),
            timeout=settings.timeout,
            after=settings.after,
            before=settings.before,
            devices=settings.devices,
        )

    async def run(self) -> int:
        """Serve until QEMU ends, or until SIGTERM; return the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stop)
        try:
            found = await self._qemu.find()
        except VmError as error:
            if self._qemu.ends_with_qemu:
                raise
            found = False  # `prepare` says it again, to whom it matters
            LOG.warning("%s", error)
        if not await asyncio.to_thread(self._register):
            return 0
        if found and self._producer.told != FREEZE:
            await self._continue_left()
        elif not self._qemu.is_up and not self._refused:
            await self._start_anew()
        systemd.daemon.notify(f"READY=1\nSTATUS={self._refused or 'The guest is there.'}")
        code = await self._watch()
        self._producer.stop()
        return code

    async def _continue_left(self) -> None:
        """Continue a guest that an earlier khod-vm has stopped for a handover which is over: khod saw its end."""
        async with self._turn:
            if self._frozen.exists():
                LOG.warning("The guest was stopped for a handover that has ended; it continues")
                await self._thaw(Step("thaw", "", UNDO_SECONDS))

    async def _start_anew(self) -> None:
        if self._frozen.exists():
            LOG.error("QEMU and khod-vm have ended while the guest was stopped for a handover: the guest is lost")
            self._frozen.unlink()
        await self._qemu.start_guest()

    def _stop(self) -> None:
        self._stopping.set()
        self._changed.set()

    def _register(self) -> bool:
        """Register with khod, and wait for it if need be; False if khod-vm is to end instead.

        A guest that came from the kernel before must not be started anew, and only khod knows whether there is one.
        """
        told = False
        while not self._stopping.is_set():
            try:
                self._producer.start()
            except Unreachable as error:
                if not told:
                    systemd.daemon.notify(f"STATUS=Waiting for khod: {error}")
                    LOG.warning("Waiting for khod, which knows whether there is a guest to take back: %s", error)
                told = True
                time.sleep(RETRY_SECONDS)
            else:
                return True
        return False

    async def _watch(self) -> int:
        """Return when khod-vm is to end: QEMU has ended while no handover holds the guest, or SIGTERM came."""
        while not self._stopping.is_set():
            self._changed.clear()
            watching = asyncio.ensure_future(self._watch_qemu())
            await self._changed.wait()
            watching.cancel()
            if self._qemu.has_ended and self._qemu.ends_with_qemu and not self._frozen.exists():
                code = await self._qemu.wait_end()
                LOG.warning("QEMU has ended with code %d", code)
                return code
        if self._frozen.exists() and not await _is_host_stopping():
            LOG.warning("khod-vm is stopped in the middle of a handover: the guest continues, and the handover ends")
            self._producer.stop()
            await self._continue_left()
        await self._qemu.end_guest(is_frozen=self._frozen.exists())
        return 0

    async def _watch_qemu(self) -> None:
        if self._qemu.is_up:
            await self._qemu.wait_end()
            if self._frozen.exists():
                LOG.error("QEMU has ended while its guest is stopped for a handover; the guest's state is kept")
            self._changed.set()

    # The verbs

    async def _prepare(self, step: Step) -> Mapping[str, int]:
        if self._refused:
            raise VmError(self._refused)
        if not self._qemu.ends_with_qemu and not await self._qemu.find():
            return {}  # it is switched off
        async with self._qemu.open_monitor(_report_to(step)) as vm:
            state = await vm.run_state()
            if state not in {*RUNNING_STATES, PAUSED_STATE}:
                raise VmError(f"its guest is `{state}`")
            self._ram_bytes = await check_portable(vm)
            await sync_disks(vm)
        return self._qemu.memory

    async def _freeze(self, step: Step) -> Mapping[str, int]:
        self._drop_state()
        if not self._qemu.memory:
            if await self._qemu.find():
                raise VmError("its QEMU was started since `prepare`")
            return {}  # it is still switched off
        async with self._qemu.open_monitor(_report_to(step)) as vm:
            self._qemu.require_same(vm)
            running = await vm.run_state() in RUNNING_STATES
            self._frozen.write_text("running" if running else "paused")
            self._state = os.memfd_create("khod-state", os.MFD_CLOEXEC)
            await save_state(vm, self._state, self._ram_bytes)
        self._about = about = About(self._qemu.command, running, time.time(), not self._ram_bytes)
        file = os.memfd_create("khod-about", os.MFD_CLOEXEC)
        os.write(file, json.dumps(asdict(about)).encode())
        self._loop.call_later(self._settings.timeout, os.close, file)  # it is sent by then
        return {STATE: self._state, ABOUT: file}

    async def _thaw(self, step: Step) -> None:
        """Continue the guest; where QEMU has ended meanwhile, start another one with the state that is here."""
        if not self._frozen.exists():
            return  # freeze has refused before it stopped the guest
        running = self._frozen.read_text() == "running"
        if not self._qemu.is_up:
            if self._state < 0 or self._about is None:
                raise VmError("QEMU has ended, and its state is not here; khod has what was handed over")
            await self._start_with(self._about, self._qemu.memory, self._state, step)
        elif running:
            async with self._qemu.open_monitor(_report_to(step)) as vm:
                await continue_guest(vm)
        self._frozen.unlink(missing_ok=True)
        self._drop_state()
        self._changed.set()

    async def _restore(self, step: Step) -> None:
        """Start QEMU with the guest that came from the kernel before."""
        memory = dict(step.files)
        state, about_file = memory.pop(STATE, -1), memory.pop(ABOUT, -1)
        try:
            if not await self._is_taken_back(memory, step):
                await self._qemu.kill()
                if state < 0 or about_file < 0:
                    raise VmError(f"what came is not a guest: {join_names(sorted(step.files)) or 'nothing'}")
                about = _read_about(about_file)
                try:
                    await self._start_with(about, memory, state, step)
                except BaseException:
                    await self._qemu.kill()
                    self._qemu.memory = {}
                    raise
                memory = {}
                LOG.info("The guest was stopped for %.1f s by the wall clock", time.time() - about.frozen_at)
            self._refused = ""
            systemd.daemon.notify("STATUS=The guest was taken back.")
            self._changed.set()
        except BaseException as error:  # whatever it was: the guest must not be started anew beside its state
            self._refused = f"The guest was not taken back, and its state is kept: {_give_reason(error, step)}"
            LOG.error("%s. Repair the cause, then: khoctl producers retry %s", self._refused, self._settings.name)
            systemd.daemon.notify(f"STATUS={self._refused}")
            raise
        finally:
            for fd in (state, about_file, *memory.values()):
                if fd >= 0:
                    os.close(fd)

    async def _start_with(self, about: About, memory: Mapping[str, int], state: int, step: Step) -> None:
        async with self._qemu.start_session(about.command, memory, incoming=True, not_yet=_report_to(step)) as vm:
            await load_state(vm, state, is_memory_apart=about.is_memory_apart)
            self._qemu.note_arrived()
            if about.running:
                await continue_guest(vm)
                with suppress(VmError):  # a guest without a network has nothing to announce
                    await announce_guest(vm)
        if about.running and self._settings.agent:
            self._setting_clock = asyncio.ensure_future(self._set_clock())  # it takes the guest's time, not ours

    async def _set_clock(self) -> None:
        try:
            await set_guest_clock(self._settings.agent)
        except VmError as error:
            LOG.warning("The guest's clock may be behind: %s", error)

    async def _is_taken_back(self, memory: Mapping[str, int], step: Step) -> bool:
        """Whether the guest runs with this RAM: an earlier khod-vm was killed after that, before it could say so.

        VmError where another guest is in its place: that one has written to the disks, and is not ours to end.
        """
        if not await self._qemu.find():
            return False
        if not have_same_files(self._qemu.memory, memory):
            raise VmError("a QEMU without the guest's RAM is in its place, and was not touched: end it first")
        async with self._qemu.open_monitor(_report_to(step)) as vm:
            return await vm.run_state() in RUNNING_STATES

    def _drop_state(self) -> None:
        if self._state >= 0:
            os.close(self._state)
            self._state, self._about = -1, None

    def _handler(self, carry_out: Callable[[Step], Awaitable[Mapping[str, int] | None]]) -> Handler:
        """Return a handler for the producer's thread, which waits for `carry_out` in the event loop."""

        async def take_turn(step: Step, seconds: float) -> Mapping[str, int] | None:
            async with asyncio.timeout(seconds), self._turn:
                return await carry_out(step)

        def handle(step: Step) -> Mapping[str, int] | None:
            seconds = step.timeout or UNDO_SECONDS
            done = asyncio.run_coroutine_threadsafe(take_turn(step, seconds), self._loop)
            try:
                return done.result()
            except VmError as error:
                raise Veto(str(error)) from None
            except TimeoutError:
                raise Veto(f"not done within {seconds:g} s") from None

        return handle


def _report_to(step: Step) -> NotYet:
    """Return what tells khod why a verb takes long, at most once in REPORT_SECONDS."""
    last = time.monotonic()

    def report(reason: str, progress: float | None) -> None:
        nonlocal last
        if step.run and time.monotonic() - last >= REPORT_SECONDS:
            last = time.monotonic()
            step.not_yet(reason, progress)

    return report


def _give_reason(error: BaseException, step: Step) -> str:
    if isinstance(error, VmError):
        return str(error)
    if isinstance(error, asyncio.CancelledError):
        return f"not done within {step.timeout:g} s"
    return f"{type(error).__name__}: {error}"


def _read_about(file: int) -> About:
    try:
        found = wire.decode_value(About, json.loads(os.pread(file, MAX_ABOUT_BYTES, 0)), "about")
    except (ValueError, OSError) as error:
        raise VmError(f"what came with the guest cannot be read: {error}") from None
    assert isinstance(found, About)
    return found


async def _is_host_stopping() -> bool:
    """Whether systemd takes the host down: into the next kernel, with what was handed over."""
    try:
        _, state = await run_command("systemctl", "is-system-running")
    except OSError:
        return False
    return state == "stopping"


def main() -> int:
    """Supervise the virtual machine whose name is the argument."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    parser = argparse.ArgumentParser(prog="khod-vm", description=main.__doc__)
    parser.add_argument("name", metavar="NAME", help="the machine of /etc/kho/vm.d/NAME.toml")
    parser.add_argument("--root", type=Path, default=Path("/"), help="look for the file below this directory")
    found = parser.parse_args()
    try:
        settings = load_settings(found.name, found.root)
        directory = Path(os.environ.get("RUNTIME_DIRECTORY", RUNTIME / settings.name))
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return asyncio.run(_run(settings, directory))
    except KhoError as error:
        LOG.error("%s", error)
        return int(error.exit)
    except VmError as error:
        LOG.error("%s", error)
        return 1


async def _run(settings: VmSettings, directory: Path) -> int:
    return await Supervisor(settings, directory).run()
