# SPDX-License-Identifier: LGPL-2.1-or-later
"""One run of a command: its outputs go to khod's journal, and at its end everything it started is killed.

Exit code 0 is a yes; any other is a veto, with the last line on standard error as the reason.
"""

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import ExitStack

from khod.concurrency.bounded import CUT_SECONDS, settle_task
from khod.producers.barrier import ParticipantVeto
from khod.producers.commands import CANNOT_START, GATEKEEPER, Command, CommandRunner, PreparedCommand, RunningCommand
from khod.producers.configured import describe_error, one_line
from khod.producers.output import STDERR, STDOUT, Output

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
LAUNCHERS = ("env: ", f"{GATEKEEPER}: ")
"""How the message of a launcher begins that cannot execute the command."""


class Execution:
    """A command with pipes for its outputs; asyncio's would hold the end back for as long as a child has them open."""

    def __init__(self, command: Command) -> None:
        self.command = command
        label = f"{command.name}: {command.verb}"
        with ExitStack() as stack:
            self._outputs = [stack.enter_context(Output(outlet, label)) for outlet in (STDOUT, STDERR)]
            self._stack = stack.pop_all()
        self._prepared: PreparedCommand | None = None
        self._running: RunningCommand | None = None

    @classmethod
    async def start(cls, runner: CommandRunner, command: Command) -> "Execution":
        """Start a command; ParticipantVeto if that fails."""
        made = cls(command)
        try:
            made._running = await runner.start_command(command, *made._writers)
        except (OSError, ValueError) as error:  # ValueError: a NUL in an argument
            raise ParticipantVeto(f"{one_line(command.argv[0])} cannot be started: {describe_error(error)}") from None
        finally:
            if made._running is None:
                made._stack.close()
        return made

    @classmethod
    async def prepare(cls, runner: CommandRunner, command: Command, seconds: float) -> "Execution | None":
        """Prepare a command within `seconds`; None where it will be started as any other."""
        try:
            made = cls(command)
        except OSError:
            return None
        try:
            async with asyncio.timeout(seconds):
                made._prepared = await runner.prepare_command(command, *made._writers)
        except TimeoutError:
            return None
        finally:
            if made._prepared is None:
                made._stack.close()
        if made._prepared is None:
            return None
        for output in made._outputs:
            output.close_writer()
        return made

    def begin(self) -> bool:
        """Start what was prepared; False where it must be started as any other."""
        assert self._prepared is not None, "as prepare() has left it"
        self._running = self._prepared.start()
        return self._running is not None

    async def drop(self) -> None:
        """Drop what was prepared."""
        assert self._prepared is not None, "as above"
        with self._stack:
            await self._prepared.drop()

    async def finish(self, report: Callable[[str], None]) -> None:
        """Wait for the end of the command; ParticipantVeto if it is no yes. Cut short the command is killed.

        What does not die is reported before the wait for it begins.
        """
        assert self._running is not None, "it was started"
        undead: list[str] = []
        with self._stack:
            try:
                for output in self._outputs:
                    output.close_writer()
                    output.start_reading()
                code = await self._running.wait_end()
            finally:
                # In a task of its own: the deadline may pass in the middle, and must not leave half of them alive.
                ending = asyncio.ensure_future(_end_command(self._running, self.command, report, undead))
                await settle_task(ending, CUT_SECONDS)
            _, reason = [one_line(output.read_rest()) for output in self._outputs]
        if code == 0:
            return
        if code in CANNOT_START and reason.startswith(LAUNCHERS):
            reason = f"{self.command.argv[0]} cannot be started: {reason.rpartition(': ')[2]}"
        raise ParticipantVeto("; ".join([reason or describe_end(code), *undead]))

    @property
    def _writers(self) -> tuple[int, int]:
        out, errors = self._outputs
        return out.writer, errors.writer


def is_startable(command: str) -> bool:
    """Whether a command is there, as env(1) looks for it.

    access(2) tells, and stat(2) is not asked: AppArmor grants it only with the right to read, which khod does not have
    wherever a command may lie.
    """
    places = [command] if "/" in command else [f"{directory}/{command}" for directory in PATH.split(":")]
    return any(os.access(place, os.X_OK) and not os.access(f"{place}/.", os.F_OK) for place in places)


async def _end_command(
    running: RunningCommand, command: Command, report: Callable[[str], None], undead: list[str]
) -> None:
    """End a command with all it started; add to `undead` what does not die, and say so."""
    undead += await running.end()
    if undead:
        report("; ".join(undead))
        told = f"{command.name} {command.verb}"
        STDERR.queue_bytes("".join(f"{told}: {text}\n" for text in undead).encode())


def describe_end(code: int | None) -> str:
    """Describe the exit code of a command, as `RunningCommand.wait_end` returns it."""
    if code is None:
        return "its exit code is not known: something else took it"
    return f"exit code {code}" if code > 0 else f"killed by {_signal_name(-code)}"


def _signal_name(number: int) -> str:
    """Name a signal; real-time ones have none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
