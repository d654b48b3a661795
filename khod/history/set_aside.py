# SPDX-License-Identifier: LGPL-2.1-or-later
"""A history database that cannot be used is set aside: renamed, never removed, and named until somebody removes it."""

import enum
import os
import re
import time
from pathlib import Path

from khod.dataclass import dataclass

COMPANIONS = ("", "-journal", "-wal", "-shm")
"""The endings of the files that belong together: SQLite applies a journal to whatever database has its name."""
TIME_FORMAT = "%Y%m%dT%H%M%SZ"


class Fault(enum.Enum):
    """Why a database was set aside."""

    empty = "empty"
    damaged = "damaged"
    foreign = "foreign"
    newer = "newer"


REASONS = {
    Fault.empty: "it had no content",
    Fault.damaged: "it was damaged; what could be read of it was taken over",
    Fault.foreign: "it was not a history database of khod's",
    Fault.newer: "a newer khod had written it",
}


@dataclass(frozen=True)
class SetAside:
    """A database that was set aside: its new path, and why."""

    path: Path
    fault: Fault

    def describe(self) -> str:
        """Return a sentence for the operator."""
        return (
            f"A history database was set aside as {self.path}: {REASONS[self.fault]}. "
            "khod does not need it; this line goes when the file is removed"
        )


def set_aside(path: Path, fault: Fault, at: float) -> SetAside:
    """Rename a database with its journals; the new name has the fault and the time. Raises OSError.

    The database itself comes last: without it the journals would be found beside a new one.
    """
    stem = f"{path.name}.{fault.value}-{time.strftime(TIME_FORMAT, time.gmtime(at))}"
    target, number = path.with_name(stem), 1
    while any(os.path.lexists(f"{target}{ending}") for ending in COMPANIONS):
        number += 1
        target = path.with_name(f"{stem}.{number}")
    for ending in reversed(COMPANIONS):
        if os.path.lexists(f"{path}{ending}"):
            os.rename(f"{path}{ending}", f"{target}{ending}")
    return SetAside(target, fault)


def list_set_aside(path: Path) -> list[SetAside]:
    """Return the databases that were set aside and are still there, in order of name; none if that cannot be read."""
    pattern = re.compile(rf"{re.escape(path.name)}\.({'|'.join(Fault.__members__)})-\d{{8}}T\d{{6}}Z(\.\d+)?")
    try:
        names = sorted(os.listdir(path.parent))
    except OSError:
        return []
    return [SetAside(path.with_name(name), Fault[found[1]]) for name in names if (found := pattern.fullmatch(name))]
