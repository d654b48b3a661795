# SPDX-License-Identifier: LGPL-2.1-or-later
"""Attempts at a handover, from khod or from a history database."""

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from khoctl.candidates import complete_runs
from khoctl.layout import show_page
from khoctl.session import call_timeout, say_slow, socket_path
from khod.client.history import HistoryClient
from khod.errors import Unreachable
from khod.history.model import AttemptRecord

if TYPE_CHECKING:
    from khod.history.database import Database

Run = Annotated[
    str | None,
    typer.Argument(
        metavar="[RUN]",
        show_default=False,
        help="The attempt, or the beginning of its name; the last one.",
        autocompletion=complete_runs,
    ),
]
DatabaseFile = Annotated[
    Path | None,
    typer.Option("--db", metavar="FILE", help="Read this history database instead of asking khod."),
]


WITHOUT_KHOD = "To read past attempts without khod: --db /var/lib/khod/history.db"


def load_attempt(run: str | None = None, db: Path | None = None) -> AttemptRecord:
    """Return an attempt by its run or the beginning of it; the last one without a run.

    Asks khod, or reads the database `db`, which needs no khod. Raises UsageError if there is no such attempt, or if
    there are several, which the error names.
    """
    if db is None:
        with connect_history() as khod:
            return khod.attempt(run or "")
    with closing(open_database(db)) as database:
        return database.read_attempt(database.resolve_run(run or ""))


def connect_history() -> HistoryClient:
    """Connect to khod, to ask about past attempts; raise Unreachable if it does not answer."""
    try:
        return HistoryClient(socket_path(), patience=call_timeout(), on_slow=say_slow)
    except Unreachable as error:
        error.remedy = f"{error.remedy}. {WITHOUT_KHOD}"
        raise


def open_database(path: Path) -> "Database":
    """Open a history database for reading; print what is wrong with it on standard error."""
    from khod.history.opening import open_for_reading  # noqa: PLC0415 - SQLite is needed only for a file

    database, damage = open_for_reading(path)
    if damage:
        show_page(f"khoctl: {damage}", err=True)
    return database
