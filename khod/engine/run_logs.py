# SPDX-License-Identifier: LGPL-2.1-or-later
"""The logs of runs: written in the thread of the record, read in the one for queries, and attempts made of them."""

from __future__ import annotations

import logging
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from khod.deferred import defer_module
from khod.errors import KhoError
from khod.kernel.thread import Workers

if TYPE_CHECKING:
    from khod.history import assemble, timeline
    from khod.history import log as history_log
    from khod.history import model as history
    from khod.history.log import Entry
    from khod.history.model import AttemptRecord
else:
    assemble = defer_module("khod.history.assemble")
    history_log = defer_module("khod.history.log")
    history = defer_module("khod.history.model")
    timeline = defer_module("khod.history.timeline")

LOG = logging.getLogger(__name__)
FILE_SECONDS = 60.0
"""Maximum seconds that anyone waits for a log, or for the next kernel's files."""


class RunLogs:
    """The logs below khod's state directory."""

    def __init__(self, state: Path, workers: Workers) -> None:
        self._state = state
        self._disk, self._queries = workers.disk, workers.queries
        """Used by the thread of the record only."""

    @cached_property
    def _writer(self) -> history_log.LogWriter:
        return history_log.LogWriter(self._state)

    def path(self, run: str) -> Path:
        """Return where the log of a run is, or would be."""
        return history_log.log_path(self._state, run)

    def append_later(self, run: str, entries: list[Entry]) -> None:
        """Queue entries to be appended; what a full disk does not take is kept for the next write."""
        self._disk.call_later(partial(self._writer.append, run, entries))

    async def list_runs(self) -> list[str]:
        """Return the runs that have a log, the oldest first. Raises Failed and OSError."""
        return await self._queries.call_within(
            partial(history_log.list_runs, self._state), "listing the logs", FILE_SECONDS
        )

    async def read(self, run: str) -> history.RunLog:
        """Return the log of a run. Raises Failed and OSError."""
        return await self._queries.call_within(
            partial(history_log.read_log, self.path(run)), "reading the log", FILE_SECONDS
        )

    async def read_timeline(self, run: str, unwritten: list[Entry]) -> history.Timeline:
        """Return the timeline of a run under way, of its log and of what is not written yet. Raises Failed."""

        def build() -> history.Timeline:
            return timeline.build_timeline(history_log.read_log_with(self.path(run), unwritten))

        return await self._queries.call_within(build, "reading the log", FILE_SECONDS)

    async def make_attempt(self, run: str, entries: list[Entry]) -> AttemptRecord:
        """Append the last entries of a run; return the attempt made of its log, or of them alone on a disk that hangs.

        Old logs are removed.
        """

        def read_attempt() -> AttemptRecord:
            history_log.drop_old_logs(self._state)
            return _assemble(history_log.read_log_with(self.path(run), unwritten))

        try:
            finish = partial(self._writer.finish, run, entries)
            unwritten = await self._disk.call_within(finish, "writing the log", FILE_SECONDS)
            return await self._queries.call_within(read_attempt, "reading the log", FILE_SECONDS)
        except KhoError as error:
            LOG.warning("The handover %s is remembered without its log: %s", run, error)
            return _assemble(history_log.add_entries(history.RunLog(run), entries))


def _assemble(log: history.RunLog) -> AttemptRecord:
    return assemble.assemble_attempt(log, timeline.build_timeline(log))
