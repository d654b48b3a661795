# SPDX-License-Identifier: LGPL-2.1-or-later
"""A VM whose guest is kept, and which others start: khod-vm@NAME.service reads its file, and is the producer."""

from dataclasses import dataclass

from khod.producers.barrier import ParticipantVeto, ProducerCall, Verb
from khod.producers.configured import Configured


@dataclass(frozen=True)
class KeptVm(Configured):
    """Stands in for the producer of its name until that is registered, and vetoes: a handover would lose the guest."""

    socket: str = ""
    kind: str = "vm"

    @property
    def unit(self) -> str:
        """The unit that is to register."""
        return f"khod-vm@{self.name}.service"

    async def _carry_out(self, telling: ProducerCall) -> None:
        if telling.verb in (Verb.prepare, Verb.freeze):
            remedy = f"systemctl enable {self.unit} && systemctl start {self.unit}"
            raise ParticipantVeto(f"its guest is to be kept, and {self.unit} is not there: {remedy}")
