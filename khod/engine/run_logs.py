# SPDX-License-Identifier: LGPL-2.1-or-later
"""The logs of runs: written in the thread of the record, read in the one for queries, and attempts made of them."""

import logging
from functools import partial
from pathlib import Path

from khod.errors import KhoError
from khod.history.assemble import assemble_attempt
from khod.history.log import Entry, LogWriter, add_entries, drop_old_logs, list_runs, log_path, read_log, read_log_with
from khod.history.model import AttemptRecord, RunLog
from khod.history.timeline import build_timeline
from khod.kernel.thread import Workers

LOG = logging.getLogger(__name__)
FILE_SECONDS = 60.0
"""Maximum seconds that anyone waits for a log, or for the next kernel's files."""


class RunLogs:
    """The logs below khod's state directory."""

    def __init__(self, state: Path, workers: Workers) -> None:
        self._state = state
        self._disk, self._queries = workers.disk, workers.queries
        self._writer = LogWriter(state)
        """Used by the thread of the record only."""

    def path(self, run: str) -> Path:
        """Return where the log of a run is, or would be."""
        return log_path(self._state, run)

    def append_later(self, run: str, entries: list[Entry]) -> None:
        """Queue entries to be appended; what a full disk does not take is kept for the next write."""
        self._disk.call_later(partial(self._writer.append, run, entries))

    async def list_runs(self) -> list[str]:
        """Return the runs that have a log, the oldest first. Raises Failed and OSError."""
        return await self._queries.call_within(partial(list_runs, self._state), "listing the logs", FILE_SECONDS)

    async def read(self, run: str) -> RunLog:
        """Return the log of a run. Raises Failed and OSError."""
        return await self._queries.call_within(partial(read_log, self.path(run)), "reading the log", FILE_SECONDS)

    async def make_attempt(self, run: str, entries: list[Entry]) -> AttemptRecord:
        """Append the last entries of a run; return the attempt made of its log, or of them alone on a disk that hangs.

        Old logs are removed.
        """

        def read_attempt() -> AttemptRecord:
            drop_old_logs(self._state)
            return _assemble(read_log_with(self.path(run), unwritten))

        try:
            finish = partial(self._writer.finish, run, entries)
            unwritten = await self._disk.call_within(finish, "writing the log", FILE_SECONDS)
            return await self._queries.call_within(read_attempt, "reading the log", FILE_SECONDS)
        except KhoError as error:
            LOG.warning("The handover %s is remembered without its log: %s", run, error)
            return _assemble(add_entries(RunLog(run), entries))


def _assemble(log: RunLog) -> AttemptRecord:
    return assemble_attempt(log, build_timeline(log))
