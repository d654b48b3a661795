# SPDX-License-Identifier: LGPL-2.1-or-later
"""A QEMU that somebody else starts, as libvirt or a unit: its RAM is copied out of it, and it is started again by them.

Its RAM must be memfds (-object memory-backend-memfd,share=on). They are had by pidfd_getfd(2), and matched to QEMU's
memory backends by their sizes. In the next kernel the program in `restart` is given them in systemd's way
(sd_listen_fds(3)): each under its backend's name in LISTEN_FDNAMES. It starts QEMU with these files as
`memory-backend-file,id=NAME,mem-path=/proc/self/fd/N,share=on` and `-incoming defer`.
"""

import asyncio
import errno
import fcntl
import os
import resource
import signal
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from pathlib import Path

from khod.abi.pidfd import pidfd_getfd
from khod.concurrency.command import run_command
from khod.errors import errno_text
from khod.systemd.notifier import notify_manager
from khod.text import one_line
from khod.vm.migration import list_memory
from khod.vm.monitor import Monitor, NotYet, QmpAbsent, QmpUnavailable, VmError
from khod.vm.process import QUIET, QemuProcess, have_same_files
from khod.vm.settings import VmSettings

POLL_SECONDS = 0.01
FIRST_FD = 3
"""SD_LISTEN_FDS_START."""
HIGH_FD = 100
ANSWER_SHARE = 0.8
"""The part of the time for a verb in which QEMU must answer; the reason is told in the rest."""
DROP_IN = "khod-vm.conf"
UNITS = Path("/run/systemd/system")
LISTENING = 'LISTEN_PID=$$; export LISTEN_PID; exec "$@"'
PAGE_BYTES = resource.getpagesize()
CLOSED_MEANWHILE = (errno.ENOENT, errno.EBADF)


class KeptProcess(QemuProcess):
    """A QEMU whose QMP socket is `settings.qmp`, and which `settings.restart` starts again: a unit or a command."""

    ends_with_qemu = False

    def __init__(self, settings: VmSettings) -> None:
        super().__init__(settings, Path(settings.qmp))

    async def find(self) -> bool:
        """Find QEMU by its socket, and the files of its RAM; VmError where they are not to be told from others."""
        self.close_memory()
        await self._remove_left_drop_in()
        self.command = [*self._settings.given]
        try:
            async with self.open_monitor() as vm:
                self.memory = await self._watch_memory(vm)
        except QmpAbsent:
            return False
        return True

    async def _remove_left_drop_in(self) -> None:
        """Remove what a khod-vm that was killed has left: with descriptors that are gone, the unit would not start."""
        drop_in = _drop_in_of(self._settings.restart[0])
        if _is_unit(self._settings.restart) and drop_in.exists():
            with suppress(OSError):
                drop_in.unlink()
            await _call_systemctl("daemon-reload")

    async def _watch_memory(self, vm: Monitor) -> dict[str, int]:
        """Watch this QEMU from now on, and return the files of its RAM."""
        try:
            self._watch_process(vm.pid)
            sizes = await list_memory(vm)  # it answers: the process is the one whose pidfd this is
            return _copy_memory(vm.pid, sizes)
        except OSError as error:
            raise VmError(f"its RAM cannot be copied out of QEMU: {errno_text(error)}") from None

    def require_same(self, vm: Monitor) -> None:
        if vm.pid != self.pid or not self.is_up:
            raise VmError("its QEMU was started again since `prepare`, with other RAM")

    async def start_guest(self) -> None:
        """Do nothing: whoever starts this guest starts it."""

    @asynccontextmanager
    async def start_session(
        self, command: Sequence[str], memory: Mapping[str, int], *, incoming: bool = False, not_yet: NotYet = QUIET
    ) -> AsyncIterator[Monitor]:
        """Have it started with the files of its RAM; the program in `command` must start it with -incoming defer."""
        assert incoming, "it is never started anew"
        await self._require_absent()
        async with AsyncExitStack() as stack:
            group = 0
            if _is_unit(command):
                await stack.enter_async_context(self._start_unit(command[0], memory))
            else:
                group = self._start_command(command, memory)
            try:
                vm = await self._wait_session(stack, not_yet)
            except BaseException:
                if group:  # it could start a QEMU with this RAM beside the next attempt's
                    with suppress(ProcessLookupError):
                        os.killpg(group, signal.SIGKILL)
                raise
            await self._require_memory(vm, memory)
            self.command, self.memory = [*command], {**memory}
            yield vm

    async def _wait_session(self, stack: AsyncExitStack, not_yet: NotYet) -> Monitor:
        """Open a session that ends with `stack`, once QEMU is there; VmError if it does not come."""
        with suppress(TimeoutError):
            async with asyncio.timeout(ANSWER_SHARE * self._settings.timeout):
                while True:
                    with suppress(QmpUnavailable):
                        return await stack.enter_async_context(self.open_monitor(not_yet))
                    await asyncio.sleep(POLL_SECONDS)
        raise VmError(f"{self._settings.restart[0]} has not started a QEMU that answers at {self._socket}")

    async def _require_absent(self) -> None:
        """Raise VmError where a QEMU is at the socket already: it came without the guest, and another would take it."""
        with suppress(QmpAbsent):
            async with self.open_monitor():
                raise VmError("a QEMU without the guest's RAM is in its place, and was not touched: end it first")

    async def _require_memory(self, vm: Monitor, memory: Mapping[str, int]) -> None:
        """Raise VmError if this QEMU does not have these files: it is not the one that was to be started."""
        found: dict[str, int] = {}
        try:
            found = await self._watch_memory(vm)
            if not have_same_files(found, memory):
                raise VmError("the QEMU that was started does not have the guest's RAM; it was not touched: end it")
        except BaseException:
            self._forget_process()  # it is not ours to end
            raise
        finally:
            for fd in found.values():
                os.close(fd)

    async def end_guest(self, *, is_frozen: bool) -> None:
        """Do nothing: whoever started it ends it."""

    @asynccontextmanager
    async def _start_unit(self, unit: str, memory: Mapping[str, int]) -> AsyncIterator[None]:
        """Start a unit with the files, by a drop-in with OpenFile= (systemd 253), which is there meanwhile.

        At boot the unit may have been ordered after khod-vm, so khod-vm is ready before the unit is.
        """
        drop_in = _drop_in_of(unit)
        lines = [f"OpenFile=/proc/{os.getpid()}/fd/{fd}:{name}\n" for name, fd in memory.items()]
        try:
            drop_in.parent.mkdir(parents=True, exist_ok=True)
            drop_in.write_text(f"[Service]\n{''.join(lines)}")
        except OSError as error:
            raise VmError(f"{unit} cannot be given the guest's RAM: {errno_text(error)}") from None
        try:
            await _call_systemctl("daemon-reload")
            await _call_systemctl("--no-block", "restart", unit)
            notify_manager("READY=1")
            yield
        finally:
            drop_in.unlink()
            with suppress(OSError):
                drop_in.parent.rmdir()
            await _call_systemctl("daemon-reload")

    def _start_command(self, command: Sequence[str], memory: Mapping[str, int]) -> int:
        """Start a command with the files; return its process group."""
        environment = {
            **os.environ,
            "KHO_NAME": self._settings.name,
            "LISTEN_FDS": str(len(memory)),
            "LISTEN_FDNAMES": ":".join(memory),
        }
        argv = ["/bin/sh", "-c", LISTENING, "sh", *command]
        try:
            with ExitStack() as stack:
                high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, HIGH_FD) for fd in memory.values()]
                for fd in high:
                    stack.callback(os.close, fd)
                actions = [(os.POSIX_SPAWN_DUP2, fd, FIRST_FD + number) for number, fd in enumerate(high)]
                pid = os.posix_spawn(argv[0], argv, environment, file_actions=actions, setpgroup=0)
        except OSError as error:
            raise VmError(f"{command[0]} cannot be started: {errno_text(error)}") from None
        threading.Thread(target=os.waitpid, args=(pid, 0), name="restart", daemon=True).start()
        return pid


