# SPDX-License-Identifier: LGPL-2.1-or-later
"""The QEMU of one virtual machine: started with the guest's RAM in a memfd, or taken over from an earlier khod-vm."""

import asyncio
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

from khod.errors import UsageError, errno_text
from khod.text import join_names, one_line
from khod.vm.arguments import MEMORY_NAME, complete_command, pin_machine
from khod.vm.frozen import close_files
from khod.vm.left_process import LeftProcess
from khod.vm.monitor import Monitor, NotYet, QmpAbsent, QmpUnavailable, VmError, open_monitor
from khod.vm.settings import VmSettings
from khod.vm.slots import hold_slot

ADOPT_SECONDS = 10.0
HELP_SECONDS = 30.0
END_SECONDS = 5.0
SLOTS = ".slots"
"""No machine has this name: a name does not begin with a dot."""
QUIET: NotYet = lambda _reason, _progress: None  # noqa: E731


class QemuProcess(ABC):
    """The QEMU of one virtual machine, found by its QMP socket. All methods that fail raise VmError."""

    ends_with_qemu = True
    """Whether khod-vm ends when QEMU has ended."""

    def __init__(self, settings: VmSettings, qmp: Path) -> None:
        self._settings = settings
        self._socket = qmp
        self.command: list[str] = []
        """What starts QEMU again; the next kernel's khod-vm is told."""
        self.memory: dict[str, int] = {}
        """The files with the guest's RAM, by the names of the memory backends."""
        self.pid = 0
        self._pidfd = -1
        self._ended = asyncio.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self.on_end: Callable[[], None] = lambda: None
        """Called in the event loop once each QEMU has ended, also where that was before it was watched."""

    @property
    def is_up(self) -> bool:
        """Whether QEMU is there."""
        return self._pidfd >= 0 and not _has_ended(self._pidfd)

    @property
    def has_ended(self) -> bool:
        """Whether QEMU was there and has ended."""
        return self._pidfd >= 0 and _has_ended(self._pidfd)

    def open_monitor(self, not_yet: NotYet = QUIET) -> AbstractAsyncContextManager[Monitor]:
        """Open a QMP session."""
        return open_monitor(str(self._socket), not_yet)

    async def wait_end(self) -> int:
        """Wait until QEMU has ended; return its exit code, 0 for one that this process did not start."""
        await self._ended.wait()
        return self._process.wait() if self._process is not None else 0

    async def ends_soon(self) -> bool:
        """Wait at most END_SECONDS for QEMU's end, whose sockets are closed first; whether it has ended."""
        with suppress(TimeoutError):
            async with asyncio.timeout(END_SECONDS):
                await self.wait_end()
        return self.has_ended

    async def kill(self) -> None:
        """End QEMU at once."""
        if self._pidfd < 0:
            return
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        await self.wait_end()
        self._forget_process()
        self._process = None

    @abstractmethod
    async def find(self) -> bool:
        """Find the QEMU that is there already; return whether there is one."""

    def require_same(self, vm: Monitor) -> None:  # noqa: B027 - one that khod-vm starts is not started by others
        """Raise VmError if this session is with another QEMU than the one whose RAM is in `memory`."""

    def note_arrived(self) -> None:  # noqa: B027 - as above
        """Note that the guest's state is loaded: it may run from now on, and QEMU is its only home."""

    @abstractmethod
    async def start_guest(self) -> None:
        """Start the guest anew, at the start of its unit."""

    async def pin_command(self, command: Sequence[str]) -> list[str]:
        """Return what starts QEMU, from the `command` of the machine's file."""
        return [*command]

    @abstractmethod
    def start_session(
        self, command: Sequence[str], memory: Mapping[str, int], *, incoming: bool = False, not_yet: NotYet = QUIET
    ) -> AbstractAsyncContextManager[Monitor]:
        """Start QEMU, and open the first QMP session with it; `memory` becomes this machine's.

        A guest that is `incoming` waits for its state.
        """

    @abstractmethod
    async def end_guest(self, *, is_frozen: bool) -> None:
        """End QEMU, if it is up, at the end of the unit; with `is_frozen` the guest's state is handed over."""

    def close_memory(self) -> None:
        """Close the files of the guest's RAM."""
        close_files(self.memory)
        self.memory = {}

    def _watch_process(self, pid: int) -> None:
        self._forget_process()
        self.pid, self._pidfd, self._ended = pid, os.pidfd_open(pid), asyncio.Event()
        asyncio.get_running_loop().add_reader(self._pidfd, self._note_end)

    def _note_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        self._ended.set()
        self.on_end()

    def _forget_process(self) -> None:
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1


