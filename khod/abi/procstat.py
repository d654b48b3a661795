# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the kernel tells of a process: proc_pid_stat(5), proc_pid_loginuid(5)."""

from contextlib import suppress
from pathlib import Path

from khod.dataclass import dataclass

NO_LOGIN = (1 << 32) - 1
"""(uid_t)-1: nobody has logged in, as for what systemd starts."""


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


def read_login_user(pid: int) -> int | None:
    """Return the user that has logged in for this process, also through sudo(8); None without one, or if unknown.

    The kernel sets it at the login, and with CONFIG_AUDIT only; a process without CAP_AUDIT_CONTROL cannot change it.
    """
    with suppress(OSError, ValueError):
        user = int(Path(f"/proc/{pid}/loginuid").read_text())
        return None if user == NO_LOGIN else user
    return None
