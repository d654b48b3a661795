# SPDX-License-Identifier: LGPL-2.1-or-later
"""Open the history database; one that cannot be used is set aside, and a new one made."""

import os
import shutil
import sqlite3
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from khod.errors import Failed, UsageError, errno_text
from khod.history.database import Database
from khod.history.set_aside import REASONS, Fault, SetAside, set_aside
from khod.history.tables import APPLICATION_ID, VERSION, migrate_tables

MAGIC = b"SQLite format 3\0"
HEADER_BYTES = 100
VERSION_AND_ID = struct.Struct(">60xI4xI")
"""user_version and application_id in the header: https://www.sqlite.org/fileformat.html, 1.3."""
DAMAGE_CODES = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_SCHEMA)
"""What SQLite returns where the content is wrong. SQLITE_ERROR is that of a table that is not there."""
SALVAGED_TABLES = {"attempts": "sequence", "trials": "sequence", "outcomes": "rowid"}
BUSY_SECONDS = 1.0
"""How long a database that another process has locked is waited for."""
MAX_ROWS = 1 << 20
"""The maximum number of rows that are looked for in a damaged table."""


def judge_file(path: Path) -> Fault | None:
    """Look at the header alone, before SQLite or anything else touches the file; None if it is ours, or not there.

    Raises OSError if it cannot be read.
    """
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            header = file.read(HEADER_BYTES)
    except FileNotFoundError:
        return None
    except IsADirectoryError:
        return Fault.foreign
    if not header:
        return Fault.empty
    if len(header) < HEADER_BYTES:
        return Fault.damaged
    version, application = VERSION_AND_ID.unpack_from(header)
    if not header.startswith(MAGIC) or application != APPLICATION_ID:
        return Fault.foreign
    return Fault.newer if version > VERSION else None


def open_database(
    path: Path, clock: Callable[[], float] = time.time, *, busy_seconds: float = BUSY_SECONDS
) -> tuple[Database, SetAside | None]:
    """Open the database for writing, or make it; also return what was set aside for that.

    Raises sqlite3.Error or OSError if it can neither be used nor be set aside: no space, no right, locked.
    """
    fault = judge_file(path)
    if fault is None and path.exists():
        try:
            return Database(_connect_checked(path, busy_seconds)), None
        except sqlite3.DatabaseError as error:
            if not is_damage(error):
                raise
            fault = Fault.damaged
    _make_new(path, path if fault is Fault.damaged else None)
    aside = set_aside(path, fault, clock()) if fault is not None else None
    os.rename(_new_path(path), path)
    _sync_directory(path.parent)
    return Database(_connect_checked(path, busy_seconds)), aside


def open_for_reading(path: Path) -> tuple[Database, str]:
    """Open a database and change nothing of it, whether or not khod uses it; also return what is wrong with it.

    Of a damaged one the rows that can be read are returned. Raises UsageError if it is not khod's, or a newer khod's.
    """
    try:
        if (fault := judge_file(path)) in (Fault.empty, Fault.foreign, Fault.newer):
            assert fault is not None
            raise UsageError(f"This is not a history database that can be read: {REASONS[fault]}", where=str(path))
        if not path.exists():
            raise UsageError("There is no such history database", where=str(path))
        with _settled_copy(path) as settled:
            try:
                return Database(_connect_reader(settled, lasting=settled == path)), ""
            except sqlite3.DatabaseError as error:
                if not is_damage(error):
                    raise
            memory = sqlite3.connect(":memory:", isolation_level=None)
            migrate_tables(memory)
            _salvage_rows(settled, memory)
            return Database(memory), f"{path} is damaged; what follows is what could be read"
    except OSError as error:
        raise UsageError(f"The history database cannot be read: {errno_text(error)}", where=str(path)) from None
    except sqlite3.Error as error:
        raise Failed(f"The history database cannot be read: {error}", where=str(path)) from None


