# SPDX-License-Identifier: LGPL-2.1-or-later
"""The QEMU of one virtual machine: started with the guest's RAM in a memfd, or taken over from an earlier khod-vm."""

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from khod.errors import UsageError, errno_text
from khod.text import one_line
from khod.vm.arguments import complete_command, pin_machine
from khod.vm.monitor import Monitor, NotYet, QmpUnavailable, VmError, open_monitor
from khod.vm.settings import VmSettings

RAM_NAME = "khod-ram"
ADOPT_SECONDS = 10.0
POLL_SECONDS = 0.01
HELP_SECONDS = 30.0


class VmProcess:
    """One virtual machine. Its QMP socket, and the command line it was started with, are in `directory`.

    All methods that fail raise VmError.
    """

    def __init__(self, settings: VmSettings, directory: Path) -> None:
        self._settings = settings
        self._socket, self._started = directory / "qmp", directory / "command.json"
        self.command: list[str] = []
        """The operator's command line with the machine type that this QEMU has."""
        self.memory = -1
        """The memfd with the guest's RAM."""
        self._pidfd = -1
        self._ended = asyncio.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._last_lines: deque[str] = deque(maxlen=3)

    @property
    def is_up(self) -> bool:
        """Whether QEMU is there."""
        return self._pidfd >= 0 and not _has_ended(self._pidfd)

    @property
    def has_ended(self) -> bool:
        """Whether QEMU was there and has ended."""
        return self._pidfd >= 0 and _has_ended(self._pidfd)

    async def adopt(self) -> bool:
        """Take over a QEMU that an earlier khod-vm of this boot has started; return whether there is one.

        The process is the one at the other end of its QMP socket, and its RAM the memfd of khod-vm's name.
        """
        try:
            async with asyncio.timeout(ADOPT_SECONDS), self.open_monitor() as vm:
                pid = vm.pid
                self._watch_process(pid)
            self.command = [str(word) for word in json.loads(self._started.read_text())]
            self.memory = _open_memory(pid)
        except QmpUnavailable:
            return False
        except (OSError, ValueError, TimeoutError) as error:
            raise VmError(f"a QEMU of an earlier khod-vm is there, and cannot be taken over: {error}") from None
        return True

    async def pin_command(self) -> list[str]:
        """Return the operator's command line with a versioned machine type, as the QEMU of today has it."""
        command = self._settings.command
        try:
            asked = await asyncio.to_thread(
                subprocess.run, [command[0], "-machine", "help"], capture_output=True, timeout=HELP_SECONDS, check=False
            )
            return pin_machine(command, asked.stdout.decode(errors="replace"))
        except OSError as error:
            raise VmError(f"{command[0]} cannot be started: {errno_text(error)}") from None
        except (UsageError, subprocess.SubprocessError) as error:
            raise VmError(one_line(str(error))) from None

    async def start(self, command: Sequence[str], memory: int, *, incoming: bool = False) -> None:
        """Start QEMU and wait until it answers; `memory` becomes this machine's."""
        await self._run_up()
        with suppress(FileNotFoundError):
            self._socket.unlink()
        size = os.fstat(memory).st_size
        argv = complete_command(command, memory, size, self._socket, incoming=incoming)
        self._last_lines.clear()
        try:
            self._started.write_text(json.dumps([*command]))
            self._process = subprocess.Popen(  # noqa: ASYNC220, S603 - fork and exec alone; the words are the administrator's
                argv, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, pass_fds=[memory], process_group=0
            )
        except OSError as error:
            raise VmError(f"{argv[0]} cannot be started: {errno_text(error)}") from None
        self.command, self.memory = [*command], memory
        self._watch_process(self._process.pid)
        threading.Thread(target=self._pass_on, args=(self._process,), name="qemu-stderr", daemon=True).start()
        await self._wait_answer()

    @asynccontextmanager
    async def open_monitor(self, not_yet: NotYet = lambda _reason, _progress: None) -> AsyncIterator[Monitor]:
        """Open a QMP session."""
        async with open_monitor(str(self._socket), not_yet) as vm:
            yield vm

    async def wait_end(self) -> int:
        """Wait until QEMU has ended; return its exit code, 0 for one that this process did not start."""
        await self._ended.wait()
        return self._process.wait() if self._process is not None else 0

    async def power_down(self, seconds: float) -> None:
        """Have the guest shut down, and end QEMU at the latest after `seconds`."""
        with suppress(VmError, TimeoutError):
            async with asyncio.timeout(seconds):
                async with self.open_monitor() as vm:
                    await vm.execute_command("system_powerdown")
                await self.wait_end()
        await self.kill()

    async def kill(self) -> None:
        """End QEMU at once."""
        if self._pidfd < 0:
            return
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        await self.wait_end()
        os.close(self._pidfd)
        self._pidfd, self._process = -1, None

    def _watch_process(self, pid: int) -> None:
        self._pidfd, self._ended = os.pidfd_open(pid), asyncio.Event()
        asyncio.get_running_loop().add_reader(self._pidfd, self._note_end)

    def _note_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        self._ended.set()

    async def _wait_answer(self) -> None:
        while True:
            if not self.is_up:
                assert self._process is not None
                code = await asyncio.to_thread(self._process.wait)
                raise VmError(f"QEMU ended with code {code}: {' / '.join(self._last_lines) or 'it gave no reason'}")
            with suppress(QmpUnavailable):
                async with self.open_monitor():
                    return
            await asyncio.sleep(POLL_SECONDS)

    async def _run_up(self) -> None:
        if not self._settings.up:
            return
        environment = {**os.environ, "KHO_NAME": self._settings.name}
        try:
            process = await asyncio.create_subprocess_exec(*self._settings.up, env=environment)
            code = await process.wait()
        except OSError as error:
            raise VmError(f"{self._settings.up[0]} cannot be started: {errno_text(error)}") from None
        if code:
            raise VmError(f"{self._settings.up[0]} ended with code {code}: QEMU is not started")

    def _pass_on(self, process: "subprocess.Popen[bytes]") -> None:
        """Pass QEMU's messages on to the journal, and keep the last ones for a reason."""
        assert process.stderr is not None
        with process.stderr:
            for line in process.stderr:
                self._last_lines.append(one_line(line.decode(errors="replace")))
                with suppress(OSError):
                    sys.stderr.buffer.write(line)
                    sys.stderr.buffer.flush()


def create_memory(size: int) -> int:
    """Return a memfd of this size for a guest's RAM."""
    memory = os.memfd_create(RAM_NAME, os.MFD_CLOEXEC)
    os.ftruncate(memory, size)
    return memory


def _open_memory(pid: int) -> int:
    """Return a descriptor of the RAM that khod-vm gave to this process; OSError if it has none."""
    directory = Path(f"/proc/{pid}/fd")
    for link in directory.iterdir():
        with suppress(OSError):
            if os.readlink(link).startswith(f"/memfd:{RAM_NAME} "):
                return os.open(link, os.O_RDWR | os.O_CLOEXEC)
    raise OSError(2, "it has no RAM of khod-vm's", str(directory))


def _has_ended(pidfd: int) -> bool:
    """Whether the process has ended; its parent may not have waited for it yet."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
