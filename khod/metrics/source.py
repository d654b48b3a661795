# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where metrics come from: the status of now, and the history, which is not asked while producers are stopped."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from khod.deferred import defer_module
from khod.engine.history import STOPPED, HistoryService
from khod.errors import KhoError
from khod.model import Phase, Status

if TYPE_CHECKING:
    from khod.history.model import AttemptSummary, Standstill
    from khod.metrics import table
else:
    table = defer_module("khod.metrics.table")


class MetricSource:
    """Reads the facts of all metrics; of the history it keeps what it last said."""

    def __init__(self, status: Callable[[], Awaitable[Status]], history: HistoryService) -> None:
        self._status = status
        self._history = history
        self._counts: Mapping[Phase, int] = {}
        self._last: AttemptSummary | None = None
        self._standstills: Sequence[Standstill] = ()

    async def read(self) -> table.MetricFacts:
        """Return the facts of now; what the history does not say is what it said before."""
        status = await self._status()
        if status.phase not in STOPPED:
            counts, page = await asyncio.gather(self._history.counts(), self._history.page("", 1))
            self._counts = self._counts if counts is None else counts
            if page.attempts and page.attempts[0] != self._last:
                self._last = page.attempts[0]
                self._standstills = await self._read_standstills(self._last.run)
        return table.MetricFacts(status, self._counts, self._last, self._standstills)

    async def _read_standstills(self, run: str) -> Sequence[Standstill]:
        """Return how long the producers of a run were stopped; none where the attempt cannot be read."""
        with suppress(KhoError):
            return (await self._history.attempt(run)).timeline.standstills
        return ()
