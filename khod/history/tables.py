# SPDX-License-Identifier: LGPL-2.1-or-later
"""The tables of the history database, and the steps that lead to them from each earlier version."""

import sqlite3

APPLICATION_ID = 0x6B686F64  # "khod", as file(1) and `PRAGMA application_id` show it

STEPS: tuple[tuple[str, ...], ...] = (
    (
        # `sequence` orders the attempts: the wall clock may have been wrong. AUTOINCREMENT never gives a number again.
        """CREATE TABLE attempts (
            sequence INTEGER PRIMARY KEY AUTOINCREMENT,
            run TEXT NOT NULL UNIQUE,
            outcome TEXT NOT NULL,
            ended_at REAL NOT NULL,
            last_boot_id TEXT NOT NULL,
            summary BLOB NOT NULL,
            document BLOB NOT NULL,
            digest BLOB NOT NULL)""",
        "CREATE INDEX attempts_by_last_boot ON attempts (last_boot_id)",
        # How often a run ended so, of all that were ever added: unlike a count of `attempts` it never falls.
        "CREATE TABLE outcomes (outcome TEXT PRIMARY KEY, count INTEGER NOT NULL)",
        # The attempts that say something of the images they led to. They outlive `attempts`: what bars an image does so
        # until it is acknowledged. `image` is khod.history.trial.trial_digest, `files` the digests of the single files.
        """CREATE TABLE trials (
            sequence INTEGER PRIMARY KEY AUTOINCREMENT,
            run TEXT NOT NULL UNIQUE,
            image TEXT NOT NULL,
            files TEXT NOT NULL,
            verified INTEGER NOT NULL,
            at REAL NOT NULL,
            reason TEXT NOT NULL,
            acknowledged_at REAL,
            acknowledged_by TEXT NOT NULL DEFAULT '')""",
        "CREATE INDEX trials_by_image ON trials (image)",
    ),
)
"""Step N leads from version N to version N + 1; a new version of the tables is one more step."""

VERSION = len(STEPS)


def migrate_tables(connection: sqlite3.Connection) -> None:
    """Bring a database of this or of an earlier version to VERSION, in one transaction; 0 is the empty database."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version >= VERSION:
        return
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        for step in STEPS[version:]:
            for statement in step:
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {VERSION}")
