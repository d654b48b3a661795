# SPDX-License-Identifier: LGPL-2.1-or-later
"""A unit that systemd has started, whose command waits for khod: to freeze a hook then takes no more than its command.

The main process of the unit is a shell with one end of a pair of sockets; only khod has the other. A line from khod has
it run the command, and it answers with the exit code; at the end of the file, as where khod has died, it ends.

systemd has no part in what follows, and may be busy: the kernel says when the control group is empty. As of any unit,
systemd kills what is left of it when its main process has ended.
"""

import asyncio
import os
import select
import signal
import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from khod.concurrency.bounded import CUT_SECONDS, settle_task
from khod.producers.cgroup import CGROUPS, units_in
from khod.producers.commands import GATEKEEPER, KILL_WAIT_SECONDS, Command, RunningCommand

SHELL = "/bin/sh"
SCRIPT = """\
exec 3<&0 4>&2 </dev/null 2>/dev/null
(:) && echo >&3 && read -r go <&3 || exit 0
(exec "$@" 2>&4 3>&- 4>&-)
code=$?
echo $code >&3
exit $code
"""
"""It shows before that it can do what it must: make a process, and answer."""
KILLED = 128  # sh(1) adds it to the number of the signal
UNFIT = frozenset({"AppArmorProfile", "SELinuxContext", "RuntimeMaxUSec", "TasksMax", "LimitNPROC"})
"""Properties with which no command is made to wait: what they allow is meant for the command alone."""
BYTES = 4096
"""More than an answer has, and the events of a control group."""


class Gate:
    """The sockets by which a unit's command waits: `theirs` is the unit's end until `close_theirs`."""

    def __init__(self) -> None:
        self._ours, self.theirs = socket.socketpair()
        self._ours.setblocking(False)

    @property
    def is_closed(self) -> bool:
        """Whether nothing waits at it any more."""
        return self._ours.fileno() < 0

    def fileno(self) -> int:
        """Return khod's descriptor, which is ready when there is an answer."""
        return self._ours.fileno()

    def open(self) -> bool:
        """Let the command run; False where nobody waits any more."""
        with suppress(OSError):
            return self._ours.send(b"\n") == 1
        return False

    def read_answer(self) -> bytes | None:
        """Return the answer that has come, b"" where none will; None for none so far."""
        try:
            return self._ours.recv(BYTES)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    async def wait_ready(self) -> bool:
        """Wait until the shell waits; False where it has ended."""
        return bool(await asyncio.get_running_loop().sock_recv(self._ours, 1))

    def close_theirs(self) -> None:
        """Close the unit's end: the unit has its own by now."""
        self.theirs.close()

    def close(self) -> None:
        """Close both ends; a command that still waits is not run."""
        self.theirs.close()
        self._ours.close()


class WaitingUnit:
    """A unit whose command waits for `start`: see `khod.producers.commands.PreparedCommand` and `RunningCommand`.

    `unit` ends what does not end by itself.
    """

    def __init__(self, name: str, pid: int, gate: Gate, unit: RunningCommand) -> None:
        """Take up the unit `name` by its main process; OSError or ValueError if that is not there any more."""
        self._gate, self._unit = gate, unit
        self._answer: bytes | None = None
        self._is_empty = False
        group = Path(f"/proc/{pid}/cgroup").read_text()
        if units_in(group)[-1:] != [name]:
            raise ValueError(f"process {pid} is not of {name}")
        path = Path(CGROUPS) / group.partition("0::")[2].strip().lstrip("/") / "cgroup.events"
        with ExitStack() as stack:
            stack.callback(gate.close)
            self._events = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, self._events)
            self._epoll = stack.enter_context(select.epoll())
            self._epoll.register(gate, select.EPOLLIN)
            self._epoll.register(self._events, select.EPOLLPRI)
            self._stack = stack.pop_all()

    def start(self) -> RunningCommand | None:
        """Let the command run; None where nothing waits."""
        self._look()
        return self if not self._is_empty and self._gate.open() else None

    async def drop(self) -> None:
        """End it without having run the command."""
        if self._answer is None:
            self._answer = b""
            self._epoll.unregister(self._gate)
        self._gate.close()
        try:
            await self._wait_empty()
        finally:
            ending = asyncio.ensure_future(self.end())
            await settle_task(ending, CUT_SECONDS)

    async def wait_end(self) -> int | None:
        """Wait for the end of the command and of all it started; its exit code, None where its shell has not told."""
        await self._wait_until(lambda: self._answer is not None or self._is_empty)
        if not await self._wait_empty():
            await self._unit.wait_end()
        return _parse_code(self._answer or b"")

    async def end(self) -> list[str]:
        """Kill what is left of it, and say what does not die."""
        self._look()
        self._stack.close()
        return [] if self._is_empty else await self._unit.end()

    async def _wait_empty(self) -> bool:
        """Wait at most KILL_WAIT_SECONDS until nothing is left in the control group, which systemd kills."""
        with suppress(TimeoutError):
            async with asyncio.timeout(KILL_WAIT_SECONDS):
                await self._wait_until(lambda: self._is_empty)
        return self._is_empty

    async def _wait_until(self, condition: Callable[[], bool]) -> None:
        loop = asyncio.get_running_loop()
        self._look()
        while not condition():
            changed = asyncio.Event()
            loop.add_reader(self._epoll, changed.set)
            try:
                await changed.wait()
            finally:
                loop.remove_reader(self._epoll)
            self._look()

    def _look(self) -> None:
        """See what has come; to read it is also what ends its being ready."""
        try:
            self._is_empty = b"populated 0\n" in os.pread(self._events, BYTES, 0)
        except OSError:  # ENODEV: systemd has removed it
            self._is_empty = True
        if self._answer is None and (answer := self._gate.read_answer()) is not None:
            self._answer = answer
            self._epoll.unregister(self._gate)


def can_wait(command: Command) -> bool:
    """Whether a command may be made to wait."""
    return command.is_plain and not UNFIT & command.settings.keys()


def waiting_argv(command: Command) -> list[str]:
    """Return the words of the shell that runs a command when it is let."""
    return [SHELL, "-c", SCRIPT, GATEKEEPER, *command.argv]


def _parse_code(answer: bytes) -> int | None:
    """Return the exit code of an answer, -N where signal N killed the command; None if it is none."""
    try:
        code = int(answer)
    except ValueError:
        return None
    return KILLED - code if KILLED < code <= KILLED + signal.SIGRTMAX else code
