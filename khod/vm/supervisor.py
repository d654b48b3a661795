# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod-vm: a virtual machine as a producer, whose guest lives through the host's kexec.

It starts QEMU with the guest's RAM in a memfd. `prepare` hands the RAM over, `freeze` stops the guest and hands over
QEMU's device state, `restore` starts QEMU in the next kernel with both. A khod-vm that was killed leaves QEMU running,
and the next one takes it over.
"""

import argparse
import asyncio
import fcntl
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from khod.concurrency.command import run_command
from khod.errors import KhoError, Unreachable, errno_text
from khod.producer import Handler, Producer, Step, Veto
from khod.systemd.notifier import notify_manager
from khod.text import join_names
from khod.vm.agent import GuestClock
from khod.vm.frozen import (
    ABOUT,
    STATE,
    About,
    FrozenGuest,
    close_files,
    is_spent,
    read_about,
    spend_state,
    unspend_state,
)
from khod.vm.kept import KeptProcess
from khod.vm.migration import (
    check_portable,
    continue_guest,
    end_migration,
    list_disks,
    load_state,
    save_state,
    sync_disks,
)
from khod.vm.monitor import PAUSED_STATE, RUNNING_STATES, Monitor, NotYet, QmpUnavailable, VmError
from khod.vm.process import QemuProcess, VmProcess, have_same_files
from khod.vm.settings import VmSettings, load_settings
from khod.vm.sharing import RUNTIME, check_unshared

LOG = logging.getLogger("khod-vm")
FREEZE = "freeze"
UNDO_SECONDS = 60.0
"""The time for an undo that khod did not ask for: it was lost meanwhile."""
CarryOut = Callable[[Step], Awaitable[Mapping[str, int] | None]]
RETRY_SECONDS = 1.0
REPORT_SECONDS = 1.0
"""At most this often khod is told what is waited for."""


class Supervisor:
    """One virtual machine with its file in `settings`, and its sockets in `directory`."""

    def __init__(self, settings: VmSettings, directory: Path, root: Path = Path("/")) -> None:
        self._settings, self._root = settings, root
        self._frozen = FrozenGuest(directory / "frozen")
        self._qemu: QemuProcess = KeptProcess(settings) if settings.qmp else VmProcess(settings, directory)
        self._qemu.on_end = self._note_qemu_end
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._changed = asyncio.Event()
        self._turn = asyncio.Lock()
        """Held for one verb."""
        self._ram_bytes = 0
        """What QEMU will save of the RAM with the device state, as of `prepare`."""
        self._clock = GuestClock(settings.agent)
        self._registering = False
        self._refused = ""
        """Why the guest could not be taken back: its files are kept by khod."""
        handle = partial(_make_handler, self._loop, self._take_turn)
        self._producer = Producer(
            settings.name,
            prepare=handle(self._prepare),
            freeze=handle(self._freeze),
            thaw=handle(self._thaw),
            restore=handle(self._restore),
            finish=handle(partial(_tell_stopped, self._clock)),
            timeout=settings.timeout,
            after=settings.after,
            before=settings.before,
            devices=settings.devices,
            kind="vm",
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
        memory = self._frozen.recall()
        if found:
            close_files(memory)
        else:
            self._qemu.memory = memory
        self._registering = True
        if not await asyncio.to_thread(_register, self._producer, self._stopping):
            return 0
        self._registering = False
        if self._producer.told != FREEZE:
            await self._continue_left()
        if not (self._qemu.is_up or self._qemu.has_ended or self._refused or self._frozen.is_there):
            check_unshared(self._settings.name, self._root)
            async with self._take_turn():
                await self._qemu.start_guest()
        notify_manager(f"READY=1\nSTATUS={self._refused or 'The guest is there.'}")
        code = await self._watch()
        self._producer.stop()
        return code

    async def _continue_left(self) -> None:
        """Continue a guest that an earlier khod-vm has stopped for a handover which is over: khod saw its end."""
        async with self._take_turn():
            if self._frozen.is_there:
                LOG.warning("The guest was stopped for a handover that has ended; it continues")
                await self._thaw(Step("thaw", "", UNDO_SECONDS))

    @asynccontextmanager
    async def _take_turn(self) -> AsyncIterator[None]:
        """Hold the machine for one verb; if QEMU has ended meanwhile, that is judged after it."""
        try:
            async with self._turn:
                yield
        finally:
            self._changed.set()

    def _stop(self) -> None:
        self._stopping.set()
        self._changed.set()
        if self._registering and not self._turn.locked():  # it waits, perhaps for what khod cannot give back
            self._producer.stop()

    async def _watch(self) -> int:
        """Return when khod-vm is to end: QEMU has ended while no handover holds the guest, or SIGTERM came."""
        while not self._stopping.is_set():
            self._changed.clear()
            is_held = self._turn.locked() or self._frozen.is_there or bool(self._refused)
            if self._qemu.ends_with_qemu and not self._qemu.is_up and not is_held:
                return await self._end_with_qemu()
            await self._changed.wait()
        async with self._take_turn():
            pass  # a verb that is under way may have stopped the guest, or not yet
        if self._frozen.is_there and not await _is_host_stopping():
            LOG.warning("khod-vm is stopped in the middle of a handover: the guest continues, and the handover ends")
            self._producer.stop()
            await self._continue_left()
        await self._qemu.end_guest(is_frozen=self._frozen.is_there)
        return 0

    async def _end_with_qemu(self) -> int:
        """Return the exit code of khod-vm where QEMU is gone for good: its own one, or 1 where the guest was lost."""
        code = await self._qemu.wait_end() if self._qemu.has_ended else 1
        LOG.warning("QEMU has ended with code %d", code)
        await self._qemu.end_guest(is_frozen=False)
        return code

    def _note_qemu_end(self) -> None:
        if self._frozen.is_there:
            LOG.warning("QEMU has ended while its guest is stopped for a handover")
        elif not self._qemu.ends_with_qemu:
            LOG.warning("QEMU has ended")
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
            disks = await list_disks(vm)
        check_unshared(self._settings.name, self._root, disks)
        await sync_disks(disks)
        await self._clock.note_lag()
        return self._qemu.memory

    async def _freeze(self, step: Step) -> Mapping[str, int]:
        if not self._qemu.memory:
            if await self._qemu.find():
                raise VmError("its QEMU was started since `prepare`")
            return {}  # it is still switched off
        async with self._qemu.open_monitor(_report_to(step)) as vm:
            self._qemu.require_same(vm)
            running = await vm.run_state() in RUNNING_STATES
            state = self._frozen.begin(self._qemu.memory, running=running)
            await save_state(vm, state, self._ram_bytes)
        given = [*self._settings.given]
        self._frozen.complete(About(self._qemu.command, given, running, not self._ram_bytes, self._clock.lag))
        return self._frozen.files

    async def _thaw(self, step: Step) -> None:
        """Continue the guest; where QEMU has ended meanwhile, start another one with the state that is here."""
        if not self._frozen.is_there:
            return  # freeze has refused before it stopped the guest
        about, state = self._frozen.about, self._frozen.files.get(STATE, -1)
        running = self._frozen.was_running
        if about is not None and not running and self._qemu.ends_with_qemu:
            await self._qemu.kill()  # it is `postmigrate`, and only `cont` would end that
        if not await _continue_in_place(self._qemu, state, step, running=running):
            if about is not None and self._qemu.memory and not is_spent(state):
                await self._start_with(about, self._qemu.memory, state, step)
            else:
                LOG.error("QEMU has ended, and the guest's state is not here: the guest is lost")
        self._frozen.release()

    async def _restore(self, step: Step) -> None:
        """Start QEMU with the guest that came from the kernel before."""
        memory = dict(step.files)
        state, about_file = memory.pop(STATE, -1), memory.pop(ABOUT, -1)
        try:
            if state < 0 or about_file < 0:
                raise VmError(f"what came is not a guest: {join_names(sorted(step.files)) or 'nothing'}")
            about = read_about(about_file)
            if await _is_taken_back(self._qemu, memory, state):
                if about.running:
                    async with self._qemu.open_monitor(_report_to(step)) as vm:
                        await continue_guest(vm)
            elif is_spent(state):
                LOG.error("The guest has continued in this kernel, and its QEMU has ended since: its state is lost")
            else:
                await self._qemu.kill()
                about = await self._repair(about) if self._refused else about
                try:
                    await self._start_with(about, memory, state, step)
                finally:
                    if is_spent(state):
                        memory = {}  # they are that QEMU's
                    else:
                        self._qemu.memory = {}
            self._refused = ""
            notify_manager("STATUS=The guest was taken back.")
        except BaseException as error:  # whatever it was: the guest must not be started anew beside its state
            self._refused = f"The guest was not taken back, and its state is kept: {_give_reason(error, step)}"
            LOG.error(
                "%s. Repair the cause, or the command in its file, then: khoctl producers retry %s",
                self._refused,
                self._settings.name,
            )
            notify_manager(f"STATUS={self._refused}")
            raise
        finally:
            for fd in (state, about_file, *memory.values()):
                if fd >= 0:
                    os.close(fd)

    async def _start_with(self, about: About, memory: Mapping[str, int], state: int, step: Step) -> None:
        """Start QEMU with this guest; one in which the guest has not continued is ended again."""
        try:
            async with self._qemu.start_session(about.command, memory, incoming=True, not_yet=_report_to(step)) as vm:
                await load_state(vm, state, is_memory_apart=about.is_memory_apart)
                self._qemu.note_arrived()
                if about.running:
                    await _continue_once(vm, state)
                else:
                    spend_state(state)  # whoever has paused it may continue it
        except BaseException:
            if not is_spent(state):
                await self._qemu.kill()
            raise
        if about.running:
            self._clock.note_continued(about.lag)

    async def _repair(self, about: About) -> About:
        """Return how QEMU is started after it was refused: if the machine's file was changed, as that says now."""
        given = [*load_settings(self._settings.name, self._root).given]
        return (
            about if given == about.given else replace(about, given=given, command=await self._qemu.pin_command(given))
        )


