# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl history over many attempts, beside khoctl status of the same khod."""

import sqlite3
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from khod.history.database import Database
from khod.history.opening import open_database
from tests.bench.figure import Figure
from tests.bench.processes import command_seconds, khod
from tests.unit.histories import attempt

ROUNDS = 21
ATTEMPTS = 10_000
EVENTS = 30  # of a handover with three producers
MOST = 1.5


def run() -> Iterator[Figure]:
    """Measure one khod with ATTEMPTS attempts in its database."""
    with tempfile.TemporaryDirectory() as name:
        fill_database(Path(name) / "history.db")
        with khod(Path(name)) as (_pid, socket):
            words = [sys.executable, "-m", "khoctl", "--socket", socket]
            command_seconds([*words, "history"])  # khod opens the database, once
            pairs = [(command_seconds([*words, "history"]), command_seconds([*words, "status"])) for _ in range(ROUNDS)]
    history, status = (statistics.median(column) for column in zip(*pairs, strict=True))
    yield Figure(
        f"khoctl history over {ATTEMPTS} attempts / khoctl status",
        history / status,
        MOST,
        "",
        f"{history * 1e3:.0f} ms and {status * 1e3:.0f} ms, medians of {ROUNDS} taken in turn",
    )


def fill_database(path: Path) -> None:
    """Make a database with ATTEMPTS attempts, without a sync for each."""
    made, _ = open_database(path)
    made.close()
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA synchronous = OFF")
    connection.execute("PRAGMA journal_mode = MEMORY")
    database = Database(connection)
    for number in range(ATTEMPTS):
        database.add_attempt(attempt(number, events=EVENTS))
    database.close()
