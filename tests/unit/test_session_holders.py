# SPDX-License-Identifier: LGPL-2.1-or-later
"""LUO sessions that nobody told khod of, in a /proc laid out for it, and what systemd does to each on its way down."""

import asyncio
import errno
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from khod.abi.calls import HostCalls, Session
from khod.abi.liveupdate import LIVEUPDATE
from khod.model import LuoSession, SessionFate, Verdict
from khod.producers.session_holders import count_arrivals, find_sessions
from khod.producers.session_scan import LINK, HeldSession, HoldingProcess, SightedSessions
from khod.systemd import dbus
from khod.systemd.facts import BOOTED, SystemdFacts
from khod.systemd.manager import Manager
from tests.unit.fakebus import fake_bus, unit

KEPT, LOST, UNKNOWN = SessionFate.kept, SessionFate.lost, SessionFate.unknown
STORE: dict[str, Any] = {"FileDescriptorStoreMax": 16, "NFileDescriptorStore": 1}
DEFAULTS: dict[str, Any] = {
    "NFileDescriptorStore": 0,
    "FileDescriptorStoreMax": 0,
    "FileDescriptorStorePreserve": "restart",
    "SurviveFinalKillSignal": False,
    "Conflicts": ["shutdown.target"],
}


class Proc(HostCalls):
    """A host with LUO in a directory: its processes.

    `behind` is the session of each link that the kernel cannot show, `incoming` are those of the previous kernel.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.behind: dict[str, str | None] = {}
        self.incoming: set[str] = set()
        for path in (LIVEUPDATE, BOOTED):
            self.host_path(path).mkdir(parents=True)

    def process(self, pid: int, command: str, cgroup: str, *links: str) -> None:
        directory = self.host_path(f"/proc/{pid}")
        (directory / "fd").mkdir(parents=True)
        (directory / "comm").write_text(f"{command}\n")
        (directory / "cgroup").write_text(f"0::{cgroup}\n")
        for fd, link in enumerate(("/dev/null", *links)):
            (directory / "fd" / str(fd)).symlink_to(link)

    def read_link(self, path: str) -> str:
        link = super().read_link(path)
        if link in self.behind:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), path)
        return link

    def describe_session(self, pid: int, fd: int) -> Session | None:
        link = super().read_link(f"/proc/{pid}/fd/{fd}")
        name = self.behind.get(link, link.removeprefix(LINK).removeprefix(" "))
        return None if name is None else Session(name, name in self.incoming)


class Systemd(SystemdFacts):
    """systemd, as told: units by name, and what lies in their stores."""

    def __init__(self, version: int = 262) -> None:
        self.version = version
        self.units: dict[str, dict[str, Any]] = {}
        self.stores: dict[str, list[str]] | None = {}
        self.asked: list[str] = []

    def unit(self, name: str, **settings: Any) -> None:
        self.units[name] = {**DEFAULTS, **settings}

    def describe_manager(self) -> Manager | None:
        self.asked.append("manager")
        return Manager(self.version, "kvm")

    def read_units(self, names: Iterable[str]) -> dict[str, dict[str, Any]] | None:
        self.asked.append("units")
        return {name: self.units.get(name, DEFAULTS) for name in names}

    def list_stored_files(self) -> dict[str, list[str]] | None:
        self.asked.append("stores")
        if self.stores is None:
            return None
        return {unit: [f"{LINK} {name}" for name in names] for unit, names in self.stores.items()}


class Silent(SystemdFacts):
    """systemd that does not answer."""

    def describe_manager(self) -> None:
        return None

    def read_units(self, _names: Iterable[str]) -> None:
        return None

    def list_stored_files(self) -> None:
        return None


@pytest.fixture
def proc(tmp_path: Path) -> Proc:
    return Proc(tmp_path)


def found(proc: Proc, systemd: Systemd | None = None, own: Sequence[str] = ()) -> dict[str, SessionFate]:
    return {session.name: session.fate for session in find_sessions(proc, lambda: own, systemd or Systemd()).sessions}


def test_the_kernel_s_own_selftest_is_found_and_named(proc: Proc) -> None:
    """tools/testing/selftests/liveupdate/luo_kexec_simple: its child holds two sessions."""
    session = "/user.slice/user-0.slice/session-1.scope"
    proc.process(77, "luo_kexec_simpl", session, f"{LINK} test-session", f"{LINK} kexec_simple_state")
    proc.process(78, "sh", session)
    assert found(proc) == {"test-session": LOST, "kexec_simple_state": LOST}
    assert {held.holder for held in find_sessions(proc, systemd=Systemd()).sessions} == {
        "luo_kexec_simpl (process 77, session-1.scope)"
    }


def test_one_session_of_two_processes_is_one(proc: Proc) -> None:
    proc.process(10, "parent", "/system.slice/db.service", f"{LINK} db")
    proc.process(11, "child", "/system.slice/db.service", f"{LINK} db", f"{LINK} db")
    (session,) = find_sessions(proc, systemd=Systemd()).sessions
    assert "process 10" in session.holder
    assert "process 11" in session.holder


def test_without_any_systemd_is_not_asked(proc: Proc) -> None:
    """khod's own, which systemd keeps too, and the one that systemd makes on its way down."""
    systemd = Systemd()
    proc.process(1, "systemd", "/init.scope", f"{LINK} khod-run-kv", f"{LINK} systemd")
    proc.process(os.getpid(), "khod", "/system.slice/kho-handover.service", f"{LINK} khod-run-kv", f"{LINK} late")
    proc.process(12, "other", "/system.slice/other.service", "anon_inode:[eventfd]", "/tmp/[luo_session] x")
    assert find_sessions(proc, lambda: ["khod-run-kv"], systemd) == SightedSessions()
    assert systemd.asked == []