def _register(producer: Producer, stopping: asyncio.Event) -> bool:
    """Register with khod, and wait for it if need be; False if khod-vm is to end instead.

    A guest that came from the kernel before must not be started anew, and only khod knows whether there is one.
    """
    told = False
    while not stopping.is_set():
        try:
            producer.start()
        except Unreachable as error:
            if not told:
                notify_manager(f"STATUS=Waiting for khod: {error}")
                LOG.warning("Waiting for khod, which knows whether there is a guest to take back: %s", error)
            told = True
            time.sleep(RETRY_SECONDS)
        else:
            return True
    return False


async def _continue_in_place(qemu: QemuProcess, state: int, step: Step, *, running: bool) -> bool:
    """Let the guest continue in its QEMU, if it was `running`; whether that QEMU is there."""
    if not qemu.is_up:
        return False
    if running:
        try:
            async with qemu.open_monitor(_report_to(step)) as vm:
                await end_migration(vm)
                await _continue_once(vm, state)
        except QmpUnavailable:
            if await qemu.ends_soon():
                return False
            raise
    return True


async def _is_taken_back(qemu: QemuProcess, memory: Mapping[str, int], state: int) -> bool:
    """Whether a QEMU has this guest: an earlier khod-vm was killed after that, before it could say so.

    VmError where another guest is in its place: that one has written to the disks, and is not ours to end.
    """
    if not await qemu.find():
        return False
    is_same = have_same_files(qemu.memory, memory)
    if not is_same and not is_spent(state):
        raise VmError("a QEMU without the guest's RAM is in its place, and was not touched: end it first")
    return is_same and is_spent(state)


