# SPDX-License-Identifier: LGPL-2.1-or-later
"""Processes that khod starts or inherits: each exit status is taken once, by the code that waits for it.

khod is a child subreaper: what a command leaves behind becomes khod's child when its parent ends, in any session and
with any environment. Such an orphan is reaped when it ends. These children are not, because other code waits for them:

- A command started by `Children`, and a child of asyncio, which are known here by their PIDs.
- Any other child in khod's own session, which khod has started. Commands, and all they start, have sessions of their
  own: setsid(2) cannot be undone.

The end of a child is an event of its pidfd in the event loop: no thread waits for it, so a rollback needs no new one.
"""

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from khod.abi.procstat import ProcessStat, read_stat
from khod.producers.commands import KILL_WAIT_SECONDS, Command
from khod.producers.identity import process_of, wait_ended

RETRY_SECONDS = 0.1
"""Seconds until a child that has ended, but cannot be waited for yet, is tried again: a debugger holds it."""

PR_SET_CHILD_SUBREAPER = 36  # include/uapi/linux/prctl.h
_prctl = ctypes.CDLL(None, use_errno=True).prctl
_prctl.restype = ctypes.c_int
_prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong]

_awaited: set[int] = set()
"""PIDs of children whose exit status is taken by the code that waits for them."""
_unwatched: list["subprocess.Popen[bytes]"] = []
"""Commands that were killed at once, because there was no descriptor to watch them."""
_adopts = False


class Child:
    """A command that runs in a session of its own. Its exit status is taken when it ends, awaited or not."""

    def __init__(self, process: "subprocess.Popen[bytes]", environment: Mapping[str, str]) -> None:
        self._marks = {f"{name}={value}".encode() for name, value in environment.items()}
        self.pid = process.pid
        self._process = process
        self._loop = asyncio.get_running_loop()
        self._end: asyncio.Future[int | None] = self._loop.create_future()
        self._pidfd = os.pidfd_open(self.pid)
        try:
            self._loop.add_reader(self._pidfd, self._on_end)
        except OSError:
            os.close(self._pidfd)
            raise
        _awaited.add(self.pid)

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return not self._end.done()

    async def wait_end(self) -> int | None:
        """Wait for its end; return its exit code, -N if signal N killed it, None if other code took its status."""
        return await asyncio.shield(self._end)

    async def end(self) -> list[str]:
        """Kill it and everything it started; describe the processes that still exist KILL_WAIT_SECONDS later.

        A process that left its process group is recognized by the environment it was started with, and is khod's child
        once its own parent has ended. A process that does not die sleeps in the kernel: it is left alone, and reaped
        when it ends.
        """
        deadline = self._loop.time() + KILL_WAIT_SECONDS
        killed: set[int] = set()
        if self.is_running:
            _kill_group(self.pid)
        while self._loop.time() < deadline:
            strays = [pid for pid in set(_own_children()) - _awaited - killed if self._marks <= _read_environment(pid)]
            for pid in strays:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)  # its PID is not reused before it was waited for
            killed.update(strays)
            if not strays and not self.is_running:
                break
            await _wait_all([*map(_wait_gone, strays), self.wait_end()], deadline)
        reap_orphans()
        left = [self.pid] if self.is_running else []
        return [text for pid in (*left, *sorted(killed)) if (text := describe_undead(pid))]

    def _on_end(self) -> None:
        self._loop.remove_reader(self._pidfd)
        # Kill what is left in its group before it is waited for: afterwards the number may be another group's.
        _kill_group(self.pid)
        try:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
        except ChildProcessError:
            code = None
        else:
            if pid == 0:
                self._loop.call_later(RETRY_SECONDS, self._on_end)
                return
            code = os.waitstatus_to_exitcode(status)
        os.close(self._pidfd)
        _awaited.discard(self.pid)
        self._process.returncode = -1 if code is None else code  # otherwise subprocess would wait for this PID again
        if not self._end.done():
            self._end.set_result(code)


