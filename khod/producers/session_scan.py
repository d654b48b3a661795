# SPDX-License-Identifier: LGPL-2.1-or-later
"""The LUO sessions that the processes of this host have open.

The kernel names a session in the links below /proc/PID/fd: `anon_inode:[luo_session] NAME`. To read the links of
another process takes CAP_SYS_PTRACE, and CAP_DAC_READ_SEARCH for those of other users. khod has neither where systemd
runs the host: `khod.producers.session_scanner` looks there, in a unit of its own.
"""

import errno
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import field

from khod.abi.calls import Calls, Session
from khod.abi.liveupdate import LIVEUPDATE
from khod.dataclass import dataclass
from khod.model import LuoSession
from khod.producers.cgroup import units_in

COMM_LENGTH = 15
"""Characters that the kernel keeps of a command's name (TASK_COMM_LEN less one)."""

LINK = "anon_inode:[luo_session]"


@dataclass(frozen=True)
class HoldingProcess:
    """A process that has a session open. `units` are those on its cgroup's path, the outermost first."""

    pid: int
    command: str
    units: tuple[str, ...]

    @property
    def system_unit(self) -> str:
        """The system manager's unit: for all that a user's manager runs it is user@UID.service."""
        return next((unit for unit in self.units if unit.endswith((".service", ".scope"))), "")

    @property
    def is_user_manager(self) -> bool:
        """Whether it is a user's service manager: what it holds lies in one of its stores."""
        return self.system_unit.startswith("user@") and self.units[-1] == "init.scope"

    def __str__(self) -> str:
        return (
            f"{self.command or 'a process'} (process {self.pid}{f', {self.system_unit}' if self.system_unit else ''})"
        )


@dataclass
class HeldSession:
    """A session that is open, by whom, and whether it came from the previous kernel: None where that cannot be told."""

    name: str
    processes: list[HoldingProcess]
    incoming: bool | None


@dataclass
class SessionScan:
    """What was found; `unseen` says why there may be more, "" where there is not."""

    sessions: list[HeldSession] = field(default_factory=list)
    unseen: str = ""


@dataclass(frozen=True)
class SightedSessions:
    """What was found; `unseen` says why there may be more, "" where there is not."""

    sessions: tuple[LuoSession, ...] = ()
    unseen: str = ""


Scanner = Callable[[Calls], SessionScan]
"""Finds every session that a process of the host has open."""


def scan_processes(calls: Calls) -> SessionScan:
    """Find every session that a process has open, this one included, with the capabilities of this one."""
    return look_into_processes(calls) if calls.path_exists(LIVEUPDATE) else SessionScan()


def look_into_processes(calls: Calls) -> SessionScan:
    """As scan_processes, for a caller that may not see /dev and knows that the kernel has LUO."""
    held: list[HeldSession] = []
    refused = 0
    for pid in (int(name) for name in calls.list_directory("/proc") if name.isdecimal()):
        try:
            found = list(_open_sessions(calls, pid))
        except PermissionError:
            refused += 1
            continue
        if not found:
            continue
        process = _describe_process(calls, pid)
        for session in found:
            same = [
                one for one in held if session.name and (one.name, one.incoming) == (session.name, session.incoming)
            ]
            if not same:
                held.append(HeldSession(session.name, [process], session.incoming))
            elif process not in same[0].processes:
                same[0].processes.append(process)
    return SessionScan(held, f"khod may not look at the open files of {refused} processes" if refused else "")


def _open_sessions(calls: Calls, pid: int) -> Iterator[Session]:
    """The sessions that a process has open; it may end meanwhile."""
    directory = f"/proc/{pid}/fd"
    try:
        fds = calls.list_directory(directory)
    except PermissionError:
        raise
    except OSError:
        return
    for fd in fds:
        link: str | None = None
        try:
            link = calls.read_link(f"{directory}/{fd}")
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:  # seen on 6.19.11 with names of 39 bytes and more
                continue
        if link is not None and not link.startswith(LINK):
            continue
        named = Session("" if link is None else link.removeprefix(LINK).removeprefix(" "), None)
        try:
            session = calls.describe_session(pid, int(fd))
        except OSError:
            session = named if link is not None else None
        if session is not None:
            yield Session(session.name or named.name, session.incoming)


def _describe_process(calls: Calls, pid: int) -> HoldingProcess:
    command, cgroup = "", ""
    with suppress(OSError):
        command = calls.read_file(f"/proc/{pid}/comm").decode(errors="replace").removesuffix("\n")
        cgroup = calls.read_file(f"/proc/{pid}/cgroup").decode(errors="replace")
        if len(command) == COMM_LENGTH:
            first = calls.read_file(f"/proc/{pid}/cmdline").split(b"\0")[0].decode(errors="replace")
            whole = first.rpartition("/")[2]
            command = whole if whole.startswith(command) else command
    return HoldingProcess(pid, command, tuple(units_in(cgroup)))
