# SPDX-License-Identifier: LGPL-2.1-or-later
"""Producers that are commands: /etc/kho/producers.d/NAME.toml names one for each verb.

A command has PATH, KHO_NAME, KHO_VERB and KHO_RUN in its environment, and its output goes to khod's journal. Exit code
0 is a yes; any other is a veto, with the last line on standard error as the reason. At its end, and at its deadline,
everything it started is killed: a child left behind must not thaw later. A process that does not die sleeps in the
kernel: it is named, and no longer waited for. How commands are run: `khod.producers.commands`.
"""

import time
from dataclasses import field

from khod.dataclass import dataclass
from khod.producers.barrier import ProducerCall, Verb
from khod.producers.children import Children
from khod.producers.commands import Command, CommandRunner
from khod.producers.configured import Configured
from khod.producers.execution import PATH, Execution, is_startable
from khod.systemd.setting_values import Property

PREPARE_SHARE = 0.25
"""The part of what `prepare` has left of its time in which the command of `freeze` is prepared."""


@dataclass(frozen=True)
class Hook(Configured):
    """One hook file; a verb without a command is a yes. `settings` are properties of the units its commands run in."""

    commands: dict[str, list[str]] = field(default_factory=dict)
    settings: dict[str, Property] = field(default_factory=dict)
    runner: CommandRunner = field(default_factory=Children, compare=False, repr=False)
    kind: str = "hook"
    _prepared: "list[Execution]" = field(default_factory=list, init=False, compare=False, repr=False)
    """What `freeze` runs, from prepare on: at most one."""

    @property
    def restores_state(self) -> bool:
        return "restore" in self.commands or "finish" in self.commands

    def unstartable_commands(self) -> list[str]:
        """Each command that is not there or is no program, in words."""
        return [
            f"{argv[0]} ({verb} of {self.name})" for verb, argv in self.commands.items() if not is_startable(argv[0])
        ]

    async def _carry_out(self, telling: ProducerCall) -> None:
        """Run the verb's command; ParticipantVeto where it does not start or does not exit with 0."""
        began = time.monotonic()
        command = self._make_command(telling.verb, telling.run)
        execution = await self._take_prepared(command)
        if execution is None and command is not None:
            execution = await Execution.start(self.runner, command)
        if execution is not None:
            await execution.finish(lambda reason: telling.not_yet(reason, None))
        if telling.verb is Verb.prepare and (later := self._make_command(Verb.freeze, telling.run)):
            seconds = (self.timeout - (time.monotonic() - began)) * PREPARE_SHARE
            if (prepared := await Execution.prepare(self.runner, later, seconds)) is not None:
                self._prepared.append(prepared)

    def _make_command(self, verb: Verb, run: str) -> Command | None:
        """Return the command of a verb, None if there is none."""
        argv = self.commands.get(verb.value)
        if argv is None:
            return None
        environment = {"PATH": PATH, "KHO_NAME": self.name, "KHO_VERB": verb.value, "KHO_RUN": run}
        return Command(self.name, argv, environment, self.settings)

    async def _take_prepared(self, command: Command | None) -> "Execution | None":
        """Start what was prepared, if it is this command; otherwise it is dropped."""
        while self._prepared:
            prepared = self._prepared.pop()
            if prepared.command == command and prepared.begin():
                return prepared
            await prepared.drop()
        return None