def is_damage(error: sqlite3.Error) -> bool:
    """Whether the error is about the content of the database, not about the file system or another process."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in DAMAGE_CODES


def was_moved(error: sqlite3.Error) -> bool:
    """Whether the file was removed or replaced while it was open."""
    return getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_READONLY_DBMOVED


def _connect_to(path: Path, options: str, busy_seconds: float) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"file:{quote(str(path.absolute()))}?{options}",
        uri=True,
        timeout=busy_seconds,
        isolation_level=None,
        check_same_thread=False,
    )
    connection.execute("PRAGMA temp_store = MEMORY")  # khod may write nowhere else
    return connection


def _connect_checked(path: Path, busy_seconds: float) -> sqlite3.Connection:
    """Connect, check the whole database, and bring it to this version."""
    connection = _connect_to(path, "mode=rw", busy_seconds)
    try:
        _require_sound(connection)
        # A rollback journal: the database is one file that can be copied, and one write a handover needs no WAL.
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.execute("PRAGMA synchronous = FULL")
        migrate_tables(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _connect_reader(path: Path, *, lasting: bool) -> sqlite3.Connection:
    """Connect for reading, and check the whole database; with one that will not last, to a copy in memory."""
    connection = _connect_to(path, "mode=ro", BUSY_SECONDS)
    try:
        _require_sound(connection)
        if lasting:
            return connection
        memory = sqlite3.connect(":memory:", isolation_level=None)
        connection.backup(memory)
    except BaseException:
        connection.close()
        raise
    connection.close()
    return memory


def _require_sound(connection: sqlite3.Connection) -> None:
    """Raise the error of a damaged database if a check of all its pages, and of its tables, finds anything."""
    (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        error = sqlite3.DatabaseError(found)
        error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise error
    for table in SALVAGED_TABLES:
        connection.execute(f"SELECT * FROM {table} LIMIT 0")  # noqa: S608 - a constant


def _new_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.new")


def _make_new(path: Path, damaged: Path | None) -> None:
    """Make a database beside `path`, with what can be read of `damaged`; it gets its name only when it is complete."""
    new = _new_path(path)
    for ending in ("", "-journal"):
        with suppress(FileNotFoundError):
            os.unlink(f"{new}{ending}")
    os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    with closing(_connect_to(new, "mode=rw", BUSY_SECONDS)) as connection:
        migrate_tables(connection)
        if damaged is not None:
            _salvage_rows(damaged, connection)


def _salvage_rows(damaged: Path, target: sqlite3.Connection) -> None:
    """Copy each row that can still be read. SQLite reads a file that is shorter than its header says only like this."""
    with suppress(sqlite3.Error), closing(_connect_to(damaged, "mode=ro&immutable=1", 0)) as source:
        source.execute("PRAGMA writable_schema = ON")
        for table, key in SALVAGED_TABLES.items():
            with target:
                target.execute("BEGIN")
                for row in _readable_rows(source, table, key):
                    with suppress(sqlite3.Error):  # a row that breaks a rule of the table
                        places = ", ".join("?" * len(row))
                        target.execute(f"INSERT OR IGNORE INTO {table} VALUES ({places})", row)  # noqa: S608


def _readable_rows(source: sqlite3.Connection, table: str, key: str) -> Iterator[tuple[object, ...]]:
    """Yield the rows of a table one by one, each by its key: an error in one does not end the search for the others."""
    ends: list[int] = []
    for order in ("ASC", "DESC"):
        with suppress(sqlite3.Error):
            for (found,) in source.execute(f"SELECT {key} FROM {table} ORDER BY {key} {order}"):  # noqa: S608
                ends.append(found)
    if not ends:
        return
    for number in range(min(ends), min(max(ends), min(ends) + MAX_ROWS) + 1):
        with suppress(sqlite3.Error):
            yield from source.execute(f"SELECT * FROM {table} WHERE {key} = ?", (number,)).fetchall()  # noqa: S608


@contextmanager
def _settled_copy(path: Path) -> Iterator[Path]:
    """Yield the path of the database, or of a copy in which an interrupted write is rolled back."""
    journal = Path(f"{path}-journal")
    if not journal.exists() or not journal.stat().st_size:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="khoctl-") as name:
        copy = Path(name) / path.name
        shutil.copyfile(path, copy)
        shutil.copyfile(journal, f"{copy}-journal")
        with suppress(sqlite3.Error), closing(_connect_to(copy, "mode=rw", 0)) as connection:
            connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        yield copy


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