class VmProcess(QemuProcess):
    """A QEMU that khod-vm starts, with the guest's RAM in a memfd.

    Its QMP socket, and a file that says how it was started, are in `directory`. The directory above has the slots for
    those that start at the same time.
    """

    def __init__(self, settings: VmSettings, directory: Path) -> None:
        super().__init__(settings, directory / "qmp")
        self._started, self._slots = directory / "command.json", directory.parent / SLOTS
        self._arriving = directory / "arriving"
        """The process of a QEMU that has not taken its guest yet: it can be killed, and need not answer."""
        self._last_lines: deque[str] = deque(maxlen=3)
        self._passing: threading.Thread | None = None

    async def find(self) -> bool:
        """Find a QEMU that an earlier khod-vm of this boot has started.

        The process is the one at the other end of its QMP socket. Its RAM is the file that it was started with: a memfd
        that came through a jump does not have khod-vm's name.
        """
        self.close_memory()
        self._kill_arriving()
        if not self._socket.exists():  # after a jump: the QMP library is then loaded while QEMU starts
            return False
        try:
            async with asyncio.timeout(ADOPT_SECONDS), self.open_monitor() as vm:
                self._watch_process(vm.pid)
                path = await vm.execute_command("qom-get", path=f"/objects/{MEMORY_NAME}", property="mem-path")
            self.command = [str(word) for word in json.loads(self._started.read_text())]
            self.memory = {MEMORY_NAME: _open_memory(vm.pid, str(path))}
        except QmpAbsent:
            return False
        except (VmError, OSError, ValueError, TimeoutError) as error:
            reason = str(error) or f"it did not answer within {ADOPT_SECONDS:g} s"
            raise VmError(f"a QEMU of an earlier khod-vm is there, and cannot be taken over: {reason}") from None
        return True

    def note_arrived(self) -> None:
        self._arriving.unlink(missing_ok=True)

    def _kill_arriving(self) -> None:
        """Kill a QEMU in which an earlier khod-vm was taking the guest back: its state is not in there alone.

        One that was started in the very moment in which khod-vm was killed is not known; without its socket it waits
        for a state that never comes, and runs no guest.
        """
        if not self._arriving.exists():
            return
        with suppress(OSError, ValueError):
            pid, started = self._arriving.read_text().split()
            LeftProcess(int(pid), int(started)).kill()
        self._socket.unlink(missing_ok=True)
        self._arriving.unlink(missing_ok=True)

    async def start_guest(self) -> None:
        """Start the guest anew; where QEMU has ended instead, run `down`: khod-vm ends too."""
        command = await self.pin_command(self._settings.given)
        try:
            async with self.start_session(command, {MEMORY_NAME: create_memory(self._settings.size)}):
                pass
        except Exception:
            if not self.is_up:
                with suppress(VmError):  # the first failure is the one to report
                    await self.end_guest(is_frozen=False)
            raise

    @asynccontextmanager
    async def start_session(
        self, command: Sequence[str], memory: Mapping[str, int], *, incoming: bool = False, not_yet: NotYet = QUIET
    ) -> AsyncIterator[Monitor]:
        if {*memory} != {MEMORY_NAME}:
            names = join_names(sorted(memory)) or "missing"
            raise VmError(f"what came is not a guest of khod-vm's: its RAM is {names}")
        await self._run_command(self._settings.up)
        async with hold_slot(self._slots, not_yet):  # until the session ends
            self._execute_qemu(command, memory[MEMORY_NAME], incoming=incoming)
            async with self._open_first(not_yet) as vm:
                yield vm

    def _execute_qemu(self, command: Sequence[str], memory: int, *, incoming: bool) -> None:
        size = os.fstat(memory).st_size
        self._last_lines.clear()
        try:
            if incoming:
                self._arriving.write_text("")
            self._started.write_text(json.dumps([*command]))
            with _listen_unix(self._socket) as listener:
                argv = complete_command(command, memory, size, listener.fileno(), incoming=incoming)
                self._process = subprocess.Popen(  # noqa: S603 - fork and exec alone; the words are the administrator's
                    argv,
                    stdin=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    pass_fds=[memory, listener.fileno()],
                    process_group=0,
                )
        except OSError as error:
            raise VmError(f"{command[0]} cannot be started: {errno_text(error)}") from None
        if incoming:
            self._arriving.write_text(f"{self._process.pid} {LeftProcess.of(self._process.pid).started}")
        self.command, self.memory = [*command], {MEMORY_NAME: memory}
        self._watch_process(self._process.pid)
        self._passing = threading.Thread(target=self._pass_on, args=(self._process,), name="qemu-stderr", daemon=True)
        self._passing.start()

    @asynccontextmanager
    async def _open_first(self, not_yet: NotYet) -> AsyncIterator[Monitor]:
        """Open a QMP session once QEMU is ready; VmError with its last messages if it ends before."""
        async with AsyncExitStack() as stack:
            try:
                vm = await stack.enter_async_context(self.open_monitor(not_yet))
            except QmpUnavailable:
                if await self.ends_soon():
                    raise VmError(await self._describe_end()) from None
                raise
            yield vm

    async def end_guest(self, *, is_frozen: bool) -> None:
        """Have the guest shut down, within `stop_timeout`; a frozen one needs its QEMU no longer. Then run `down`."""
        if not is_frozen and self.is_up:
            with suppress(VmError, TimeoutError):
                async with asyncio.timeout(self._settings.stop_timeout):
                    async with self.open_monitor() as vm:
                        await vm.execute_command("system_powerdown")
                    await self.wait_end()
        await self.kill()
        await self._run_command(self._settings.down)

    async def pin_command(self, command: Sequence[str]) -> list[str]:
        """Return the operator's command line with a versioned machine type, as the QEMU of today has it."""
        try:
            asked = await asyncio.to_thread(
                subprocess.run, [command[0], "-machine", "help"], capture_output=True, timeout=HELP_SECONDS, check=False
            )
            return pin_machine(command, asked.stdout.decode(errors="replace"))
        except OSError as error:
            raise VmError(f"{command[0]} cannot be started: {errno_text(error)}") from None
        except (UsageError, subprocess.SubprocessError) as error:
            raise VmError(one_line(str(error))) from None

    async def _describe_end(self) -> str:
        code = await self.wait_end()
        if self._passing is not None:  # what it said last may still be in the pipe
            await asyncio.to_thread(self._passing.join, END_SECONDS)
        return f"QEMU ended with code {code}: {' / '.join(self._last_lines) or 'it gave no reason'}"

    async def _run_command(self, words: Sequence[str]) -> None:
        """Run one of the operator's commands, if there is one; VmError if it fails."""
        if not words:
            return
        environment = {**os.environ, "KHO_NAME": self._settings.name}
        try:
            process = await asyncio.create_subprocess_exec(*words, env=environment)
            code = await process.wait()
        except OSError as error:
            raise VmError(f"{words[0]} cannot be started: {errno_text(error)}") from None
        if code:
            raise VmError(f"{words[0]} ended with code {code}")

    def _pass_on(self, process: "subprocess.Popen[bytes]") -> None:
        """Pass QEMU's messages on to the journal, and keep the last ones for a reason."""
        assert process.stderr is not None
        with process.stderr:
            for line in process.stderr:
                self._last_lines.append(one_line(line.decode(errors="replace")))
                with suppress(OSError):
                    sys.stderr.buffer.write(line)
                    sys.stderr.buffer.flush()


def _listen_unix(path: Path) -> socket.socket:
    """Return a listening socket for QEMU: whoever connects before QEMU is ready waits, and need not try again."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(str(path))
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener


def create_memory(size: int) -> int:
    """Return a memfd of this size for a guest's RAM."""
    memory = os.memfd_create(MEMORY_NAME, os.MFD_CLOEXEC)
    os.ftruncate(memory, size)
    return memory


def _open_memory(pid: int, path: str) -> int:
    """Return a descriptor of the RAM that khod-vm gave to this process; `path` is QEMU's, below /proc/self."""
    return os.open(path.replace("/proc/self/", f"/proc/{pid}/", 1), os.O_RDWR | os.O_CLOEXEC)


def have_same_files(one: Mapping[str, int], other: Mapping[str, int]) -> bool:
    """Whether both have the same names, and the same file under each."""
    return {*one} == {*other} and all(os.path.sameopenfile(fd, other[name]) for name, fd in one.items())


def _has_ended(pidfd: int) -> bool:
    """Whether the process has ended; its parent may not have waited for it yet."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
