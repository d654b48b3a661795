# SPDX-License-Identifier: LGPL-2.1-or-later
"""How the commands of producers are run: started, waited for, and ended with all they started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import TYPE_CHECKING, Protocol

from khod.dataclass import dataclass

if TYPE_CHECKING:
    from khod.systemd.setting_values import Property

LAUNCHER = "/usr/bin/env"
"""What is executed; it executes the command in turn, found by PATH, and says in the C locale why it cannot.

khod itself starts nothing else: a vfork(2) stops the whole of khod until the child has executed something, which takes
for ever where the command lies on a file system that does not answer. env(1) is in memory, and may wait.
"""
HOOK_UNIT_PREFIX = "kho-hook-"
TABLE = "service"
"""The table of a file of producers.d with the settings of the unit that its commands run in."""
GATEKEEPER = "kho-hook"
"""What a shell that executes a prepared command calls itself in its messages."""
CANNOT_START = (126, 127)
"""Exit codes of env(1), and of sh(1), where the command is there and cannot be executed, and where it is not there."""
KILL_WAIT_SECONDS = 1.0
"""How long the end of what was sent SIGKILL is waited for: it comes at once, or when the kernel lets go of it."""


@dataclass(frozen=True)
class Command:
    """What is run for the producer `name`. `settings` are those of its file for the unit it runs in.

    `unit_prefix` begins the name of that unit.
    """

    name: str
    argv: Sequence[str]
    environment: Mapping[str, str]
    settings: Mapping[str, Property] = field(default_factory=dict)
    unit_prefix: str = HOOK_UNIT_PREFIX

    @property
    def verb(self) -> str:
        """What it is run for: the verb of a hook, or verify."""
        return self.environment["KHO_VERB"]

    @property
    def launch_argv(self) -> list[str]:
        """The words to execute, the launcher first where it does not take the command for something else."""
        return [LAUNCHER, *self.argv] if self.is_plain else [*self.argv]

    @property
    def is_plain(self) -> bool:
        """Whether no launcher takes its first word for something else than a command."""
        return "=" not in self.argv[0] and not self.argv[0].startswith("-")


class RunningCommand(Protocol):
    """A command that was started."""

    async def wait_end(self) -> int | None:
        """Wait for its end: its exit code, -N where signal N killed it, None where that is not known."""

    async def end(self) -> list[str]:
        """Kill it with all it started; say what does not die within KILL_WAIT_SECONDS."""


class PreparedCommand(Protocol):
    """A command that is to run later, and then at once."""

    def start(self) -> RunningCommand | None:
        """Run it; None where it has ended, without having run, and must be started as any other."""

    async def drop(self) -> None:
        """Call it off: it does not run, and nothing of it is left."""


class CommandRunner(Protocol):
    """Starts commands: as children of khod, or as units of systemd, which may have settings (`has_units`)."""

    has_units: bool

    async def start_command(self, command: Command, stdout: int, stderr: int) -> RunningCommand:
        """Start a command without standard input, its output to these descriptors; OSError or ValueError.

        Where it cannot be executed, that is its end, with one of CANNOT_START.
        """

    async def prepare_command(self, command: Command, stdout: int, stderr: int) -> PreparedCommand | None:
        """Prepare a command, so that it starts at once when it is told; None where there is nothing to prepare.

        What goes wrong is no error: the command is then started as any other.
        """
