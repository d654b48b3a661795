# SPDX-License-Identifier: LGPL-2.1-or-later
"""A producer within khod's process that does what a test says: raises anything, hangs, or ignores being cancelled."""

import asyncio
from collections.abc import Awaitable, Callable

from khod.handover.record import ProducerRecord
from khod.producers.barrier import ProducerCall
from tests.unit.harness import Host

Does = Callable[[], Awaitable[None]]


class Scripted:
    """It notes each verb it is told, as the harness's hooks do, and then does what `does` has for that verb."""

    kind = "scripted"
    before: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    units: tuple[str, ...] = ()
    is_reachable = True

    def __init__(
        self,
        host: Host,
        name: str,
        *,
        after: tuple[str, ...] = (),
        timeout: float = 10.0,
        restores: bool = False,
        **does: Does,
    ) -> None:
        self.name = name
        self.after = after
        self.timeout = timeout
        self.restores_state = restores
        self.does = does
        self._told = host.told
        host.hooks.append(self)

    def to_record(self) -> ProducerRecord:
        return ProducerRecord(self.name, self.kind)

    async def make_way(self, note: str) -> None:
        """Nothing stands in the way."""

    async def wait_returned(self) -> None:
        """It was never gone."""

    async def carry_out(self, telling: ProducerCall) -> None:
        with self._told.open("a") as told:
            told.write(f"{self.name} {telling.verb.value}\n")
        if (does := self.does.get(telling.verb.value)) is not None:
            await does()


def raises(error: BaseException) -> Does:
    """Raise it."""

    async def tell() -> None:
        raise error

    return tell


async def hangs() -> None:
    """Never come to an end; a deadline ends it."""
    await asyncio.get_running_loop().create_future()


def deaf() -> Does:
    """Never come to an end, whatever deadline passes: as a process does that sleeps in the kernel."""
    test = asyncio.current_task()
    assert test is not None

    async def tell() -> None:
        while not test.done():
            try:
                await hangs()
            except asyncio.CancelledError:
                continue

    return tell
