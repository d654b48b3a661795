# SPDX-License-Identifier: LGPL-2.1-or-later
"""A producer that was told something, and whose file no longer exists."""

from khod.dataclass import dataclass
from khod.errors import ConfigError
from khod.producers.barrier import ParticipantVeto, ProducerCall
from khod.producers.configured import Configured


@dataclass(frozen=True)
class MissingProducer(Configured):
    """Takes the place of a producer that can no longer be reached, so that this is reported: it vetoes every verb.

    `had_to_restore` is from the record: its state counts as missing in the next kernel. `unreadable` is the reason why
    its file, or another one, could not be read.
    """

    had_to_restore: bool = False
    unreadable: ConfigError | None = None

    @property
    def restores_state(self) -> bool:
        return self.had_to_restore

    async def carry_out(self, telling: ProducerCall) -> None:
        if self.unreadable is not None:
            raise ParticipantVeto(
                f"it cannot be told to {telling.verb.value}: {self.unreadable.what} ({self.unreadable.where})"
            )
        raise ParticipantVeto(
            f"its file in /etc/kho/producers.d is gone or says nothing of it: it cannot be told to {telling.verb.value}"
        )
