# SPDX-License-Identifier: LGPL-2.1-or-later
"""Producers that are commands: /etc/kho/producers.d/NAME.toml names one for each verb.

A command has PATH, KHO_NAME, KHO_VERB and KHO_RUN in its environment, and its output goes to khod's journal. Exit code
0 is a yes; any other is a veto, with the last line on standard error as the reason. At its end, and at its deadline,
everything it started is killed: a child left behind must not thaw later. A process that does not die sleeps in the
kernel: it is named, and no longer waited for. How commands are run: `khod.producers.commands`.
"""

import asyncio
import os
import signal
import time
from contextlib import ExitStack
from dataclasses import dataclass, field

from khod.concurrency.bounded import CUT_SECONDS, settle_task
from khod.producers.barrier import ParticipantVeto, ProducerCall, Verb
from khod.producers.children import Children
from khod.producers.commands import CANNOT_START, GATEKEEPER, Command, CommandRunner, PreparedCommand, RunningCommand
from khod.producers.configured import Configured, describe_error, one_line
from khod.producers.output import PASSED_ON, STDERR, STDOUT, Output
from khod.systemd.setting_values import Property

__all__ = ["PASSED_ON", "Hook"]

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

LAUNCHERS = ("env: ", f"{GATEKEEPER}: ")
"""How the message of a launcher begins that cannot execute the command."""
PREPARE_SHARE = 0.25
"""The part of what `prepare` has left of its time in which the command of `freeze` is prepared."""


@dataclass(frozen=True)
class Hook(Configured):
    """One hook file; a verb without a command is a yes. `settings` are properties of the units its commands run in."""

    commands: dict[str, list[str]] = field(default_factory=dict)
    settings: dict[str, Property] = field(default_factory=dict)
    runner: CommandRunner = field(default_factory=Children, compare=False, repr=False)
    kind: str = "hook"
    _prepared: "list[_Execution]" = field(default_factory=list, init=False, compare=False, repr=False)
    """What `freeze` runs, from prepare on: at most one."""

    @property
    def restores_state(self) -> bool:
        return "restore" in self.commands or "finish" in self.commands

    def unstartable_commands(self) -> list[str]:
        """Each command that is not there or is no program, in words."""
        return [
            f"{argv[0]} ({verb} of {self.name})" for verb, argv in self.commands.items() if not _is_startable(argv[0])
        ]

    async def _carry_out(self, telling: ProducerCall) -> None:
        """Run the verb's command; ParticipantVeto where it does not start or does not exit with 0."""
        began = time.monotonic()
        command = self._make_command(telling.verb, telling.run)
        execution = await self._take_prepared(command)
        if execution is None and command is not None:
            execution = await _Execution.start(self.runner, command)
        if execution is not None:
            await execution.finish(telling)
        if telling.verb is Verb.prepare and (later := self._make_command(Verb.freeze, telling.run)):
            seconds = (self.timeout - (time.monotonic() - began)) * PREPARE_SHARE
            if (prepared := await _Execution.prepare(self.runner, later, seconds)) is not None:
                self._prepared.append(prepared)

    def _make_command(self, verb: Verb, run: str) -> Command | None:
        """Return the command of a verb, None if there is none."""
        argv = self.commands.get(verb.value)
        if argv is None:
            return None
        environment = {"PATH": PATH, "KHO_NAME": self.name, "KHO_VERB": verb.value, "KHO_RUN": run}
        return Command(self.name, argv, environment, self.settings)

    async def _take_prepared(self, command: Command | None) -> "_Execution | None":
        """Start what was prepared, if it is this command; otherwise it is dropped."""
        while self._prepared:
            prepared = self._prepared.pop()
            if prepared.command == command and prepared.begin():
                return prepared
            await prepared.drop()
        return None


class _Execution:
    """A command with pipes for its outputs; asyncio's would hold the end back for as long as a child has them open."""

    def __init__(self, command: Command) -> None:
        self.command = command
        label = f"{command.name}: {command.environment['KHO_VERB']}"
        with ExitStack() as stack:
            self._outputs = [stack.enter_context(Output(outlet, label)) for outlet in (STDOUT, STDERR)]
            self._stack = stack.pop_all()
        self._prepared: PreparedCommand | None = None
        self._running: RunningCommand | None = None

    @classmethod
    async def start(cls, runner: CommandRunner, command: Command) -> "_Execution":
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
    async def prepare(cls, runner: CommandRunner, command: Command, seconds: float) -> "_Execution | None":
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

    async def finish(self, telling: ProducerCall) -> None:
        """Wait for the end of the command; ParticipantVeto if it is no yes. Cut short the command is killed."""
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
                ending = asyncio.ensure_future(_end_command(self._running, self.command, telling, undead))
                await settle_task(ending, CUT_SECONDS)
            _, reason = [one_line(output.read_rest()) for output in self._outputs]
        if code == 0:
            return
        if code in CANNOT_START and reason.startswith(LAUNCHERS):
            reason = f"{self.command.argv[0]} cannot be started: {reason.rpartition(': ')[2]}"
        raise ParticipantVeto("; ".join([reason or _describe_end(code), *undead]))

    @property
    def _writers(self) -> tuple[int, int]:
        out, errors = self._outputs
        return out.writer, errors.writer


def _is_startable(command: str) -> bool:
    """Whether a command is there, as env(1) looks for it.

    access(2) tells, and stat(2) is not asked: AppArmor grants it only with the right to read, which khod does not have
    wherever a command may lie.
    """
    places = [command] if "/" in command else [f"{directory}/{command}" for directory in PATH.split(":")]
    return any(os.access(place, os.X_OK) and not os.access(f"{place}/.", os.F_OK) for place in places)


async def _end_command(running: RunningCommand, command: Command, telling: ProducerCall, undead: list[str]) -> None:
    """End a command with all it started; add to `undead` what does not die, and say so."""
    undead += await running.end()
    if undead:
        telling.not_yet("; ".join(undead), None)
        told = f"{command.name} {telling.verb.value}"
        STDERR.queue_bytes("".join(f"{told}: {text}\n" for text in undead).encode())


def _describe_end(code: int | None) -> str:
    if code is None:
        return "its exit code is not known: something else took it"
    return f"exit code {code}" if code > 0 else f"killed by {_signal_name(-code)}"


def _signal_name(number: int) -> str:
    """Name a signal; real-time ones have none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
