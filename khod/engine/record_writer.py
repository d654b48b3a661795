# SPDX-License-Identifier: LGPL-2.1-or-later
"""How the record of the handover comes to the disk, and what happens where it cannot be written."""

import asyncio
from collections.abc import Callable
from itertools import chain, repeat

from khod.concurrency.worker import Worker
from khod.handover.machine import RESTING
from khod.handover.record import Record, Store
from khod.model import Phase

RECORD_SECONDS = 60.0
"""Maximum seconds for one write of the record on the way forward: a step that is not recorded is not taken."""
RECORD_UNDO_SECONDS = 2.0
"""Maximum seconds for a write at the begin and at the end of a rollback: a file system that hangs must not delay a
thaw."""
CATCH_UP_SECONDS = (2.0, 5.0, 15.0, 60.0, 300.0)
"""Seconds before each new try to write a record that could not be written."""


class RecordWriter:
    """Writes the record in the disk's thread. `read` returns it as it is now, `tell` emits what went wrong."""

    def __init__(self, store: Store, disk: Worker, read: Callable[[], Record], tell: Callable[[str], None]) -> None:
        self._store = store
        self._disk = disk
        self._read = read
        self._tell = tell
        self._is_behind = False
        """Whether the record on the disk is an older one, because this one could not be written."""
        self._catching_up: asyncio.Task[None] | None = None

    async def write(self, record: Record, *, departs: bool) -> None:
        """Write a record durably; RecordError, or Failed, if that fails.

        With `departs` a copy is left beside it: after the jump it replaces a record that cannot be read.
        """

        def write() -> None:
            self._store.write(record)
            if departs:
                self._store.write_departure(record)

        await self._disk.call_within(write, "writing the record", RECORD_SECONDS)
        self._is_behind = False

    async def try_write(self, seconds: float, *, departure_served: bool = False) -> None:
        """Write the record if possible; a failure stops nothing, because a full disk must keep no producer frozen.

        With `departure_served` the copy for the jump is removed: the jump did not come, or the copy is not about this
        boot.
        """

        def write() -> None:
            self._store.write(record)
            if departure_served:
                self._store.remove_departure()

        record = self._read()
        try:
            await self._disk.call_within(write, "writing the record", seconds)
            self._is_behind = False
        except Exception as error:  # noqa: BLE001 - after any error, the rollback continues
            self._tell(str(error))
            self._is_behind = True
            if self._catching_up is None or self._catching_up.done():
                self._catching_up = asyncio.ensure_future(self._catch_up())

    async def settle(self) -> None:
        """Write the record a last time if the one on the disk is outdated: khod ends."""
        if self._is_behind:
            await self.try_write(RECORD_UNDO_SECONDS)

    async def _catch_up(self) -> None:
        """Write the record once that is possible again: an outdated one would mislead the next khod."""
        for pause in chain(CATCH_UP_SECONDS, repeat(CATCH_UP_SECONDS[-1])):
            await asyncio.sleep(pause)
            if not self._is_behind:
                return
            if self._read().phase in RESTING | {Phase.failed}:
                await self.try_write(RECORD_UNDO_SECONDS)
