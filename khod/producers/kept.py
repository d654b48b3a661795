# SPDX-License-Identifier: LGPL-2.1-or-later
"""A VM whose guest is kept, and which others start: khod-vm@NAME.service reads its file, and is the producer."""

import asyncio
import shlex
from dataclasses import field

from khod.dataclass import dataclass
from khod.producers.barrier import ParticipantVeto, ProducerCall, Verb
from khod.producers.children import Children
from khod.producers.commands import CommandRunner
from khod.producers.configured import Configured
from khod.systemd.dbus import systemd_bus
from khod.systemd.manager import ASK_SECONDS, Systemd


@dataclass(frozen=True)
class KeptVm(Configured):
    """Stands in for the producer of its name until that is registered, and vetoes: a handover would lose the guest."""

    socket: str = ""
    kind: str = "vm"
    runner: CommandRunner = field(default_factory=Children, compare=False, repr=False)

    @property
    def unit(self) -> str:
        """The unit that is to register."""
        return f"khod-vm@{self.name}.service"

    async def start_unit(self) -> None:
        """Have systemd start the unit, which may be up already, and do not wait for it.

        BusError or TimeoutError if systemd does not. In a shutdown it refuses: the unit is about to be stopped.
        """
        async with asyncio.timeout(ASK_SECONDS), systemd_bus() as bus:
            await Systemd(bus, self.unit).call_action("StartUnit", "ss", self.unit, "fail")

    async def _carry_out(self, telling: ProducerCall) -> None:
        if telling.verb in (Verb.prepare, Verb.freeze):
            raise ParticipantVeto(
                f"its guest is to be kept, and {self.unit} is not there: systemctl restart {shlex.quote(self.unit)}"
            )
