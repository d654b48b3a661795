# SPDX-License-Identifier: LGPL-2.1-or-later
"""The step quiesce in the engine: recorded before anything stops, and undone from whatever point the handover ends."""

import asyncio
import errno
import os
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from khod.errors import Failed, KhoError, NotRolledBack, Refused
from khod.model import Phase, Step
from khod.producers import registry
from khod.producers.cgroup import find_units_listening, units_in
from khod.producers.qemu import Qemu
from khod.quiesce import units
from khod.quiesce.host import Survey, SystemdHost
from khod.quiesce.outcome import Started
from khod.quiesce.selection import Selection, UnitFacts
from khod.simulated.kernel import Rebooted
from khod.systemd import dbus, logind
from khod.systemd.logind import Inhibitor
from khod.target.target import Request
from tests.unit.fakebus import FakeBus, fake_bus, unit
from tests.unit.harness import Host
from tests.unit.khods import DEADLINE
from tests.unit.scripted import Scripted, raises
from tests.unit.virtual import VirtualHost, in_virtual_time

NAMED_ODDLY = r"b@x\x2dy.service"
"""As systemd-escape(1) names an instance."""
UNITS = ("a.service", NAMED_ODDLY, "a.timer")
"""In the order of their start."""


class Around:
    """The units around khod: what was asked of them, and what runs. `fails` is raised by the stop, half-way."""

    def __init__(self) -> None:
        self.survey = Survey(Selection(tuple(reversed(UNITS))))
        self.running = set(UNITS)
        self.asked: list[str] = []
        self.fails: BaseException | None = None
        self.stuck: dict[str, str] = {}
        self.left: dict[str, str] = {}
        self.started: Sequence[str] = ()
        self.keep: Mapping[str, str] = {}
        self.is_guarded = False
        self.awaited_units: set[str] = set()
        self.stores: tuple[str, ...] = ()
        """The units that have stored files once they were stopped."""
        self.stops = asyncio.Event()
        self.may_stop = asyncio.Event()
        self.may_stop.set()

    async def survey_units(self, keep: Mapping[str, str]) -> Survey:
        self.keep = keep
        return self.survey

    async def stop_units(
        self,
        names: Sequence[str],
        keep: Mapping[str, str],  # noqa: ARG002
        seconds: float,  # noqa: ARG002
    ) -> tuple[str, ...]:
        self.asked.append("stop")
        self.awaited_units = {*names}
        self.stops.set()
        await self.may_stop.wait()
        self.awaited_units.clear()
        for number, name in enumerate(names):
            if self.fails is not None and number == 1:
                raise self.fails
            self.running.discard(name)
        return self.stores

    async def require_rest(self) -> None:
        self.asked.append("rest")
        if started := self.running & {"late.service"}:
            raise Refused(f"Started while the host was stopped: {started.pop()}")

    async def guard_filesystems(self) -> bool:
        self.is_guarded = True
        return True

    async def release_filesystems(self) -> None:
        self.is_guarded = False

    async def start_units(self, names: Sequence[str], seconds: float) -> Started:  # noqa: ARG002
        self.asked.append("start")
        self.started = names
        self.running |= {*names} - self.stuck.keys() - self.left.keys()
        return Started(self.stuck, self.left)


@pytest.fixture
def host(tmp_path: Path) -> VirtualHost:
    found = VirtualHost(tmp_path)
    found.around = Around()
    return found