def test_a_kernel_without_luo_has_none(proc: Proc) -> None:
    proc.process(12, "other", "/system.slice/other.service", f"{LINK} x")
    proc.host_path(LIVEUPDATE).rmdir()
    assert find_sessions(proc, systemd=Systemd()) == SightedSessions()


def test_one_of_systemd_s_name_that_another_process_has_is_not_systemd_s(proc: Proc) -> None:
    proc.process(12, "other", "/system.slice/other.service", f"{LINK} systemd")
    assert found(proc) == {"systemd": LOST}


def test_a_link_that_is_too_long_is_looked_behind(proc: Proc) -> None:
    """A name of 39 bytes and more; 6.19.11 does not tell it either, and a long path may be no session at all."""
    long = "n" * 60
    proc.behind = {"long": long, "long, 6.19": "", "long path": None}
    proc.process(12, "vmm", "/system.slice/vmm.service", *proc.behind)
    proc.process(13, "vmm", "/system.slice/vmm.service", "long, 6.19", LINK)
    names = [session.name for session in find_sessions(proc, systemd=Systemd()).sessions]
    assert names == ["", "", "", long]


def test_what_khod_may_not_look_at_is_said(proc: Proc, monkeypatch: pytest.MonkeyPatch) -> None:
    proc.process(12, "db", "/system.slice/db.service", f"{LINK} db")
    proc.process(13, "hidden", "/system.slice/hidden.service", f"{LINK} x")
    listdir = proc.list_directory

    def refused(path: str) -> list[str]:
        if path == "/proc/13/fd":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return listdir(path)

    monkeypatch.setattr(proc, "list_directory", refused)
    seen = find_sessions(proc, systemd=Systemd())
    assert [session.name for session in seen.sessions] == ["db"]
    assert "1 process" in seen.unseen


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (b"/usr/lib/luo_kexec_simple\0-s\x001\0", "luo_kexec_simple"),
        (b"luo_kexec_simple\0", "luo_kexec_simple"),
        (b"python3\0/usr/bin/x\0", "luo_kexec_simpl"),
        (b"", "luo_kexec_simpl"),
    ],
)
def test_a_long_name_of_a_command_is_shown_whole(proc: Proc, command: bytes, shown: str) -> None:
    proc.process(12, "luo_kexec_simpl", "/system.slice/test.service", f"{LINK} state")
    (proc.root / "proc/12/cmdline").write_bytes(command)
    (session,) = find_sessions(proc, systemd=Silent()).sessions
    assert session.holder == f"{shown} (process 12, test.service)"


@pytest.mark.parametrize("gone", ["list_directory", "read_link"])
def test_a_process_that_ends_meanwhile_has_none(proc: Proc, monkeypatch: pytest.MonkeyPatch, gone: str) -> None:
    proc.process(12, "db", "/system.slice/db.service", f"{LINK} db")
    ask: Callable[[str], object] = getattr(proc, gone)

    def ended(path: str) -> object:
        if path.startswith("/proc/12/fd"):
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH), path)
        return ask(path)

    monkeypatch.setattr(proc, gone, ended)
    assert find_sessions(proc, systemd=Systemd()) == SightedSessions()


