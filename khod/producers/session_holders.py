# SPDX-License-Identifier: LGPL-2.1-or-later
"""LUO sessions that no producer registered with khod: who holds them, and what an orderly shutdown does to each.

The last close of an outgoing session ends it. systemd kills every process before an orderly jump, and carries over
what lies in a file descriptor store that outlives its unit (since 261). An immediate jump closes nothing.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from khod.abi.calls import Calls
from khod.dataclass import dataclass
from khod.model import Finding, FindingSource, LuoSession, SessionFate, Verdict
from khod.producers.session_scan import (
    LINK,
    HeldSession,
    HoldingProcess,
    Scanner,
    SessionScan,
    SightedSessions,
    scan_processes,
)
from khod.systemd.facts import BOOTED, SystemdFacts
from khod.systemd.shutdown import CARRIES_SESSIONS
from khod.text import join_names, printable

OF_SYSTEMD = "systemd"
"""The session that systemd itself makes for its stores on the way down (since 261)."""

MAX_HOLDERS_SHOWN = 3
OUTLIVES = ("yes", "on-success")
"""What FileDescriptorStorePreserve= has where a stopped unit's store stays; on-success: unless the unit fails."""


ASKED = SystemdFacts()


def find_sessions(
    calls: Calls,
    own: Callable[[], Iterable[str]] = tuple,
    systemd: SystemdFacts = ASKED,
    scanner: Scanner = scan_processes,
) -> SightedSessions:
    """Find the sessions of other processes. `own` gives khod's, which systemd has too; it is asked where any are left.

    What khod makes or closes meanwhile is its own as well.
    """
    known = set(own())
    scan = scan_others(calls, scanner)
    known |= set(own())
    found = [one for one in scan.sessions if one.name not in known and not _is_systemds(one)]
    if not found:
        return SightedSessions(unseen=scan.unseen)
    manager = _Manager.ask_systemd(calls, systemd, [process for one in found for process in one.processes])
    found.sort(key=lambda one: (one.name, one.processes[0].pid))
    return SightedSessions(tuple(_judge_session(one, manager) for one in found), scan.unseen)


def scan_others(calls: Calls, scanner: Scanner) -> SessionScan:
    """What a scanner finds, without what this process has open: a scanner that is another process does not know it."""
    scan = scanner(calls)
    others = [
        replace(one, processes=[process for process in one.processes if process.pid != os.getpid()])
        for one in scan.sessions
    ]
    return SessionScan([one for one in others if one.processes], scan.unseen)


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
    counted = replace(
        verdict,
        arrived=sorted({*verdict.arrived, *arrived}),
        missing=sorted({*verdict.missing, *missing}),
        unknown=sorted({*verdict.unknown, *unknown}),
    )
    return counted.with_findings(findings)
