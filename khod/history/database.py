# SPDX-License-Identifier: LGPL-2.1-or-later
"""The history database: every attempt as a row with a digest, and what the attempts say of their images.

Every method may raise sqlite3.Error. The rows are independent of each other: one that is damaged is named, and the
others are returned.
"""

import sqlite3
import time
from dataclasses import replace

from khod.dataclass import dataclass
from khod.errors import Failed, UsageError
from khod.history import documents, trial
from khod.history.model import AttemptRecord, AttemptSummary
from khod.history.trial import ImageTrial
from khod.model import Phase
from khod.text import join_names, one_line

MAX_PAGE = 500
"""The maximum number of attempts in one page."""
MAX_CHAIN = 1000
"""The maximum number of handovers in a chain."""
MAX_TRIALS = 10_000
"""The maximum number of rows that speak for or against an image; the oldest are removed first."""
MIN_PREFIX = 6
"""The number of characters from which on the beginning of a run or a digest names an image."""
DAY_SECONDS = 86_400
DAMAGED = "its row in the history database is damaged"


@dataclass(frozen=True)
class Bounds:
    """How much is kept: attempts, days, bytes. The last attempt is always kept."""

    keep: int
    days: int
    max_bytes: int


class Database:
    """The attempts in an open database."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def close(self) -> None:
        """Close the database; this instance cannot be used any more."""
        self._connection.close()

    # Writing

    def add_attempt(self, attempt: AttemptRecord, bounds: Bounds | None = None) -> None:
        """Add an attempt, or replace the one of the same run; then remove what is beyond `bounds`. All or nothing."""
        summary, document = documents.encode_summary(attempt.summary), documents.encode_document(attempt)
        run = attempt.summary.run
        with self._connection as connection:
            connection.execute("BEGIN IMMEDIATE")
            self._count_outcome(run, attempt.summary.outcome)
            connection.execute(
                """INSERT INTO attempts (run, outcome, ended_at, last_boot_id, summary, document, digest)
                VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (run) DO UPDATE SET outcome = excluded.outcome,
                ended_at = excluded.ended_at, last_boot_id = excluded.last_boot_id, summary = excluded.summary,
                document = excluded.document, digest = excluded.digest""",
                (
                    run,
                    attempt.summary.outcome.name,
                    attempt.summary.ended_at,
                    attempt.summary.last_boot_id,
                    summary,
                    document,
                    documents.row_digest(run, summary, document),
                ),
            )
            self._judge_image(attempt)
            if bounds is not None:
                self._prune_attempts(bounds, attempt.summary.ended_at)

    def _count_outcome(self, run: str, outcome: Phase) -> None:
        """Count an outcome. A run that is replaced with another outcome counts under both, so that no count falls."""
        query = "SELECT outcome FROM attempts WHERE run = ?"
        if self._connection.execute(query, (run,)).fetchone() != (outcome.name,):
            self._connection.execute(
                "INSERT INTO outcomes VALUES (?, 1) ON CONFLICT (outcome) DO UPDATE SET count = count + 1",
                (outcome.name,),
            )

    def _judge_image(self, attempt: AttemptRecord) -> None:
        """Note what the attempt says of its image; an acknowledgement of the same run stays."""
        run, images = attempt.summary.run, attempt.target.images if attempt.target else []
        verified, failed = trial.counts_for_image(attempt), trial.counts_against_image(attempt)
        if not images or not (verified or failed):
            self._connection.execute("DELETE FROM trials WHERE run = ?", (run,))
            return
        self._connection.execute(
            """INSERT INTO trials (run, image, files, verified, at, reason) VALUES (?, ?, ?, ?, ?, ?)
            ON CONFLICT (run) DO UPDATE SET verified = excluded.verified, at = excluded.at, reason = excluded.reason""",
            (
                run,
                trial.trial_digest(images),
                " ".join(image.digest for image in images),
                verified,
                attempt.summary.ended_at,
                one_line(attempt.summary.reason),
            ),
        )
        self._connection.execute(
            "DELETE FROM trials WHERE sequence <= (SELECT max(sequence) FROM trials) - ?", (MAX_TRIALS,)
        )

    def _prune_attempts(self, bounds: Bounds, now: float) -> None:
        """Remove the oldest attempts beyond the bounds, but not the last one."""
        last = "sequence < (SELECT max(sequence) FROM attempts)"
        self._connection.execute(
            f"""DELETE FROM attempts WHERE {last} AND (ended_at < ? OR sequence NOT IN
            (SELECT sequence FROM attempts ORDER BY sequence DESC LIMIT ?))""",  # noqa: S608 - a constant
            (now - bounds.days * DAY_SECONDS, bounds.keep),
        )
        oldest = f"DELETE FROM attempts WHERE {last} AND sequence = (SELECT min(sequence) FROM attempts)"  # noqa: S608
        while self._used_bytes() > bounds.max_bytes and self._connection.execute(oldest).rowcount:
            pass

    def _used_bytes(self) -> int:
        pages, free, size = (
            self._connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_count", "freelist_count", "page_size")
        )
        return int((pages - free) * size)

    def acknowledge(self, image: str, at: float, by: str) -> list[str]:
        """Let an image be tried again, whatever the handovers into it came to; return the runs that no longer count.

        `image` begins a run, or the digest of the image or of one of its files; it has MIN_PREFIX characters or more.
        Raises UsageError if nothing that failed has this name.
        """
        named = self._trials_of(image) if len(image) >= MIN_PREFIX else []
        if not named:
            raise UsageError(
                f"No failed handover bars an image {image!r}",
                remedy="Give a run as khoctl history shows it, or the digest of a kernel, an initrd or both.",
            )
        with self._connection as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(
                "UPDATE trials SET acknowledged_at = ?, acknowledged_by = ? WHERE run = ?",
                [(at, one_line(by), run) for run in named],
            )
        return named

    def _trials_of(self, name: str) -> list[str]:
        """Return the runs that count against the images of this name, newest first."""
        rows = self._connection.execute("SELECT run, image, files FROM trials").fetchall()
        images = {image: None for run, image, files in rows if _begins_any(name, run, image, *files.split())}
        return [run for image in images for run, *_ in self._counted_failures(image)]

    # Reading

    def list_attempts(self, before: str = "", limit: int = MAX_PAGE) -> list[AttemptSummary]:
        """Return attempts, newest first: those that began to be remembered before the run `before`, if one is given.

        A row whose digest does not match has `damage` set.
        """
        where = "WHERE sequence < (SELECT sequence FROM attempts WHERE run = ?)" if before else ""
        rows = self._connection.execute(
            f"SELECT run, summary, document, digest FROM attempts {where} ORDER BY sequence DESC LIMIT ?",  # noqa: S608
            (before, limit) if before else (limit,),
        )
        return [_read_summary(*row) for row in rows]

    def find_runs(self, prefix: str, limit: int = MAX_PAGE) -> list[str]:
        """Return the runs that begin with `prefix`, newest first."""
        rows = self._connection.execute(
            "SELECT run FROM attempts WHERE substr(run, 1, ?) = ? ORDER BY sequence DESC LIMIT ?",
            (len(prefix), prefix, limit),
        )
        return [run for (run,) in rows]

    def resolve_run(self, name: str = "") -> str:
        """Return the run that `name` is the beginning of, or the last one for "".

        Raises UsageError if there is none, or if there are several, which the error names.
        """
        found = self.find_runs(name)
        if not name and found:
            return found[0]
        if name in found:
            return name
        if len(found) > 1:
            raise UsageError(f"{name!r} begins several runs: {join_names(found)}", remedy="Give more of it.")
        if not found:
            what = f"There is no attempt {name!r}" if name else "There is no attempt yet"
            raise UsageError(f"{what} in the history", remedy="To list them: khoctl history")
        return found[0]

    def read_attempt(self, run: str) -> AttemptRecord:
        """Return an attempt by its run. `damage` says if its row is damaged; Failed if nothing of it can be read."""
        query = "SELECT summary, document, digest FROM attempts WHERE run = ?"
        row = self._connection.execute(query, (run,)).fetchone()
        if row is None:
            raise UsageError(f"There is no attempt {run!r} in the history", remedy="To list them: khoctl history")
        summary, document, digest = row
        try:
            found = documents.decode_document(document)
            damaged = documents.row_digest(run, summary, document) != digest
        except (documents.DamagedDocument, TypeError, AttributeError) as error:  # TypeError: a column of another type
            raise Failed(
                f"The attempt {run} cannot be read: {DAMAGED}: {error}",
                remedy="The other attempts can be read. To list them: khoctl history",
            ) from None
        return replace(found, damage="; ".join(filter(None, (DAMAGED, found.damage)))) if damaged else found

    def read_chain(self, boot_id: str = "") -> list[AttemptSummary]:
        """Return the handovers since the last cold boot that led to the boot `boot_id`, newest first.

        Without a boot these are the handovers that led to the last kernel that was reached by one. Each began in the
        boot that the next one in the list led to.
        """
        query = """SELECT run, summary, document, digest FROM attempts WHERE outcome IN ('verified', 'degraded')
            AND last_boot_id = ? ORDER BY sequence DESC LIMIT 1"""
        if not boot_id:
            newest = """SELECT last_boot_id FROM attempts WHERE outcome IN ('verified', 'degraded')
                AND last_boot_id != '' ORDER BY sequence DESC LIMIT 1"""
            (boot_id,) = self._connection.execute(newest).fetchone() or ("",)
        found: list[AttemptSummary] = []
        seen = {""}
        while boot_id not in seen and len(found) < MAX_CHAIN:
            seen.add(boot_id)
            row = self._connection.execute(query, (boot_id,)).fetchone()
            if row is not None:
                found.append(_read_summary(*row))
                boot_id = found[-1].first_boot_id
        return found

    def read_trial(self, digest: str) -> ImageTrial:
        """Return what the handovers into an image came to; `digest` is that of `trial_digest`."""
        failed = self._counted_failures(digest)
        if failed:
            run, reason, at = failed[0]
            return ImageTrial(digest, len(failed), run, reason, at)
        last = "SELECT verified FROM trials WHERE image = ? ORDER BY sequence DESC LIMIT 1"
        (verified,) = self._connection.execute(last, (digest,)).fetchone() or (False,)
        return ImageTrial(digest, verified=bool(verified))

    def read_last_arrival(self) -> AttemptRecord | None:
        """Return the last attempt that led to a next kernel; None without one, Failed if it cannot be read."""
        query = "SELECT run FROM attempts WHERE outcome IN ('verified', 'degraded') ORDER BY sequence DESC LIMIT 1"
        found = self._connection.execute(query).fetchone()
        return self.read_attempt(found[0]) if found else None

    def _counted_failures(self, image: str) -> list[tuple[str, str, float]]:
        """Return run, reason and end of the handovers that count against an image, newest first."""
        return self._connection.execute(
            """SELECT run, reason, at FROM trials WHERE image = :image AND sequence > coalesce((SELECT max(sequence)
            FROM trials WHERE image = :image AND (verified OR acknowledged_at IS NOT NULL)), 0)
            ORDER BY sequence DESC""",
            {"image": image},
        ).fetchall()

    def count_outcomes(self) -> dict[Phase, int]:
        """Return how often each outcome was added; these counts never fall, whatever is removed."""
        rows = self._connection.execute("SELECT outcome, count FROM outcomes").fetchall()
        return {Phase[outcome]: count for outcome, count in rows if outcome in Phase.__members__}


def _begins_any(name: str, *texts: str) -> bool:
    return any(text.startswith(name) for text in texts)


def _read_summary(run: str, summary: bytes, document: bytes, digest: bytes) -> AttemptSummary:
    try:
        found = documents.decode_summary(summary)
        damaged = found.run != run or documents.row_digest(run, summary, document) != digest
    except (documents.DamagedDocument, TypeError, AttributeError):  # TypeError: a column of another type
        now = time.time()
        return AttemptSummary(str(run), now, now, Phase.inconsistent, "", "", "", None, 0.0, "", "", "", damage=DAMAGED)
    return replace(found, damage=DAMAGED) if damaged else found
