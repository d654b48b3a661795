# SPDX-License-Identifier: LGPL-2.1-or-later
"""Count the memory of the files that producers hand over, and limit it."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from khod.abi.statx import statx
from khod.dataclass import dataclass
from khod.errors import Refused, errno_text
from khod.kernel.luo import describe_fd
from khod.kernel.memory import MemoryBounds
from khod.model import Kept

SPARE_SHARE = 16
"""One part in this many of the host's memory stays free when the kernel allocates memory for files."""
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Account:
    """The bytes that outgoing sessions hold, and whether more may be preserved. Use it only in the kernel's thread.

    The kernel fills the holes of a file and pins all of it, in khod's name, so only khod can check that there is
    memory. The whole file counts towards a bound on all that is handed over; its holes must fit in the memory available
    then. The count is kept in a file, from which another khod that takes up these sessions continues. The file belongs
    in /run, which ends with the boot, as outgoing sessions do.
    """

    def __init__(self, bound: Callable[[], int], memory: Callable[[], MemoryBounds], path: Path | None) -> None:
        self._bound, self._memory, self._path = bound, memory, path
        self._held: dict[str, int] = {}

    def take_up(self, sessions: Iterable[str]) -> None:
        """Continue from what an earlier khod counted for these sessions."""
        if self._path is not None:
            with suppress(OSError, ValueError, TypeError, AttributeError):  # there was none
                counted = json.loads(self._path.read_text())
                self._held = {name: int(counted[name]) for name in sessions if name in counted}

    def require_room(self, files: Sequence["Measured"]) -> None:
        """Raise Refused, with the name of the file, if these files together would exceed the limits."""
        try:
            memory = self._memory()
        except (OSError, ValueError) as error:
            raise Refused(f"It cannot be told how much memory there is: {error}", where="/proc/meminfo") from error
        bound, total, holes = min(self._bound(), memory.total), sum(self._held.values()), 0
        spare = memory.total // SPARE_SHARE
        for file in files:
            total, holes = total + file.size, holes + file.holes
            if total > bound:
                own = bound < memory.total
                raise Refused(
                    f"With {file} the files of this handover would have {format_bytes(total)}, more than "
                    f"{'producers.max_bytes' if own else 'the memory of this host'}: {format_bytes(bound)}",
                    where=file.name,
                    remedy=f"Hand over less{', or raise producers.max_bytes in khod.toml' if own else ''}.",
                )
            if file.holes and holes > memory.available - spare:
                raise Refused(
                    f"With {file} the kernel would fill holes of {format_bytes(holes)}: "
                    f"{format_bytes(memory.available)} of memory are available, "
                    f"and {format_bytes(spare)} of that stay free",
                    where=file.name,
                    remedy="Make the file no larger than what it holds, or free memory (free -m).",
                )

    def count_session(self, session: str, size: int) -> None:
        """Add `size` to the bytes of a session; a negative `size` is subtracted."""
        self._held[session] = self._held.get(session, 0) + size

    def release_session(self, session: str) -> None:
        """Remove a session from the count."""
        if self._held.pop(session, None) is not None:
            with suppress(Refused):  # what is counted too much belongs to a session that no later khod has
                self.write_account()

    def write_account(self) -> None:
        """Write the count for the next khod; raise Refused if that fails."""
        if self._path is None:
            return
        try:
            new = self._path.with_name(f"{self._path.name}.new")
            new.write_text(json.dumps(self._held))
            new.rename(self._path)
        except OSError as error:
            raise Refused(
                f"It cannot be written down how much is handed over: {errno_text(error)}",
                where=str(self._path),
                remedy="Free some space on that file system.",
            ) from error


@dataclass(frozen=True)
class Measured:
    """A file that is handed over: its size in whole pages, and how much of that has no memory yet (bytes)."""

    name: str
    kind: str
    size: int
    holes: int

    def __str__(self) -> str:
        return f"{self.name} ({self.kind}, {format_bytes(self.size)})"

    @classmethod
    def measure_file(cls, kept: Kept, fd: int) -> "Measured":
        """Measure a file as it is now; raise Refused if it is not an open file."""
        try:
            found = statx(fd)
        except OSError as error:
            raise Refused(f"{kept.name} is not an open file: {errno_text(error)}", where=kept.name) from error
        size = -(-found.size // PAGE_BYTES) * PAGE_BYTES
        return cls(kept.name, describe_fd(fd), size, max(0, size - found.blocks * 512))


class Grown(Refused):
    """A file grew while it was preserved: the kernel took more memory than was allowed."""


def format_bytes(count: int) -> str:
    """Format a size in the largest unit it reaches, with one decimal."""
    units = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    power = max(0, min(len(units) - 1, (count.bit_length() - 1) // 10))
    return f"{count / (1 << 10 * power):.1f} {units[power]}" if power else f"{count} bytes"