@pytest.fixture
def private_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the path of the socket at which khod looks for systemd; no command is run in its name."""

    async def run_nothing(runner: object) -> None: ...

    monkeypatch.setattr(dbus, "PRIVATE_SOCKET", str(tmp_path / "private"))
    monkeypatch.setattr("khod.quiesce.last_acts.carry_out", run_nothing)
    monkeypatch.setattr("khod.quiesce.last_acts.take_back", run_nothing)
    return tmp_path / "private"


def around(host: Host) -> Around:
    assert isinstance(host.around, Around)
    return host.around


@in_virtual_time
async def test_it_comes_between_prepare_and_freeze_and_is_recorded_before(host: VirtualHost) -> None:
    engine, seen = await host.started(), []

    async def look() -> None:
        found = host.store.read()
        assert found is not None
        seen.append((found.quiesced, Step.quiesce in found.done, sorted(around(host).running)))

    Scripted(host, "one", prepare=look, freeze=look)
    with pytest.raises(Rebooted):
        await host.kexec(engine)
    assert seen == [((), False, sorted(UNITS)), (UNITS, True, [])]
    assert around(host).asked == ["stop", "rest"]
    assert around(host).is_guarded, "the file systems may be frozen"


@in_virtual_time
async def test_a_veto_at_freeze_starts_everything_again_after_the_thaw(host: VirtualHost) -> None:
    engine = await host.started()
    Scripted(host, "one", freeze=raises(Refused("no")))
    with pytest.raises(KhoError, match="no"):
        await host.kexec(engine)
    assert around(host).running == {*UNITS}
    assert engine.record.phase is Phase.idle
    assert engine.record.quiesced == ()


@in_virtual_time
async def test_a_stop_that_fails_half_way_starts_all_of_them(host: VirtualHost) -> None:
    engine = await host.started()
    around(host).fails = Refused("one did not stop")
    Scripted(host, "one")
    with pytest.raises(KhoError, match="one did not stop"):
        await host.kexec(engine)
    assert around(host).running == {*UNITS}
    assert "freeze" not in host.verbs


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EPERM])
@in_virtual_time
async def test_a_reboot_that_fails_starts_everything_again(
    host: VirtualHost, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise OSError(number, os.strerror(number), "reboot(2)")

    monkeypatch.setattr(host.kernel, "reboot_kexec", refuse)
    engine = await host.started()
    with pytest.raises(KhoError):
        await host.kexec(engine)
    assert around(host).running == {*UNITS}
    assert engine.record.phase is Phase.idle
    assert not around(host).is_guarded


@in_virtual_time
async def test_what_is_started_once_the_producers_are_frozen_calls_the_jump_off(host: VirtualHost) -> None:
    engine = await host.started()

    async def start_late() -> None:
        around(host).running.add("late.service")

    Scripted(host, "one", freeze=start_late)
    with pytest.raises(KhoError, match=r"late\.service"):
        await host.kexec(engine)
    assert around(host).running == {*UNITS, "late.service"}
    assert host.verbs[-2:] == ["one thaw", "one cancel"]
    assert engine.record.phase is Phase.idle


@pytest.mark.parametrize(("verb", "asked"), [("prepare", ()), ("freeze", ("stop", "rest", "start"))])
@in_virtual_time
async def test_a_program_that_blocks_a_shutdown_meanwhile_is_heard(
    host: VirtualHost, verb: str, asked: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check has asked before: an upgrade may have begun while the producers prepared for minutes."""
    held: list[Inhibitor] = []

    async def list_inhibitors() -> list[Inhibitor]:
        return held

    async def begin_upgrade() -> None:
        held.append(Inhibitor("apt", "upgrading"))

    engine = await host.started()
    monkeypatch.setattr(engine, "_inhibitors", list_inhibitors)
    acts: Any = {verb: begin_upgrade}
    Scripted(host, "one", **acts)
    with pytest.raises(Refused, match=r"blocked: apt \(upgrading\)"):
        await host.kexec(engine)
    assert tuple(around(host).asked) == asked
    assert around(host).running == {*UNITS}
    assert engine.record.phase is Phase.idle