def _make_handler(
    loop: asyncio.AbstractEventLoop, turn: Callable[[], AbstractAsyncContextManager[None]], carry_out: CarryOut
) -> Handler:
    """Return a handler for the producer's thread, which waits for `carry_out` in the event loop."""

    async def take_turn(step: Step, seconds: float) -> Mapping[str, int] | None:
        async with asyncio.timeout(seconds), turn():
            return await carry_out(step)

    def handle(step: Step) -> Mapping[str, int] | None:
        seconds = step.timeout or UNDO_SECONDS
        done = asyncio.run_coroutine_threadsafe(take_turn(step, seconds), loop)
        try:
            return done.result()
        except (VmError, KhoError) as error:
            raise Veto(str(error)) from None
        except TimeoutError:
            raise Veto(f"not done within {seconds:g} s") from None
        except OSError as error:
            raise Veto(f"{error.filename or 'a file'}: {errno_text(error)}") from None

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
    if isinstance(error, VmError | KhoError):
        return str(error)
    if isinstance(error, asyncio.CancelledError):
        return f"not done within {step.timeout:g} s"
    return f"{type(error).__name__}: {error}"


async def _tell_stopped(clock: GuestClock, step: Step) -> None:
    if (seconds := await clock.wait_stopped()) is not None:
        step.note_stopped(seconds)


async def _continue_once(vm: Monitor, state: int) -> None:
    """Let the guest continue, and see that nobody lets it continue from its saved state a second time."""
    await vm.run_state()  # it answers: otherwise the guest has not continued, and its state is good
    spend_state(state)
    try:
        await continue_guest(vm)
    except QmpUnavailable:
        raise  # whether it continues is not known
    except VmError:
        unspend_state(state)
        raise


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
        with _hold_directory(directory):
            return asyncio.run(_run(settings, directory, found.root))
    except KhoError as error:
        LOG.error("%s", error)
        return int(error.exit)
    except VmError as error:
        LOG.error("%s", error)
    except OSError as error:
        LOG.error("%s", f"{error.filename or 'A file'}: {errno_text(error)}")
    return 1


@contextmanager
def _hold_directory(directory: Path) -> Iterator[None]:
    """Be the only khod-vm of this directory; VmError where there is one: both would end the other's QEMU."""
    with open(directory / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise VmError(f"another khod-vm has {directory}: end it first") from None
        yield


async def _run(settings: VmSettings, directory: Path, root: Path) -> int:
    return await Supervisor(settings, directory, root).run()