@pytest.mark.parametrize(
    ("preserve", "version", "fate"),
    [
        ("yes", 262, KEPT),
        ("on-success", 262, KEPT),
        ("restart", 262, LOST),
        ("no", 262, LOST),
        ("yes", 261, KEPT),
        ("yes", 260, LOST),
    ],
)
def test_a_store_that_outlives_its_unit_keeps_it(proc: Proc, preserve: str, version: int, fate: SessionFate) -> None:
    """Whether the service runs, and has it open as well, or not."""
    systemd = Systemd(version)
    systemd.unit("db.service", FileDescriptorStorePreserve=preserve, **STORE)
    systemd.stores = {"db.service": ["db", "rest"]}
    proc.process(1, "systemd", "/init.scope", f"{LINK} db", f"{LINK} rest")
    proc.process(12, "db", "/system.slice/db.service", f"{LINK} db")
    assert found(proc, systemd) == {"db": fate, "rest": fate}


def test_one_that_its_service_has_not_put_into_the_store_is_lost(proc: Proc) -> None:
    systemd = Systemd()
    systemd.unit("db.service", FileDescriptorStorePreserve="yes", **STORE)
    systemd.stores = {"db.service": ["other"]}
    proc.process(1, "systemd", "/init.scope", f"{LINK} other")
    proc.process(12, "db", "/system.slice/db.service", f"{LINK} db")
    assert found(proc, systemd) == {"db": LOST, "other": KEPT}


@pytest.mark.parametrize(
    ("settings", "fate"),
    [
        ({"FileDescriptorStoreMax": 64, "FileDescriptorStorePreserve": "yes"}, KEPT),
        ({"FileDescriptorStoreMax": 64}, LOST),
        ({"FileDescriptorStorePreserve": "yes"}, LOST),
    ],
)
def test_a_user_manager_s_is_kept_where_its_unit_has_both_settings(
    proc: Proc, settings: dict[str, Any], fate: SessionFate
) -> None:
    systemd = Systemd()
    systemd.unit("user@1000.service", **settings)
    manager = "/user.slice/user-1000.slice/user@1000.service"
    proc.process(50, "systemd", f"{manager}/init.scope", f"{LINK} stored")
    proc.process(51, "vmm", f"{manager}/app.slice/vmm.service", f"{LINK} stored", f"{LINK} open")
    assert found(proc, systemd) == {"stored": fate, "open": LOST}


@pytest.mark.parametrize(
    ("settings", "fate"),
    [
        ({"SurviveFinalKillSignal": True, "Conflicts": ["umount.target"]}, KEPT),
        ({"SurviveFinalKillSignal": True, "Conflicts": ["a.target", "shutdown.target"]}, LOST),
        ({"Conflicts": []}, LOST),
    ],
)
def test_a_process_that_is_neither_stopped_nor_killed_keeps_it(
    proc: Proc, settings: dict[str, Any], fate: SessionFate
) -> None:
    systemd = Systemd()
    systemd.unit("root-storage.service", **settings)
    proc.process(60, "storage", "/system.slice/root-storage.service", f"{LINK} root")
    assert found(proc, systemd) == {"root": fate}


def test_where_systemd_does_not_answer_nobody_knows(proc: Proc) -> None:
    proc.process(12, "db", "/system.slice/db.service", f"{LINK} db")
    (session,) = find_sessions(proc, systemd=Silent()).sessions
    assert session.fate is UNKNOWN
    proc.host_path(BOOTED).rmdir()
    assert found(proc) == {"db": UNKNOWN}


def test_where_it_does_not_say_what_lies_in_its_stores_nobody_knows_of_those(proc: Proc) -> None:
    systemd = Systemd()
    systemd.unit("db.service", FileDescriptorStorePreserve="yes", **STORE)
    proc.process(1, "systemd", "/init.scope", f"{LINK} db")
    proc.process(12, "x", "/system.slice/x.service", f"{LINK} x")
    systemd.stores = None
    seen = find_sessions(proc, systemd=systemd)
    assert {session.name: session.fate for session in seen.sessions} == {"db": UNKNOWN, "x": LOST}


