# SPDX-License-Identifier: LGPL-2.1-or-later
"""The history of this host: attempts are remembered and read in a thread of its own, each call with a deadline.

The history is about the handover, and never decides how it goes: a database that cannot be used costs a line in the
journal and a note for whoever asks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from khod.concurrency.worker import Worker
from khod.config import Settings
from khod.dataclass import dataclass
from khod.deferred import defer_module
from khod.errors import Failed, KhoError, errno_text
from khod.model import Phase

if TYPE_CHECKING:
    import sqlite3

    from khod.engine import announcements
    from khod.history import database as history_database
    from khod.history import opening, set_aside
    from khod.history import trial as history_trial
    from khod.history.model import AttemptRecord, AttemptSummary
    from khod.history.trial import ImageTrial
else:
    announcements = defer_module("khod.engine.announcements")
    history_database = defer_module("khod.history.database")
    opening = defer_module("khod.history.opening")
    set_aside = defer_module("khod.history.set_aside")
    history_trial = defer_module("khod.history.trial")
    sqlite3 = defer_module("sqlite3")

T = TypeVar("T")
LOG = logging.getLogger(__name__)
HISTORY_FILE = "history.db"
DEADLINE_SECONDS = 10.0
"""How long a caller waits for the database."""
STOPPED = frozenset(
    {
        Phase.freezing,
        Phase.frozen,
        Phase.activating,
        Phase.active,
        Phase.loading,
        Phase.loaded,
        Phase.executing,
        Phase.verifying,
        Phase.rolling_back,
    }
)
"""The phases in which producers are stopped, or may be."""


@dataclass(frozen=True)
class HistoryPage:
    """Attempts, newest first, whether there are older ones, and what is wrong with the history ("" for nothing)."""

    attempts: list[AttemptSummary] = field(default_factory=list)
    more: bool = False
    note: str = ""


class HistoryService:
    """The history in the database `path`, which is opened, and made if need be, by the first call.

    All of it is done in `worker`, one call at a time. `is_stopped` tells whether producers are stopped now: then the
    database is not opened, because that may take long.
    """

    def __init__(
        self,
        path: Path,
        settings: Settings,
        worker: Worker,
        *,
        is_stopped: Callable[[], bool] = lambda: False,
        deadline: float = DEADLINE_SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._settings = settings
        self._is_stopped = is_stopped
        self._deadline = deadline
        self._clock = clock
        self._worker = worker
        self._database: history_database.Database | None = None
        """Used by the worker's thread only."""
        self._problem = ""
        """Why the last attempt was not remembered, "" if it was."""

    def close(self) -> None:
        """Close the database after the last call."""
        self._worker.call_later(self._close_database)

    async def remember(self, attempt: AttemptRecord) -> None:
        """Add an attempt, or replace the one of the same run. Never raises: the note says what failed."""
        kept = self._settings.current.history
        bounds = history_database.Bounds(kept.keep, kept.days, kept.max_bytes)
        try:
            await self._ask(lambda database: database.add_attempt(attempt, bounds), "adding an attempt")
        except Exception as error:
            if not isinstance(error, KhoError):
                LOG.exception("The history could not be written")
            self._problem = f"The attempt {attempt.summary.run} may be missing in the history: {error}"
            LOG.warning("%s", self._problem)
        else:
            self._problem = ""

    async def page(self, before: str, limit: int) -> HistoryPage:
        """Return attempts older than the run `before` ("" for the newest). What fails stands in the note."""
        try:
            found, aside = await self._ask(partial(self._read_page, before=before, limit=limit), "reading the history")
        except KhoError as error:
            return HistoryPage(note=self._problem or str(error))
        return HistoryPage(found[:limit], len(found) > limit, " ".join(filter(None, (self._problem, *aside))))

    def _read_page(
        self, database: history_database.Database, *, before: str, limit: int
    ) -> tuple[list[AttemptSummary], list[str]]:
        asides = [f"{found.describe()}." for found in set_aside.list_set_aside(self._path)]
        return database.list_attempts(before, limit + 1), asides

    async def attempt(self, name: str = "") -> AttemptRecord:
        """Return the attempt whose run begins with `name`, or the last one.

        Raises UsageError if there is none or several, Failed if it cannot be read.
        """
        return await self._ask(lambda database: database.read_attempt(database.resolve_run(name)), "reading an attempt")

    async def knows(self, run: str) -> bool:
        """Whether an attempt of this run is remembered. Raises Failed."""
        return await self._ask(lambda database: run in database.find_runs(run), "reading the history")

    async def chain(self, boot_id: str) -> list[AttemptSummary]:
        """Return the handovers since the last cold boot that led to this boot, newest first. Raises Failed."""
        return await self._ask(lambda database: database.read_chain(boot_id), "reading the history")

    async def trial(self, digest: str) -> ImageTrial:
        """Return what the handovers into an image came to; Failed, with the reason, if that cannot be found out."""
        return await self._ask(lambda database: database.read_trial(digest), "reading the history")

    async def past(self, digest: str) -> history_trial.Past:
        """Return what the checks of an image are told of the past; Failed, with the reason, if that cannot be read."""
        return await self._ask(partial(self._read_past, digest=digest), "reading the history")

    def _read_past(self, database: history_database.Database, *, digest: str) -> history_trial.Past:
        trial = database.read_trial(digest)
        try:
            last = database.read_last_arrival()
        except Failed:  # a damaged attempt, whose times are not worth an image's trial
            last = None
        return history_trial.Past(trial, last.timeline) if last else history_trial.Past(trial)

    async def acknowledge(self, image: str, by: str) -> list[str]:
        """Let an image be tried again; return the runs that no longer count. Raises UsageError or Failed."""
        return await self._ask(lambda database: database.acknowledge(image, self._clock(), by), "an acknowledgement")

    async def counts(self) -> dict[Phase, int] | None:
        """Return how often each outcome was remembered, or None if that cannot be read."""
        try:
            return await self._ask(history_database.Database.count_outcomes, "counting the outcomes")
        except KhoError:
            return None

    async def _ask(self, function: Callable[[history_database.Database], T], what: str) -> T:
        return await self._worker.call_within(lambda: self._use_database(function), what, self._deadline)

    # In the worker's thread

    def _use_database(self, function: Callable[[history_database.Database], T]) -> T:
        """Return what `function` does; with a database that turns out to be damaged, do it again with a new one."""
        try:
            try:
                return function(self._open_database())
            except sqlite3.Error as error:
                if not opening.is_damage(error) and not opening.was_moved(error):
                    raise
                self._close_database()
                return function(self._open_database())
        except sqlite3.Error as error:
            raise Failed(f"The history database cannot be used: {error}", where=str(self._path)) from error
        except OSError as error:
            raise Failed(
                f"The history database cannot be used: {errno_text(error)}", where=error.filename or str(self._path)
            ) from error

    def _open_database(self) -> history_database.Database:
        if self._database is None:
            if self._is_stopped():
                raise Failed("The history database is not opened while producers are stopped", where=str(self._path))
            self._database, aside = opening.open_database(self._path, self._clock)
            if aside is not None:
                announcements.announce_set_aside(aside)
        return self._database

    def _close_database(self) -> None:
        database, self._database = self._database, None
        if database is not None:
            database.close()
