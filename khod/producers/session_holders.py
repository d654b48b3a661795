# SPDX-License-Identifier: LGPL-2.1-or-later
"""LUO sessions that no producer registered with khod: who holds them, and what an orderly shutdown does to each.

The last close of an outgoing session ends it. systemd kills every process before an orderly jump, and carries over
what lies in a file descriptor store that outlives its unit (since 261). An immediate jump closes nothing. The kernel
names a session in the links below /proc/PID/fd: `anon_inode:[luo_session] NAME`.
"""

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from khod.abi.calls import LIVEUPDATE, Calls
from khod.abi.liveupdate import Session
from khod.model import Finding, FindingSource, LuoSession, SessionFate, Verdict
from khod.producers.identity import units_in
from khod.systemd.facts import BOOTED, SystemdFacts
from khod.systemd.shutdown import CARRIES_SESSIONS
from khod.text import join_names, printable

COMM_LENGTH = 15
"""Characters that the kernel keeps of a command's name (TASK_COMM_LEN less one)."""

LINK = "anon_inode:[luo_session]"
OF_SYSTEMD = "systemd"
"""The session that systemd itself makes for its stores on the way down (since 261)."""

MAX_HOLDERS_SHOWN = 3
OUTLIVES = ("yes", "on-success")
"""What FileDescriptorStorePreserve= has where a stopped unit's store stays; on-success: unless the unit fails."""


ASKED = SystemdFacts()


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


@dataclass(frozen=True)
class SightedSessions:
    """What was found; `unseen` says why there may be more, "" where there is not."""

    sessions: tuple[LuoSession, ...] = ()
    unseen: str = ""


@dataclass
class HeldSession:
    """A session that is open, by whom, and whether it came from the previous kernel: None where that cannot be told."""

    name: str
    processes: list[HoldingProcess]
    incoming: bool | None


def find_sessions(
    calls: Calls, own: Callable[[], Iterable[str]] = tuple, systemd: SystemdFacts = ASKED
) -> SightedSessions:
    """Find the sessions of other processes. `own` gives khod's, which systemd has too; it is asked where any are left.

    What khod makes or closes meanwhile is its own as well.
    """
    known = set(own())
    held, unseen = scan_processes(calls, known)
    known |= set(own())
    found = [one for one in held if one.name not in known and not _is_systemds(one)]
    if not found:
        return SightedSessions(unseen=unseen)
    manager = _Manager.ask_systemd(calls, systemd, [process for one in found for process in one.processes])
    found.sort(key=lambda one: (one.name, one.processes[0].pid))
    return SightedSessions(tuple(_judge_session(one, manager) for one in found), unseen)


def scan_processes(calls: Calls, own: Iterable[str] = ()) -> tuple[list[HeldSession], str]:
    """Every session that another process has open, but for khod's `own`; and why there may be more."""
    held: list[HeldSession] = []
    refused, own = 0, set(own)
    if not calls.path_exists(LIVEUPDATE):
        return held, ""
    for pid in (int(name) for name in calls.list_directory("/proc") if name.isdecimal()):
        if pid == os.getpid():
            continue
        try:
            found = [session for session in _open_sessions(calls, pid) if session.name not in own]
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
    return held, f"khod may not look at the open files of {refused} processes" if refused else ""


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


def _is_systemds(held: HeldSession) -> bool:
    return held.name == OF_SYSTEMD and all(process.pid == 1 for process in held.processes)


@dataclass(frozen=True)
class _Manager:
    """What systemd says: its version, the holders' units, and in which unit's store a session lies, by name.

    `stores` is None where it does not say.
    """

    version: int
    units: dict[str, dict[str, Any]]
    stores: dict[str, str] | None

    @classmethod
    def ask_systemd(cls, calls: Calls, systemd: SystemdFacts, processes: Sequence[HoldingProcess]) -> "_Manager | None":
        """Ask systemd; None where it does not run this host or does not answer."""
        if not calls.path_exists(BOOTED):
            return None
        manager = systemd.describe_manager()
        stores: dict[str, str] | None = {}
        if any(process.pid == 1 for process in processes):
            files = systemd.list_stored_files()
            stores = (
                None
                if files is None
                else {
                    path.removeprefix(LINK).removeprefix(" "): unit
                    for unit, paths in files.items()
                    for path in paths
                    if path.startswith(LINK)
                }
            )
        names = {process.system_unit for process in processes if process.system_unit} | set((stores or {}).values())
        units = systemd.read_units(sorted(names))
        return None if manager is None or units is None else cls(manager.version, units, stores)

    def store_outlives(self, unit: str) -> bool:
        """Whether the unit's store stays when it is stopped."""
        return self.units.get(unit, {}).get("FileDescriptorStorePreserve") in OUTLIVES

    def keeps_process(self, process: HoldingProcess) -> bool:
        """Whether the process is neither stopped nor killed by a shutdown."""
        unit = self.units.get(process.system_unit, {})
        stopped = "shutdown.target" in unit.get("Conflicts", ())
        return unit.get("SurviveFinalKillSignal") is True and not stopped


