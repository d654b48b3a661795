# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the kernel tells of a process in /proc/PID/stat: proc_pid_stat(5)."""

from pathlib import Path

from khod.frozen import dataclass


@dataclass(frozen=True)
class ProcessStat:
    """Some of its fields. `started` is when it began, in clock ticks since boot (field 22)."""

    name: str
    state: str
    parent: int
    session: int
    started: int


def read_stat(pid: int) -> ProcessStat:
    """Read the fields of a process; FileNotFoundError or ProcessLookupError if it does not exist, other OSErrors."""
    text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    name, _, rest = text.partition("(")[2].rpartition(")")  # the name may contain anything
    fields = rest.split()
    return ProcessStat(name, fields[0], int(fields[1]), int(fields[3]), int(fields[19]))