def test_one_that_came_from_the_previous_kernel_is_kept_by_no_jump(proc: Proc) -> None:
    """Also where an outgoing one has its name."""
    systemd = Systemd()
    systemd.unit("db.service", FileDescriptorStorePreserve="yes", **STORE)
    systemd.stores = {"db.service": ["db"]}
    proc.process(1, "systemd", "/init.scope", f"{LINK} db")
    proc.incoming = {"db"}
    (session,) = find_sessions(proc, systemd=systemd).sessions
    assert session.incoming
    assert session.fate is UNKNOWN
    proc.process(12, "db", "/system.slice/db.service", f"{LINK} other")
    assert [one.incoming for one in find_sessions(proc, systemd=systemd).sessions] == [True, False]


# After the jump


def left(name: str, fate: SessionFate, *, incoming: bool = False) -> LuoSession:
    return LuoSession(name, "db (process 12, db.service)", fate, "because", incoming)


def held(name: str, incoming: bool | None) -> list[HeldSession]:
    return [HeldSession(name, [HoldingProcess(5, "db", ())], incoming)]


@pytest.mark.parametrize(
    ("fate", "at_once", "now", "where"),
    [
        (LOST, False, [], "missing"),
        (LOST, False, held("db", incoming=False), "missing"),  # a new one of that name: the shutdown ended the other
        (LOST, False, held("db", incoming=True), "arrived"),  # it was put into a store after all
        (LOST, True, [], "unknown"),
        (LOST, True, held("db", incoming=True), "arrived"),
        (KEPT, False, held("db", incoming=True), "arrived"),
        (KEPT, False, held("db", incoming=False), "unknown"),
        (KEPT, False, held("db", incoming=None), "unknown"),
        (KEPT, False, [], "unknown"),  # taken back and let go already, or not asked for yet
        (UNKNOWN, False, held("db", incoming=True), "arrived"),
        (UNKNOWN, False, held("dbs", incoming=True), "unknown"),
    ],
)
def test_what_left_is_counted_by_name(fate: SessionFate, at_once: bool, now: list[HeldSession], where: str) -> None:
    verdict = count_arrivals(Verdict(["LUO"]), [left("db", fate)], "", now, at_once=at_once)
    told = {"arrived": verdict.arrived, "missing": verdict.missing, "unknown": verdict.unknown}
    expected: dict[str, list[str]] = {"arrived": ["LUO"], "missing": [], "unknown": []}
    expected[where].append("session db")
    assert told == expected
    assert bool(verdict.reason) is (where == "missing"), "a lost session makes it degraded"
    assert ("db" in verdict.reason) is (where == "missing")


def test_one_that_went_no_further_has_not_arrived() -> None:
    verdict = count_arrivals(
        Verdict(), [left("db", UNKNOWN, incoming=True)], "", held("db", incoming=True), at_once=True
    )
    assert (verdict.unknown, verdict.arrived) == (["session db"], [])


def test_one_without_a_name_cannot_be_found_again() -> None:
    verdict = count_arrivals(Verdict(), [left("", KEPT), left("", LOST)], "", held("", incoming=True), at_once=False)
    assert (len(verdict.unknown), len(verdict.missing), verdict.arrived) == (1, 1, [])
    assert "process 12" in verdict.unknown[0]


def test_what_was_not_seen_before_the_jump_is_not_known_after_it() -> None:
    verdict = count_arrivals(Verdict(["LUO"]), (), "khod was not let", [], at_once=True)
    assert verdict.reason == ""
    assert "khod was not let" in verdict.unknown[0]


def test_systemd_is_asked_for_its_stores_and_its_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As data, over its private socket: the types are those of org.freedesktop.systemd1(5)."""
    monkeypatch.setattr(dbus, "PRIVATE_SOCKET", str(tmp_path / "private"))
    stored, plain = unit(NFileDescriptorStore=2, SurviveFinalKillSignal=True), unit(NFileDescriptorStore=0)

    async def ask() -> tuple[object, object]:
        async with fake_bus(tmp_path / "private", db=stored, web=plain) as bus:
            bus.stored = {"db.service": [f"{LINK} db", "/memfd:x"]}
            systemd = SystemdFacts()
            return await asyncio.to_thread(systemd.list_stored_files), await asyncio.to_thread(
                systemd.read_units, ["db.service"]
            )

    files, units = asyncio.run(ask())
    assert files == {"db.service": [f"{LINK} db", "/memfd:x"]}
    assert isinstance(units, dict)
    assert units["db.service"]["SurviveFinalKillSignal"] is True