@in_virtual_time
async def test_a_blocked_shutdown_that_is_allowed_blocks_nothing(
    host: VirtualHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def list_inhibitors() -> list[Inhibitor]:
        return [Inhibitor("apt", "upgrading")]

    host.config = replace(host.config, checks=replace(host.config.checks, inhibitors="warn"))
    engine = await host.started()
    monkeypatch.setattr(engine, "_inhibitors", list_inhibitors)
    with pytest.raises(Rebooted):
        await host.kexec(engine)


@in_virtual_time
async def test_the_status_names_the_units_that_are_waited_for(host: VirtualHost) -> None:
    engine = await host.started()
    around(host).may_stop.clear()
    handover = asyncio.ensure_future(host.kexec(engine))
    await around(host).stops.wait()
    assert (await engine.queries.status()).waiting_for == sorted(UNITS)
    around(host).may_stop.set()
    with pytest.raises(Rebooted):
        await handover
    assert (await engine.queries.status()).waiting_for == []


@in_virtual_time
async def test_what_does_not_start_again_is_named_with_what_to_do(host: VirtualHost) -> None:
    engine = await host.started()
    around(host).stuck = {NAMED_ODDLY: "failed"}
    Scripted(host, "one", freeze=raises(Refused("no")))
    with pytest.raises(NotRolledBack, match=r"failed"):
        await host.kexec(engine)
    (left,) = engine.record.not_undone
    assert (left.step, left.producer, left.why) == ("quiesce", NAMED_ODDLY, "failed")
    assert left.remedy == r"Run: systemctl start 'b@x\x2dy.service'.", "a shell would eat the backslash"
    around(host).stuck = {}
    around(host).running.remove("a.service")
    await engine.abort()
    assert around(host).started == (NAMED_ODDLY,), "what an operator has stopped since stays so"
    assert around(host).running == {*UNITS} - {"a.service"}
    assert engine.record.phase is Phase.idle


@in_virtual_time
async def test_what_somebody_has_taken_away_is_named_and_does_not_hold_the_undo_up(host: VirtualHost) -> None:
    engine = await host.started()
    around(host).left = {"a.timer": "it has gone"}
    Scripted(host, "one", freeze=raises(Refused("no")))
    with pytest.raises(Refused, match="no"):
        await host.kexec(engine)
    assert engine.record.phase is Phase.idle
    said = [event.message for event in host.events]
    assert "Not running again: a.timer (it has gone)" in said
    assert any(text.startswith(f"a.service, {NAMED_ODDLY}: started again") for text in said), said


@in_virtual_time
async def test_an_obstacle_refuses_before_any_producer_is_told(host: VirtualHost) -> None:
    engine = await host.started()
    Scripted(host, "one")
    around(host).survey = Survey(jobs={"apt-daily.service": "start"})
    with pytest.raises(KhoError, match=r"apt-daily\.service \(start\)"):
        await host.kexec(engine)
    assert host.verbs == []
    assert around(host).asked == []


def jobs_that_systemd_has(monkeypatch: pytest.MonkeyPatch, answers: list[dict[str, str]]) -> SystemdHost:
    """Give a host whose systemd answers these jobs one after the other, the last for good."""

    async def list_jobs(bus: object) -> dict[str, str]:  # noqa: ARG001
        return answers.pop(0) if len(answers) > 1 else answers[0]

    async def read_units(bus: object) -> list[UnitFacts]:  # noqa: ARG001
        return []

    @asynccontextmanager
    async def systemd_bus() -> AsyncIterator[None]:
        yield

    monkeypatch.setattr("khod.quiesce.units.list_jobs", list_jobs)
    monkeypatch.setattr("khod.quiesce.units.read_units", read_units)
    monkeypatch.setattr("khod.systemd.dbus.systemd_bus", systemd_bus)
    monkeypatch.setattr("khod.quiesce.host.JOB_SECONDS", 0.001)
    return SystemdHost(cast("Any", None), cast("Any", None))


async def test_jobs_that_end_by_themselves_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    job = {"user-runtime-dir@0.service": "stop"}
    host = jobs_that_systemd_has(monkeypatch, [job, job, {}])
    assert (await host.survey_units({})).jobs == {}
    host = jobs_that_systemd_has(monkeypatch, [job])
    assert (await host.survey_units({})).jobs == job


async def test_the_job_of_the_caller_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    host = jobs_that_systemd_has(monkeypatch, [{"night.service": "start", "kho-handover@a.service": "start"}])
    assert (await host.survey_units({"night.service": "the handover was asked for from there"})).jobs == {}


async def test_a_systemd_that_starts_anew_is_asked_again_to_start_the_units(
    private_socket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon-reexec hangs up on khod; the jobs go on."""
    monkeypatch.setattr(dbus, "RECONNECT_SECONDS", 0.0)
    host = SystemdHost(cast("Any", None), cast("Any", None))
    async with fake_bus(private_socket, a=unit(), b=unit()) as bus:
        bus.manager["SystemState"] = "running"
        bus.result = None
        starting = asyncio.ensure_future(host.start_units(["a.service", "b.service"], DEADLINE))
        await bus.reached.wait()
        bus.result = "done"
        bus.reexec()
        assert await starting == Started()
        assert [bus.state(name, "ActiveState") for name in ("a.service", "b.service")] == ["active", "active"]


@asynccontextmanager
async def at_rest(private_socket: Path) -> AsyncIterator[tuple[SystemdHost, FakeBus]]:
    """Give a host on which a.service was stopped and kept.service was not, and its systemd."""
    host = SystemdHost(cast("Any", None), cast("Any", None))
    async with fake_bus(private_socket, a=unit(), kept=unit()) as bus:
        bus.manager["SystemState"] = "running"
        assert await host.stop_units(["a.service"], {"kept.service": "a test"}, DEADLINE) == ()
        yield host, bus


async def test_a_host_stays_at_rest_until_a_unit_is_started(private_socket: Path) -> None:
    async with at_rest(private_socket) as (host, bus):
        await host.require_rest()
        bus.units |= {"kho-one.service": unit(), "dead.service": unit(ActiveState="failed"), "disk.mount": unit()}
        await host.require_rest()
        bus.units["late.service"] = unit(ActiveState="activating")
        with pytest.raises(Refused, match=r"while the host was stopped: late\.service"):
            await host.require_rest()


async def test_a_oneshot_at_work_is_no_rest(private_socket: Path) -> None:
    async with at_rest(private_socket) as (host, bus):
        bus.units["backup.service"] = unit(Type="oneshot", ActiveState="activating")
        bus.jobs["backup.service"] = "start"
        with pytest.raises(Refused, match=r"while the host was stopped: backup\.service"):
            await host.require_rest()


async def test_a_kept_unit_that_ends_with_the_others_is_in_the_way_and_started_again(private_socket: Path) -> None:
    """It needs one of them, and no setting says so."""
    host = SystemdHost(cast("Any", None), cast("Any", None))
    ended = dict.fromkeys(("kept.service", "getty@tty1.service", "kho-one.service"), "inactive")
    async with fake_bus(private_socket, a=unit(), kept=unit()) as bus:
        bus.manager["SystemState"] = "running"
        bus.units |= {name: unit() for name in ended}
        bus.end_with = ended
        with pytest.raises(Refused, match=r"Was to stay, .*: kept\.service \("):
            await host.stop_units(["a.service"], {"kept.service": "a test"}, DEADLINE)
        assert await host.start_units(["a.service"], DEADLINE) == Started()
        assert bus.state("kept.service", "ActiveState") == "active"


async def test_a_start_is_of_these_units_alone_and_says_what_does_not_run(private_socket: Path) -> None:
    """Seen with systemd 262: the job is done, too, where the conditions do not hold, or the process ends at once."""
    host = SystemdHost(cast("Any", None), cast("Any", None))
    unfit = unit(ConditionResult=False, ActiveState="inactive")
    async with fake_bus(private_socket, a=unit(), b=unit(), c=unit(), unfit=unfit) as bus:
        bus.manager["SystemState"] = "running"
        bus.after_start = {"b.service": "failed", "c.service": "inactive", "unfit.service": "inactive"}
        bus.refusals = {"masked.service": "UnitMasked"}
        names = [*bus.units, "gone.service", "masked.service"]
        assert await host.start_units(names, DEADLINE) == Started(
            {"b.service": "it has failed"},
            {
                "gone.service": "it has gone",
                "masked.service": "it is masked",
                "c.service": "it has ended by itself",
                "unfit.service": "its conditions do not hold",
            },
        )
        assert "StartUnit a.service ignore-requirements" in bus.said
        assert bus.said.index("ResetFailedUnit a.service") < bus.said.index("StartUnit a.service ignore-requirements")


async def test_a_job_that_waits_at_the_jump_is_no_rest(private_socket: Path) -> None:
    async with at_rest(private_socket) as (host, bus):
        bus.jobs["kho-handover@night.service"] = "start"
        bus.jobs["kept.service"] = "start"
        await host.require_rest()
        bus.jobs["waits.service"] = "start"
        with pytest.raises(Refused, match=r"while the host was stopped: waits\.service"):
            await host.require_rest()


async def test_what_had_not_started_in_time_before_has_not_been_killed(private_socket: Path) -> None:
    host = SystemdHost(cast("Any", None), cast("Any", None))
    async with fake_bus(private_socket, a=unit(Result="timeout", ActiveState="activating")) as bus:
        bus.manager["SystemState"] = "running"
        assert await host.stop_units(["a.service"], {}, DEADLINE) == ()


async def test_a_host_that_is_shut_down_does_not_jump(private_socket: Path) -> None:
    async with at_rest(private_socket) as (host, bus):
        bus.manager["SystemState"] = "stopping"
        with pytest.raises(Refused, match="shut the host down"):
            await host.require_rest()


async def test_nothing_jumps_while_logind_does_not_answer(
    private_socket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def is_not_known() -> None:
        return None

    monkeypatch.setattr(logind, "is_shutting_down", is_not_known)
    async with at_rest(private_socket) as (host, _bus):
        with pytest.raises(Refused, match="logind does not say"):
            await host.require_rest()


def test_the_files_of_sessions_may_be_of_any_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "SESSIONS", tmp_path)
    (tmp_path / "1").write_text("UID=0\nSTATE=active\n")
    os.mkfifo(tmp_path / "1.ref")
    (tmp_path / "2").write_text(f"LEADER={os.getpid()}\n")
    service = UnitFacts("login.service", main_pid=os.getpid())
    assert units.find_session_units([service]) == {"login.service": "an operator is logged in by it"}


async def test_nothing_jumps_while_systemd_does_not_answer(
    private_socket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with at_rest(private_socket) as (host, bus):
        bus.instead["Get"] = asyncio.Event()
        monkeypatch.setattr("khod.quiesce.host.REST_SECONDS", 0.001)
        with pytest.raises(Failed, match="no answer"):
            await host.require_rest()


async def test_a_service_that_ends_by_itself_is_waited_for(
    private_socket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no job, and may come back by Restart=."""
    monkeypatch.setattr("khod.quiesce.host.JOB_SECONDS", 0.001)
    host = SystemdHost(cast("Any", None), cast("Any", None))
    async with fake_bus(private_socket, a=unit(ActiveState="deactivating")) as bus:
        assert (await host.survey_units({})).jobs == {"a.service": "stopping"}
        assert (await host.survey_units({"a.serv*": "a test"})).jobs == {}
        bus.instead["ListJobs"] = answers = asyncio.Event()
        survey = asyncio.ensure_future(host.survey_units({}))
        await bus.reached.wait()
        bus.units["a.service"] = unit()
        answers.set()
        assert (await survey).selection.stopped == ("a.service",)


@in_virtual_time
async def test_a_jump_at_once_and_a_load_stop_nothing(host: VirtualHost) -> None:
    engine = await host.started()
    await host.kexec(engine, load_only=True)
    with pytest.raises(Rebooted):
        await engine.kexec(Request(now=True))
    assert around(host).asked == []


@in_virtual_time
async def test_files_that_a_service_stores_in_its_stop_leave_the_jump_to_systemd(host: VirtualHost) -> None:
    async def systemctl_kexec() -> None:
        assert engine.record.at_once is False
        raise Failed("systemctl kexec was asked")

    engine = await host.started(orderly=systemctl_kexec)
    around(host).stores = ("store.service",)
    with pytest.raises(Failed, match="systemctl kexec was asked"):
        await host.kexec(engine)
    assert around(host).running == {*UNITS}


@in_virtual_time
async def test_the_units_of_producers_and_of_the_configuration_are_kept(host: VirtualHost) -> None:
    engine = await host.started()
    producer = Scripted(host, "one")
    producer.units = ("db.service",)
    await engine.queries.check(Request())
    assert around(host).keep == {"db.service": "producer one needs it"}


@pytest.mark.parametrize("phase", [Phase.quiescing, Phase.quiesced, Phase.frozen, Phase.rolling_back, Phase.executing])
@in_virtual_time
async def test_the_next_khod_starts_what_a_dead_one_had_stopped(host: VirtualHost, phase: Phase) -> None:
    engine = await host.started()
    await host.kexec(engine, load_only=True)
    done = (*engine.machine.done, Step.quiesce)
    if phase in (Phase.frozen, Phase.executing):
        done = (*done, Step.freeze)
    if phase is Phase.executing:
        done = (*done, Step.execute)
    record = engine.record
    host.store.write(replace(record, phase=phase, done=done, quiesced=UNITS))
    around(host).running.clear()
    with pytest.raises(KhoError):
        await host.engine().start()
    assert around(host).running == {*UNITS}
    found = host.store.read()
    assert found is not None
    assert (found.phase, found.quiesced) == (Phase.idle, ())


def test_the_unit_of_whoever_listens_at_a_socket_is_known(tmp_path: Path) -> None:
    path = str(tmp_path / "qmp")
    assert find_units_listening(path) == []
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        assert find_units_listening(path) == [], "nobody listens yet"
        listening.listen()
        assert find_units_listening(path) == units_in(Path("/proc/self/cgroup").read_text())


@in_virtual_time
async def test_a_vm_s_qemu_keeps_its_unit(host: VirtualHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "find_units_listening", lambda path: [f"{path}.service"])
    engine = await host.started()
    host.hooks.append(Qemu("guest", socket="one"))
    await engine.queries.check(Request())
    assert around(host).keep == {"one.service": "producer guest needs it"}