def _judge_session(held: HeldSession, manager: _Manager | None) -> LuoSession:
    """What an orderly shutdown does to a session: one holder that keeps it is enough."""
    shown = join_names(map(str, held.processes), MAX_HOLDERS_SHOWN)
    if held.incoming:
        why = "it came from the previous kernel, and no jump takes what is left in it any further"
        return LuoSession(held.name, shown, SessionFate.unknown, why, incoming=True)
    if manager is None:
        return LuoSession(held.name, shown, SessionFate.unknown, "systemd does not say what it does to it")
    order = [SessionFate.kept, SessionFate.unknown, SessionFate.lost]
    fates = [_judge_holder(held.name, process, manager) for process in held.processes]
    return LuoSession(held.name, shown, *min(fates, key=lambda found: order.index(found[0])))


def _judge_holder(name: str, process: HoldingProcess, manager: _Manager) -> tuple[SessionFate, str]:
    carried = manager.version >= CARRIES_SESSIONS
    if process.pid == 1:
        unit = "" if manager.stores is None else manager.stores.get(name, "")
        if not unit:
            return SessionFate.unknown, "systemd does not say in which unit's file descriptor store it lies"
        where = f"the file descriptor store of {unit}"
        if not carried:
            return SessionFate.lost, f"systemd {manager.version} does not carry {where} over: 261 does"
        if manager.store_outlives(unit):
            return SessionFate.kept, f"it lies in {where}"
        return SessionFate.lost, f"{where} is emptied when that is stopped (FileDescriptorStorePreserve=)"
    if process.is_user_manager:
        settings = manager.units.get(process.system_unit, {})
        if carried and manager.store_outlives(process.system_unit) and settings.get("FileDescriptorStoreMax"):
            return SessionFate.kept, f"it lies in a file descriptor store of {process.system_unit}"
        return (
            SessionFate.lost,
            f"{process.system_unit} keeps no file descriptors over a shutdown (FileDescriptorStoreMax=, "
            "FileDescriptorStorePreserve=)",
        )
    if manager.keeps_process(process):
        return SessionFate.kept, f"{process.system_unit} is neither stopped nor killed (SurviveFinalKillSignal=)"
    return SessionFate.lost, "its process is stopped or killed, and no file descriptor store keeps it"


# After the jump


def session_title(session: LuoSession) -> str:
    """A session as it is named in a verdict."""
    return f"session {printable(session.name)}" if session.name else f"a session without a name of {session.holder}"


def count_arrivals(
    verdict: Verdict, left: Sequence[LuoSession], unseen: str, held: Sequence[HeldSession], *, at_once: bool
) -> Verdict:
    """Add to the verdict which of the sessions that left arrived: `held` are those that are open now.

    Nobody asks the kernel for them: RETRIEVE_SESSION would take a session from its owner. So of one that nobody has
    open, and that no shutdown ended, it is not known whether it waits for its owner, was taken back and let go, or did
    not arrive. `at_once` says that nothing was stopped before the jump.
    """
    incoming, arrived, missing = {one.name for one in held if one.name and one.incoming}, list[str](), list[str]()
    names = {one.name for one in held if one.name}
    unknown = [f"other processes' sessions ({unseen})"] if unseen else []
    findings = [*verdict.findings]
    for session in left:
        shown = session_title(session)
        if session.name in incoming and not session.incoming:
            arrived.append(shown)
        elif session.fate is SessionFate.lost and not at_once:
            missing.append(shown)
            again = "; a session of that name is open now, as a new one" if session.name in names else ""
            text = f"LUO {shown}, held by {session.holder}, was lost: {session.why}{again}"
            findings.append(Finding("", text, FindingSource.session, session.name))
        else:
            unknown.append(shown)
    counted = Verdict(
        sorted({*verdict.arrived, *arrived}),
        sorted({*verdict.missing, *missing}),
        verdict.changed,
        unknown=sorted({*verdict.unknown, *unknown}),
    )
    return counted.with_findings(findings)