class Children:
    """Runs commands as children of khod; see `khod.producers.commands.CommandRunner`."""

    has_units = False

    async def start_command(self, command: Command, stdout: int, stderr: int) -> Child:
        """Start a command in a session of its own."""
        process = subprocess.Popen(  # noqa: ASYNC220, S603 - env(1) is in memory; the words are the administrator's
            command.launch_argv,
            env=command.environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
        try:
            return Child(process, command.environment)
        except OSError:
            _kill_group(process.pid)
            _unwatched.append(process)
            raise

    async def prepare_command(self, _command: Command, _stdout: int, _stderr: int) -> None:
        """Prepare nothing: a child takes little more than its command."""


def adopt_orphans() -> None:
    """Make this process the reaper of the orphans below it (PR_SET_CHILD_SUBREAPER of prctl(2)); OSError if that fails.

    If this is called in an event loop, an orphan is reaped when it ends, and asyncio waits for its own children without
    a thread for each. Otherwise orphans are reaped at the end of the next command.
    """
    global _adopts  # noqa: PLW0603 - prctl's setting is also for the whole process
    if _prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), "prctl(PR_SET_CHILD_SUBREAPER)")
    _adopts = True
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return
    loop.add_signal_handler(signal.SIGCHLD, reap_orphans)
    if sys.version_info < (3, 12):  # later versions do so by themselves
        watcher = _Watcher()
        watcher.attach_loop(loop)
        asyncio.set_child_watcher(watcher)


def reap_orphans() -> None:
    """Take the exit status of every orphan that has ended, and of no other child."""
    for process in [process for process in _unwatched if process.poll() is not None]:
        _unwatched.remove(process)
    if not _adopts:
        return
    for pid in _own_children():
        if pid in _awaited or any(process.pid == pid for process in _unwatched):
            continue
        found = _look_up(pid)
        if found is not None and found.state == "Z" and found.session != os.getsid(0):
            with suppress(ChildProcessError):
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)


if sys.version_info < (3, 12):

    class _Watcher(asyncio.PidfdChildWatcher):
        """Waits for asyncio's children as Python 3.12 does, and enters them in `_awaited`."""

        def add_child_handler(self, pid: int, callback: Callable[..., object], *args: object) -> None:
            super().add_child_handler(pid, self._on_end, callback, *args)
            _awaited.add(pid)

        def _on_end(self, pid: int, code: int, callback: Callable[..., object], *args: object) -> None:
            _awaited.discard(pid)
            callback(pid, code, *args)


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


async def _wait_gone(pid: int) -> None:
    """Wait for the end of a process; return at once if there is no descriptor left for that."""
    with suppress(OSError):
        await wait_ended(process_of(pid))


async def _wait_all(ends: Iterable[Coroutine[Any, Any, object]], deadline: float) -> None:
    """Wait for all of these, at most until `deadline` (a time of the event loop)."""
    waiting = [asyncio.ensure_future(end) for end in ends]
    try:
        await asyncio.wait(waiting, timeout=max(0.0, deadline - asyncio.get_running_loop().time()))
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


def _look_up(pid: int) -> ProcessStat | None:
    """Return a description of a process; None if it does not exist."""
    try:
        return read_stat(pid)
    except OSError:
        return None


def describe_undead(pid: int) -> str:
    """Describe a process that still exists after SIGKILL; "" if it has ended."""
    found = _look_up(pid)
    if found is None or found.state in "ZX":
        return ""
    why = "it sleeps in the kernel and does not die" if found.state == "D" else f"it does not die (state {found.state})"
    return f"process {pid} ({found.name}) was sent SIGKILL: {why}"


def open_children(parent: int, stack: ExitStack) -> dict[int, int]:
    """Return a pidfd for each child of a process, by PID; `stack` closes them. OSError if there is no descriptor left.

    Not every kernel lists the children of a process (CONFIG_PROC_CHILDREN).
    """
    found = {}
    for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
        if (seen := _look_up(pid)) is None or seen.parent != parent:
            continue
        with suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            stack.callback(os.close, pidfd)
            if (seen := _look_up(pid)) is not None and seen.parent == parent:  # its PID was not used again before
                found[pid] = pidfd
    return found


def _own_children() -> list[int]:
    """Return the PIDs of this process's children; none if the kernel does not list them (CONFIG_PROC_CHILDREN)."""
    found: list[int] = []
    with suppress(OSError):  # a thread that ends just now, or no descriptor left
        for task in os.listdir("/proc/self/task"):
            found += map(int, Path(f"/proc/self/task/{task}/children").read_text().split())
    return found


def _read_environment(pid: int) -> set[bytes]:
    try:
        return set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    except OSError:
        return set()
