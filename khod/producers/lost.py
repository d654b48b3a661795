"""A producer that was told something, and whose file is gone since."""

from dataclasses import dataclass

from khod.errors import ConfigError
from khod.producers.barrier import Telling, Veto
from khod.producers.configured import Configured


@dataclass(frozen=True)
class Lost(Configured):
    """Stands in the place of a producer that nobody can reach any more, so that this is said.

    `had_to_restore` is what the record says of it: its state counts as missing in the next kernel. `unreadable` is
    why its file, or another one, could not be read.
    """

    had_to_restore: bool = False
    unreadable: ConfigError | None = None

    @property
    def restores(self) -> bool:
        return self.had_to_restore

    async def tell(self, telling: Telling) -> None:
        if self.unreadable is not None:
            raise Veto(f"it cannot be told to {telling.verb.value}: {self.unreadable.what} ({self.unreadable.where})")
        raise Veto(
            f"its file in /etc/kho/producers.d is gone or says nothing of it: it cannot be told to {telling.verb.value}"
        )
