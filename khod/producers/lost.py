"""A producer that was told something, and whose file is gone since."""

from dataclasses import dataclass

from khod.producers.barrier import Telling, Veto
from khod.producers.configured import Configured


@dataclass(frozen=True)
class Lost(Configured):
    """Stands in the place of a producer that nobody can reach any more, so that this is said."""

    async def tell(self, telling: Telling) -> None:
        raise Veto(f"its file in /etc/kho/producers.d is gone, it cannot be told to {telling.verb.value}")
