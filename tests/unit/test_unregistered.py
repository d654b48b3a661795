# SPDX-License-Identifier: LGPL-2.1-or-later
"""A LUO session that no producer registered: what khod says of it before the jump, and counts after it."""

import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from khoctl.status_page import render_status
from khod.abi.calls import Session
from khod.config import Checks, Config, Deadlines
from khod.engine import Engine
from khod.errors import Exit, Refused
from khod.model import CheckResult, Phase, SessionFate, Status
from khod.producers import session_holders
from khod.producers.session_holders import find_sessions
from khod.producers.session_scan import LINK, HeldSession, HoldingProcess, SessionScan, SightedSessions
from khod.producers.session_scanner import ask_scanner
from khod.simulated.kernel import Rebooted
from khod.systemd.facts import BOOTED, SystemdFacts
from khod.systemd.manager import Manager
from khod.target.target import Request
from tests.unit.luo import LuoHost

NAME, PID = "test-session", 77


class Site(LuoHost):
    """A host with a process that nobody told khod of. `incoming` are the sessions that came with the last jump."""

    def __init__(self, directory: Path, patch: pytest.MonkeyPatch) -> None:
        super().__init__(directory)
        self.incoming: set[str] = set()
        patch.setattr(self.kernel, "describe_session", self._session)

    def _session(self, pid: int, fd: int) -> Session:
        name = self.kernel.read_link(f"/proc/{pid}/fd/{fd}").removeprefix(LINK).strip()
        return Session(name, name in self.incoming)

    def holds(self, name: str = NAME, pid: int = PID) -> None:
        """Have a process hold a session."""
        process = self.kernel.host_path(f"/proc/{pid}")
        (process / "fd").mkdir(parents=True)
        (process / "fd/5").symlink_to(f"{LINK} {name}")
        (process / "comm").write_text("luo_kexec_simpl\n")
        (process / "cgroup").write_text("0::/user.slice/user-0.slice/session-1.scope\n")

    def ends(self, pid: int = PID) -> None:
        """End that process."""
        shutil.rmtree(self.kernel.host_path(f"/proc/{pid}"))

    async def jump(self, engine: Engine, *, now: bool = False, load_only: bool = False) -> None:
        with self.request(load_only=load_only) as request:
            await engine.kexec(replace(request, now=now))

    async def judged(self) -> Status:
        """What the next kernel's khod says in the end."""
        engine = await self.started()
        while engine.record.outcome is Phase.idle:
            await self.seen(lambda _event: True)
        return await engine.queries.status()


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setattr(SystemdFacts, "describe_manager", lambda _self: Manager(262, ""))
    monkeypatch.setattr(SystemdFacts, "read_units", lambda _self, _names: {})
    made = Site(tmp_path, monkeypatch)
    made.kernel.host_path(BOOTED).mkdir(parents=True)
    made.holds()
    return made


async def result(engine: Engine, *, now: bool) -> tuple[CheckResult, str]:
    (check,) = [check for check in await engine.queries.check(Request(now=now)) if check.name == "sessions"]
    return check.result, check.evidence


async def test_the_check_fails_for_an_orderly_jump_and_passes_for_an_immediate_one(host: Site) -> None:
    engine = await host.started()
    for now, expected in ((False, CheckResult.fail), (True, CheckResult.passed)):
        found, evidence = await result(engine, now=now)
        assert found is expected
        assert f"session {NAME}, held by luo_kexec_simpl (process {PID}, session-1.scope)" in evidence


async def test_status_lists_it(host: Site) -> None:
    engine = await host.started()
    status = await engine.queries.status()
    assert [(found.name, found.fate) for found in status.sessions] == [(NAME, SessionFate.lost)]
    assert f"{NAME}, held by luo_kexec_simpl" in render_status(status)
    host.ends()
    assert (await engine.queries.status()).sessions == []