def _is_unit(command: Sequence[str]) -> bool:
    """Whether what starts QEMU again is a unit, by its name."""
    return len(command) == 1 and command[0].endswith(".service")


def _drop_in_of(unit: str) -> Path:
    return UNITS / f"{unit}.d" / DROP_IN


def is_memfd(fd: int) -> bool:
    """Whether this is a file in memory; one that came from the kernel before is no `/memfd:` in /proc (7.3.4)."""
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return True


def _copy_memory(pid: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return a descriptor of the file of each memory backend; VmError where it is not certain which one it is."""
    found: dict[int, dict[int, int]] = {}  # by size and inode
    copied: dict[str, int] = {}
    with ExitStack() as stack:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                if os.stat(link).st_size not in sizes.values():
                    continue
                fd = pidfd_getfd(pid, int(link.name))
            except OSError as error:
                if error.errno in CLOSED_MEANWHILE:
                    continue
                raise
            stack.callback(os.close, fd)
            if is_memfd(fd):
                stats = os.fstat(fd)
                found.setdefault(stats.st_size, {}).setdefault(stats.st_ino, fd)
        for name, size in sizes.items():
            fitting = [*found.get(size, {}).values()]
            same = [other for other, its in sizes.items() if its == size]
            if not fitting:
                raise VmError(f"the RAM {one_line(name)} is not a memfd: have QEMU use memory-backend-memfd,share=on")
            if len(fitting) > 1 or len(same) > 1:
                raise VmError(
                    f"{max(len(fitting), len(same))} files of QEMU's have {size} bytes: which of them is the RAM "
                    f"{one_line(name)} is not known"
                )
            if os.fstatvfs(fitting[0]).f_bsize > PAGE_BYTES:
                raise VmError(f"the RAM {one_line(name)} has huge pages, which the kernel does not carry")
            copied[name] = fcntl.fcntl(fitting[0], fcntl.F_DUPFD_CLOEXEC, FIRST_FD)
    return copied


async def _call_systemctl(*words: str) -> None:
    code, output = await run_command("systemctl", *words)
    if code:
        raise VmError(f"systemctl {' '.join(words)} failed: {one_line(output)}")
