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
from dataclasses import dataclass, field

from khod.concurrency.bounded import CUT_SECONDS, settle_task
from khod.producers.barrier import ParticipantVeto, ProducerCall
from khod.producers.children import Children
from khod.producers.commands import CANNOT_START, Command, CommandRunner, RunningCommand
from khod.producers.configured import Configured, describe_error, one_line
from khod.producers.output import PASSED_ON, STDERR, STDOUT, Output
from khod.systemd.setting_values import Property

__all__ = ["PASSED_ON", "Hook"]

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Hook(Configured):
    """One hook file; a verb without a command is a yes. `settings` are properties of the units its commands run in."""

    commands: dict[str, list[str]] = field(default_factory=dict)
    settings: dict[str, Property] = field(default_factory=dict)
    runner: CommandRunner = field(default_factory=Children, compare=False, repr=False)
    kind: str = "hook"

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
        argv = self.commands.get(telling.verb.value)
        if argv is None:
            return
        environment = {
            "PATH": PATH,
            "KHO_NAME": self.name,
            "KHO_VERB": telling.verb.value,
            "KHO_RUN": telling.run,
        }
        # Pipes of our own: asyncio's would hold the end back for as long as a child of the hook has them open.
        label = f"{self.name}: {telling.verb.value}"
        with Output(STDOUT, label) as out, Output(STDERR, label) as errors:
            command = Command(self.name, argv, environment, self.settings)
            code, undead = await _run_command(self.runner, command, telling, out, errors)
            out.read_rest()
            reason = one_line(errors.read_rest())
        if code == 0:
            return
        if code in CANNOT_START and reason.startswith("env: "):
            reason = f"{argv[0]} cannot be started: {reason.rpartition(': ')[2]}"
        raise ParticipantVeto("; ".join([reason or _describe_end(code), *undead]))


def _is_startable(command: str) -> bool:
    """Whether a command is there, as env(1) looks for it.

    access(2) tells, and stat(2) is not asked: AppArmor grants it only with the right to read, which khod does not have
    wherever a command may lie.
    """
    places = [command] if "/" in command else [f"{directory}/{command}" for directory in PATH.split(":")]
    return any(os.access(place, os.X_OK) and not os.access(f"{place}/.", os.F_OK) for place in places)


async def _run_command(
    runner: CommandRunner, command: Command, telling: ProducerCall, out: Output, errors: Output
) -> tuple[int | None, list[str]]:
    """Run a command to its end: its exit code, and what of it does not die. Cut short it is killed."""
    try:
        running = await runner.start_command(command, out.writer, errors.writer)
    except (OSError, ValueError) as error:  # ValueError: a NUL in an argument
        raise ParticipantVeto(f"{one_line(command.argv[0])} cannot be started: {describe_error(error)}") from None
    undead: list[str] = []
    try:
        for one in (out, errors):
            one.close_writer()
            one.start_reading()
        code = await running.wait_end()
    finally:
        # In a task of its own: the deadline may pass in the middle of it, and must not leave half of them alive.
        ending = asyncio.ensure_future(_end_command(running, command, telling, undead))
        await settle_task(ending, CUT_SECONDS)
    return code, undead


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