async def test_status_does_not_wait_for_a_systemd_that_is_slow(host: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows what was found last, says that it may be out of date, and what is asked goes on."""
    engine = await host.started()
    assert await result(engine, now=False)
    host.config = Config(deadlines=Deadlines(observe=0.05))
    engine.settings.current = host.config
    answers = threading.Event()

    def slow(*arguments: Any, **options: Any) -> SightedSessions:
        answers.wait()
        return find_sessions(*arguments, **options)

    monkeypatch.setattr(session_holders, "find_sessions", slow)
    host.ends()
    status = await engine.queries.status()
    assert [found.name for found in status.sessions] == [NAME]
    assert "there may be more" in render_status(status)
    answers.set()
    while (status := await engine.queries.status()).sessions_unseen:
        pass
    assert status.sessions == []


async def test_an_orderly_jump_is_refused_before_anyone_is_told(host: Site) -> None:
    host.hook("a")
    engine = await host.started()
    with pytest.raises(Refused, match=NAME):
        await host.jump(engine)
    assert host.verbs == []
    with pytest.raises(Rebooted):
        await host.jump(engine, now=True)


@pytest.mark.parametrize("load_only", [False, True])
async def test_what_does_not_jump_is_not_refused_and_the_jump_after_it_is(host: Site, load_only: bool) -> None:
    engine = await host.started()
    if load_only:
        await host.jump(engine, load_only=True)
    else:
        await engine.activate()
    with pytest.raises(Refused, match=NAME):
        await host.jump(engine)
    with host.request() as request:
        last = replace(Request() if load_only else request, now=True)
        with pytest.raises(Rebooted):
            await engine.kexec(last)


@pytest.mark.parametrize("again", [False, True])
async def test_one_that_an_orderly_shutdown_ended_makes_it_degraded(host: Site, again: bool) -> None:
    """Also where something has made a new one of that name meanwhile."""
    host.config = Config(checks=Checks(sessions="off"))
    engine = await host.started()
    with pytest.raises(Rebooted):
        await host.jump(engine)
    host.ends()
    if again:
        host.holds(pid=5)
    status = await host.judged()
    assert (status.phase, status.exit_code) == (Phase.degraded, Exit.degraded)
    assert status.verdict is not None
    assert status.verdict.missing == [f"session {NAME}"]
    assert NAME in status.last_error
    assert ("as a new one" in status.last_error) is again


async def test_one_that_its_owner_has_again_arrived(host: Site) -> None:
    with pytest.raises(Rebooted):
        await host.jump(await host.started(), now=True)
    host.ends()
    host.holds(pid=5)
    host.incoming = {NAME}
    status = await host.judged()
    assert (status.phase, status.exit_code) == (Phase.verified, Exit.done)
    assert status.verdict is not None
    assert f"session {NAME}" in status.verdict.arrived
    assert status.summary == "The handover succeeded: all state arrived."


async def test_one_that_nobody_has_yet_is_not_claimed_to_have_arrived(host: Site) -> None:
    with pytest.raises(Rebooted):
        await host.jump(await host.started(), now=True)
    host.ends()
    assert host.luo.unclaimed == set()
    status = await host.judged()
    assert (status.phase, status.exit_code) == (Phase.verified, Exit.done)
    assert status.verdict is not None
    assert status.verdict.unknown == [f"session {NAME}"]
    assert "all state" not in status.summary
    assert NAME in status.summary
    assert f"not known   session {NAME}" in render_status(status)


async def test_a_shutdown_that_somebody_else_asked_for_is_an_orderly_one(host: Site) -> None:
    """Whatever jump khod itself was asked for, with the image loaded systemd 262 makes a kexec of any shutdown."""

    async def nothing() -> None:
        """systemd takes the request."""

    engine = await host.started(orderly=nothing)
    await host.jump(engine, now=True, load_only=True)
    await engine.stop(jumping=True)
    assert not host.record.at_once
    with pytest.raises(Rebooted):
        host.kernel.reboot_kexec()
    host.ends()
    assert (await host.judged()).phase is Phase.degraded


async def test_one_that_came_from_the_previous_kernel_is_warned_of_for_any_jump(host: Site) -> None:
    host.incoming = {NAME}
    engine = await host.started()
    for now in (False, True):
        found, evidence = await result(engine, now=now)
        assert found is CheckResult.warn
        assert NAME in evidence
    assert "no jump keeps it" in render_status(await engine.queries.status())


async def test_the_next_handover_looks_anew(host: Site) -> None:
    with pytest.raises(Rebooted):
        await host.jump(await host.started(), now=True)
    host.ends()
    await host.judged()
    with pytest.raises(Rebooted):
        await host.jump(await host.started())
    status = await host.judged()
    assert status.verdict is not None
    assert (status.phase, status.verdict.unknown) == (Phase.verified, [])


async def test_all_go_by_the_scanner(host: Site) -> None:
    """The check and the status before the jump, the verification after it. It has what khod holds in it as well."""
    host.ends()
    khod = HoldingProcess(os.getpid(), "khod", ("system.slice", "kho-handover.service"))
    owner = HoldingProcess(5, "db", ("system.slice", "db.service"))

    def scan(incoming: bool) -> SessionScan:
        return SessionScan([HeldSession("own", [khod], incoming), HeldSession(NAME, [khod, owner], incoming)])

    host.scanner = lambda _calls: scan(incoming=False)
    engine = await host.started()
    assert "db (process 5, db.service)" in (await result(engine, now=False))[1]
    assert [(found.name, found.holder) for found in (await engine.queries.status()).sessions] == [
        (NAME, "db (process 5, db.service)")
    ]
    with pytest.raises(Rebooted):
        await host.jump(engine, now=True)
    host.scanner = lambda _calls: scan(incoming=True)
    status = await host.judged()
    assert status.verdict is not None
    assert f"session {NAME}" in status.verdict.arrived


async def test_without_a_scanner_nothing_is_known_and_the_jump_goes_on(host: Site, tmp_path: Path) -> None:
    host.scanner = lambda calls: ask_scanner(calls, str(tmp_path / "nobody"))
    engine = await host.started()
    found, evidence = await result(engine, now=False)
    assert found is CheckResult.warn
    assert "kho-sessions.socket" in evidence
    assert "kho-sessions.socket" in render_status(await engine.queries.status())
    with pytest.raises(Rebooted):
        await host.jump(engine)
    status = await host.judged()
    assert status.verdict is not None
    assert (status.phase, status.verdict.missing) == (Phase.verified, [])
    assert "kho-sessions.socket" in status.verdict.unknown[0]
