# SPDX-License-Identifier: LGPL-2.1-or-later
"""The unit producer against a bus that answers, refuses, lies, hangs and hangs up; nothing of it may be left behind."""

import asyncio
import os
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, cast

import pytest
from jeepney import new_signal

from khod.errors import ConfigError, UsageError
from khod.handover.record import ProducerRecord
from khod.producers.barrier import (
    GONE,
    NOT_RECORDED,
    Barrier,
    Participant,
    ParticipantVeto,
    PriorCall,
    ProducerCall,
    Verb,
)
from khod.producers.children import Children
from khod.producers.hooks import Hook
from khod.producers.peers import Peers
from khod.producers.registry import ProducerRegistry
from khod.producers.sessions import Sessions
from khod.producers.unit import OURS, UNTOUCHED, Unit, check_unit
from khod.systemd import dbus
from khod.systemd.dbus import Bus, BusError
from khod.systemd.manager import STOPPED_TOO
from tests.unit.fakebus import MANAGER, FakeBus, Refusal, fake_bus, unit

Props = dict[str, tuple[str, Any]]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where khod looks for the bus in this test."""
    path = tmp_path / "bus"
    monkeypatch.setattr(dbus, "PRIVATE_SOCKET", str(path))
    return path


@asynccontextmanager
async def serving(place: Path, **units: Props) -> AsyncIterator[FakeBus]:
    """Serve these units; at the end no task and no descriptor of khod's may be left, or the deadline passes."""
    async with fake_bus(place, **units) as bus:
        tasks, descriptors = asyncio.all_tasks(), len(os.listdir("/proc/self/fd"))
        yield bus
        while bus.open:
            await bus.closed.wait()
            await asyncio.sleep(0)
        for task in bus.tasks:
            task.cancel()
        await asyncio.gather(*bus.tasks, return_exceptions=True)
        left = [task for task in asyncio.all_tasks() - tasks if "FakeBus" not in repr(task)]
        assert not left
        while len(os.listdir("/proc/self/fd")) > descriptors:  # noqa: ASYNC110 - the bus's own end has no event
            await asyncio.sleep(0)


async def tell(verb: Verb, note: str = "", how: str = "freeze") -> str:
    """Tell a.service a verb; its note after that."""
    telling = ProducerCall(verb, "run-1", note)
    await Unit("a", unit="a.service", how=how, runner=Children()).carry_out(telling)
    return telling.note


async def vetoed(verb: Verb, note: str = "", how: str = "freeze") -> tuple[str, str]:
    """Tell a.service a verb that it refuses: the reason, one line, and the note it leaves. No thaw is tried again."""
    telling = ProducerCall(verb, "run-1", note)
    with pytest.raises(ParticipantVeto) as veto:
        await Unit("a", 0, unit="a.service", how=how, runner=Children()).carry_out(telling)
    reason = str(veto.value)
    assert reason
    assert reason.isprintable()
    return reason, telling.note


@pytest.mark.parametrize(
    ("how", "frozen", "thawed", "key"),
    [
        ("freeze", "frozen", "running", "FreezerState"),
        ("stop", "inactive", "active", "ActiveState"),
    ],
)
async def test_a_handover_called_off(place: Path, how: str, frozen: str, thawed: str, key: str) -> None:
    async with serving(place, a=unit()) as bus:
        note = await tell(Verb.prepare, how=how)
        assert bus.state("a.service", key) == thawed
        note = await tell(Verb.freeze, note, how)
        assert bus.state("a.service", key) == frozen
        await tell(Verb.thaw, note, how)
        assert bus.state("a.service", key) == thawed
        await tell(Verb.cancel, note, how)


@pytest.mark.parametrize("how", ["freeze", "stop"])
@pytest.mark.parametrize("now", [Unit("a", unit="b.service"), Unit("a", unit="b.service", how="stop"), Unit("a")])
async def test_what_was_prepared_is_frozen_and_undone_whatever_its_file_says_since(
    place: Path, how: str, now: Unit
) -> None:
    async with serving(place, a=unit(), b=unit()) as bus:
        note = await tell(Verb.prepare, how=how)
        for verb in (Verb.freeze, Verb.thaw):
            telling = ProducerCall(verb, "run-1", note)
            await now.carry_out(telling)
            assert telling.note == note, "a khod that dies in between has what prepare left"
            assert (bus.units["a.service"] == unit()) is (verb is Verb.thaw)
            assert bus.units["b.service"] == unit()


async def test_the_note_of_a_khod_that_wrote_less_is_understood(place: Path) -> None:
    async with serving(place, a=unit(FreezerState="frozen"), b=unit(ActiveState="inactive")) as bus:
        await Unit("a", unit="a.service").carry_out(ProducerCall(Verb.thaw, "run-1", "running"))
        await Unit("b", unit="b.service", how="stop").carry_out(ProducerCall(Verb.thaw, "run-1", "running"))
        assert bus.state("a.service", "FreezerState") == "running"
        assert bus.state("b.service", "ActiveState") == "active"


async def test_a_note_that_says_something_else_is_a_veto(place: Path) -> None:
    async with serving(place, a=unit(FreezerState="frozen")):
        assert "its note is 'running away'" in (await vetoed(Verb.thaw, "running away"))[0]


async def test_making_way_kills_what_was_prepared(place: Path) -> None:
    async with serving(place, a=unit(), b=unit()) as bus:
        bus.instead["KillUnit"] = (None, ())
        note = await tell(Verb.prepare)
        await Unit("a", unit="b.service", how="stop").make_way(note)
        assert [words for words in bus.said if words.startswith("KillUnit")] == ["KillUnit a.service all"]


@pytest.mark.parametrize(
    "files",
    [[], [Unit("a", unit="b.service")], [Hook("a")], ConfigError("no TOML", where="a.toml")],
    ids=["gone", "another-unit", "a-hook", "unreadable"],
)
async def test_a_khod_that_comes_back_thaws_what_its_record_names(
    place: Path, files: list[Participant] | ConfigError
) -> None:
    def read() -> list[Participant]:
        if isinstance(files, ConfigError):
            raise files
        return files

    async with serving(place, a=unit(), b=unit()) as bus:
        note = await tell(Verb.freeze, await tell(Verb.prepare))
        holder = ProducerRecord("a", "unit", "freeze", note)
        nobody = Peers(cast("Sessions", None), lambda _peer: None, lambda _peer: None)
        registry = ProducerRegistry(read, nobody)
        barrier = registry.resume_barrier("run-1", lambda _member: None, [holder], None)
        assert await barrier.undo_verb(Verb.freeze) == []
        assert bus.units["a.service"] == bus.units["b.service"] == unit()


@pytest.mark.parametrize("verb", [Verb.cancel, Verb.restore, Verb.finish])
async def test_the_next_kernel_starts_units_by_itself(place: Path, verb: Verb) -> None:
    async with serving(place, a=unit()) as bus:
        await tell(verb, OURS)
        assert not bus.said


@pytest.mark.parametrize("how", ["freeze", "stop"])
@pytest.mark.parametrize(
    "properties",
    [
        unit(ActiveState="inactive"),
        unit(ActiveState="failed"),
        unit(ActiveState="inactive", LoadState="masked"),
        unit(FreezerState="frozen"),
        unit(FreezerState="frozen-by-parent"),
    ],
    ids=["inactive", "failed", "masked", "frozen", "by-parent"],
)
async def test_what_is_at_rest_already_is_left_as_it_is(place: Path, how: str, properties: Props) -> None:
    async with serving(place, a=dict(properties)) as bus:
        note = await tell(Verb.prepare, how=how)
        assert note != OURS
        assert await tell(Verb.freeze, note, how) == note
        await tell(Verb.thaw, note, how)
        assert set(said(bus)) <= {"LoadUnit", "GetAll"}


def said(bus: FakeBus) -> list[str]:
    return [words.split()[0] for words in bus.said]


@pytest.mark.parametrize(
    ("how", "properties", "reason"),
    [
        ("freeze", unit(LoadState="not-found", ActiveState="inactive"), "not-found"),
        ("freeze", unit(LoadState="bad-setting", ActiveState="inactive"), "bad-setting"),
        ("freeze", unit(ActiveState="activating"), "activating"),
        ("freeze", unit(FreezerState="freezing"), "freezing"),
        ("freeze", unit(CanFreeze=False), "cannot be frozen"),
        ("freeze", unit(Names=["a.service", "dbus-broker.service"]), "dbus-broker.service"),
        ("stop", unit(CanStop=False), "cannot be stopped"),
        ("stop", unit(CanStart=False), "cannot be stopped"),
        ("stop", unit(Transient=True), "transient"),
    ],
)
async def test_prepare_refuses_what_could_not_be_done_or_undone(
    place: Path, how: str, properties: Props, reason: str
) -> None:
    async with serving(place, a=properties):
        assert reason in (await vetoed(Verb.prepare, how=how))[0]


@pytest.mark.parametrize("who", ["khod", "bus"])
async def test_a_unit_that_holds_khod_or_the_bus_is_refused(place: Path, who: str) -> None:
    async with serving(place, a=unit()) as bus:
        bus.processes = [1000, {"khod": os.getpid(), "bus": 400}[who]]
        assert "holds khod" in (await vetoed(Verb.prepare))[0]


@pytest.mark.parametrize("how", ["freeze", "stop"])
async def test_a_unit_that_goes_in_between(place: Path, how: str) -> None:
    async with serving(place, a=unit()) as bus:
        note = await tell(Verb.prepare, how=how)
        del bus.units["a.service"]
        reason, note = await vetoed(Verb.freeze, note, how)
        assert "not-found" in reason
        await tell(Verb.thaw, note, how)


async def test_a_unit_that_died_while_it_was_frozen_is_not_put_back(place: Path) -> None:
    async with serving(place, a=unit(ActiveState="failed", FreezerState="frozen")) as bus:
        assert "died while it was frozen" in (await vetoed(Verb.thaw, OURS))[0]
        bus.units["a.service"] = unit(ActiveState="failed")
        await tell(Verb.thaw, OURS)


async def test_a_unit_that_goes_while_it_is_frozen_is_thawed(place: Path) -> None:
    async with serving(place) as bus:
        await tell(Verb.thaw, OURS)
        assert "ThawUnit a.service" not in bus.said


def control_group(monkeypatch: pytest.MonkeyPatch, root: Path, below: str = "system.slice/a.service") -> Path:
    """Make a frozen control group below this root, which stands for the cgroup file system: its cgroup.freeze."""
    monkeypatch.setattr("khod.producers.freezer.CGROUPS", str(root))
    (root / below).mkdir(parents=True)
    freezer = root / below / "cgroup.freeze"
    freezer.write_text("1")
    return freezer


@pytest.mark.parametrize("load", ["not-found", "masked", "bad-setting"])
async def test_a_frozen_unit_whose_file_is_gone_or_masked_is_thawed_by_its_control_group(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: str
) -> None:
    freezer = control_group(monkeypatch, tmp_path)
    async with serving(place, a=unit()) as bus:
        note = await tell(Verb.freeze, await tell(Verb.prepare))
        bus.units["a.service"] |= unit(LoadState=load, FreezerState="frozen")
        await tell(Verb.thaw, note)
        assert freezer.read_text() == "0"


async def test_a_control_group_is_systemds_while_systemd_thaws_it(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    freezer = control_group(monkeypatch, tmp_path)
    async with serving(place, a=unit()):
        await tell(Verb.thaw, await tell(Verb.freeze, await tell(Verb.prepare)))
        assert freezer.read_text() == "1", "this systemd thaws nothing of the kernel's"


async def tell_slice(verb: Verb, note: str = "") -> str:
    """Tell my.slice a verb; its note after that, also where it refuses to be frozen."""
    telling = ProducerCall(verb, "run-1", note)
    with suppress(ParticipantVeto) if verb is Verb.freeze else nullcontext():
        await Unit("mine", 0, unit="my.slice", runner=Children()).carry_out(telling)
    return telling.note


BUSY = Refusal("org.freedesktop.systemd1.UnitBusy", "Unit has a pending job")


async def test_a_slice_whose_freeze_failed_half_way_is_thawed(place: Path) -> None:
    """systemd#25662, #32009: the units it had come to are frozen, and its own FreezerState is `running`."""
    async with serving(place) as bus:
        bus.units["my.slice"] = unit(Names=["my.slice"])
        bus.instead["FreezeUnit"] = BUSY
        note = await tell_slice(Verb.freeze, await tell_slice(Verb.prepare))
        await tell_slice(Verb.thaw, note)
        assert bus.said[-2:] == ["LoadUnit my.slice", "GetAll org.freedesktop.systemd1.Unit"]
        assert "ThawUnit my.slice" in bus.said


async def test_a_half_frozen_slice_that_systemd_does_not_thaw_is_thawed_unit_by_unit(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "cgroup"
    ours = ["my.slice", "my.slice/a.service", "my.slice/my-b.slice", "my.slice/my-b.slice/c.scope"]
    others = ["my.slice/a.service/payload", "my.slice/a.service/b.service", "my.slice/x", "other.slice/d.service"]
    for group in sorted([*ours, *others, "other.slice"]):
        control_group(monkeypatch, root, group)
    (root / "my.slice/e.service").symlink_to(root / "other.slice/d.service")
    (root / "my.slice/ending.service").mkdir()
    async with serving(place) as bus:
        bus.units["my.slice"] = unit(Names=["my.slice"])
        bus.instead["FreezeUnit"] = bus.instead["ThawUnit"] = BUSY
        await tell_slice(Verb.thaw, await tell_slice(Verb.freeze, await tell_slice(Verb.prepare)))
    thawed = {str(path.parent.relative_to(root)) for path, state in freezers(root).items() if state == "0"}
    assert thawed == set(ours)


async def test_a_half_frozen_slice_that_nothing_thaws_is_a_veto(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("khod.producers.freezer.CGROUPS", str(tmp_path / "none"))
    async with serving(place) as bus:
        bus.units["my.slice"] = unit(Names=["my.slice"])
        bus.instead["FreezeUnit"] = bus.instead["ThawUnit"] = BUSY
        note = await tell_slice(Verb.freeze, await tell_slice(Verb.prepare))
        with pytest.raises(ParticipantVeto, match="pending job"):
            await tell_slice(Verb.thaw, note)


@pytest.mark.parametrize("now", [unit(ActiveState="inactive"), unit(FreezerState="frozen-by-parent")])
async def test_a_slice_that_has_ended_or_that_another_holds_frozen_is_left_to_that(place: Path, now: Props) -> None:
    async with serving(place) as bus:
        bus.units["my.slice"] = unit(Names=["my.slice"])
        bus.instead["FreezeUnit"] = BUSY
        note = await tell_slice(Verb.freeze, await tell_slice(Verb.prepare))
        bus.units["my.slice"] = now
        await tell_slice(Verb.thaw, note)
        assert "ThawUnit my.slice" not in bus.said


def freezers(root: Path) -> dict[Path, str]:
    return {path: path.read_text() for path in root.rglob("cgroup.freeze")}


@pytest.mark.parametrize(
    "group", ["", "/", "/system.slice/gone.service", "/../outside", "/link", "/file", "/system.slice"]
)
async def test_no_file_is_written_but_that_of_a_control_group_that_is_there(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: str
) -> None:
    control_group(monkeypatch, tmp_path / "outside", ".")
    control_group(monkeypatch, tmp_path / "cgroup")
    (tmp_path / "cgroup/cgroup.freeze").write_text("1")
    (tmp_path / "cgroup/link").symlink_to(tmp_path / "outside")
    (tmp_path / "cgroup/file").touch()
    before = freezers(tmp_path)
    async with serving(place, a=unit(LoadState="masked", FreezerState="frozen")):
        assert "not active" in (await vetoed(Verb.thaw, f"running freeze a.service {group}"))[0]
    assert freezers(tmp_path) == before


@pytest.mark.parametrize("how", ["freeze", "stop"])
@pytest.mark.parametrize(
    ("prepared", "now"),
    [
        (OURS, unit(ActiveState="inactive")),
        (OURS, unit(FreezerState="frozen")),
        (OURS, unit(ActiveState="deactivating")),
        ("inactive", unit()),
        ("frozen", unit()),
    ],
)
async def test_what_somebody_else_changed_since_prepare_is_a_veto_and_stays_theirs(
    place: Path, how: str, prepared: str, now: Props
) -> None:
    async with serving(place, a=dict(now)) as bus:
        _, note = await vetoed(Verb.freeze, prepared, how)
        await tell(Verb.thaw, note, how)
        assert bus.units["a.service"] == now
        assert set(said(bus)) <= {"LoadUnit", "GetAll"}


async def test_a_freeze_that_is_answered_and_did_not_happen(place: Path) -> None:
    async with serving(place, a=unit()) as bus:
        bus.becomes["FreezeUnit"] = "freezing"
        reason, note = await vetoed(Verb.freeze, OURS)
        assert "freezing" in reason
        await tell(Verb.thaw, note)
        assert bus.state("a.service", "FreezerState") == "running"


async def test_a_thaw_that_is_answered_and_did_not_happen(place: Path) -> None:
    async with serving(place, a=unit(FreezerState="frozen")) as bus:
        bus.becomes["ThawUnit"] = "thawing"
        assert "thawing" in (await vetoed(Verb.thaw, OURS))[0]


LOST: dict[str, Refusal | bytes] = {
    "hangs-up": b"",
    "no-reply": Refusal("org.freedesktop.DBus.Error.NoReply", "recipient disconnected"),
    "nobody": Refusal("org.freedesktop.DBus.Error.NameHasNoOwner", "nobody has that name"),
    "no-service": Refusal("org.freedesktop.DBus.Error.ServiceUnknown", "nobody provides it"),
    "not-started": Refusal("org.freedesktop.DBus.Error.Spawn.ChildExited", "it is /bin/false"),
}


@pytest.mark.parametrize("how", ["freeze", "stop"])
@pytest.mark.parametrize("method", ["LoadUnit", "GetAll", "act"])
@pytest.mark.parametrize("lost", LOST)
async def test_a_thaw_in_which_systemd_starts_anew_is_told_once_more(
    place: Path, monkeypatch: pytest.MonkeyPatch, how: str, method: str, lost: str
) -> None:
    monkeypatch.setattr("khod.producers.unit.RETRY_SECONDS", 0)
    async with ready_for(place, Verb.thaw, how) as bus:
        method = {"freeze": "ThawUnit", "stop": "StartUnit"}[how] if method == "act" else method
        bus.instead[method] = LOST[lost]
        reasons: list[str] = []

        def not_yet(reason: str, _progress: float | None) -> None:
            if "connects again" in reason:
                bus.instead.clear()
                reasons.append(reason)

        await Unit("a", unit="a.service", how=how).carry_out(ProducerCall(Verb.thaw, "run-1", OURS, not_yet))
        assert len(reasons) == 1
        assert bus.units["a.service"] == unit()


async def test_a_start_whose_systemd_starts_anew_is_asked_for_once_more(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hangs up, and says nothing more of the end of the job."""
    monkeypatch.setattr("khod.producers.unit.RETRY_SECONDS", 0)
    async with ready_for(place, Verb.thaw, "stop") as bus:
        bus.result = None
        thaw = asyncio.ensure_future(tell(Verb.thaw, OURS, "stop"))
        await bus.reached.wait()
        bus.result = "done"
        bus.reexec()
        await thaw
        assert bus.state("a.service", "ActiveState") == "active"


@pytest.mark.parametrize("verb", [Verb.prepare, Verb.freeze])
async def test_only_a_thaw_is_told_once_more(place: Path, verb: Verb) -> None:
    async with serving(place, a=unit()) as bus:
        bus.instead["LoadUnit"] = b""
        with pytest.raises(ParticipantVeto, match="hung up"):
            await tell(verb, OURS)
        assert said(bus).count("LoadUnit") == 1


@pytest.mark.parametrize("result", ["failed", "timeout", "canceled"])
async def test_a_stop_that_does_not_end_well(place: Path, result: str) -> None:
    async with serving(place, a=unit()) as bus:
        bus.result = result
        reason, note = await vetoed(Verb.freeze, OURS, "stop")
        assert result in reason
        await tell(Verb.thaw, note, "stop")
        assert bus.state("a.service", "ActiveState") == "active"


async def test_a_unit_that_starts_again_at_once_is_not_stopped(place: Path) -> None:
    async with serving(place, a=unit()) as bus:
        bus.becomes["StopUnit"] = "activating"
        assert "activating" in (await vetoed(Verb.freeze, OURS, "stop"))[0]


async def test_a_start_that_does_not_end_well(place: Path) -> None:
    async with serving(place, a=unit(ActiveState="inactive")) as bus:
        bus.result, bus.becomes["StartUnit"] = "failed", "failed"
        assert "failed" in (await vetoed(Verb.thaw, OURS, "stop"))[0]


async def test_a_stop_replaces_no_job_of_somebody_else_a_start_replaces_our_own(place: Path) -> None:
    async with serving(place, a=unit()) as bus:
        await tell(Verb.freeze, OURS, "stop")
        await tell(Verb.thaw, OURS, "stop")
        assert "StopUnit a.service fail" in bus.said
        assert "StartUnit a.service replace" in bus.said


@pytest.mark.parametrize("key", STOPPED_TOO)
async def test_a_unit_that_would_stop_too_is_a_veto_unless_it_has_stopped(place: Path, key: str) -> None:
    async with serving(place, a=unit(**{key: ["b.service"]}), b=unit()) as bus:
        reason, note = await vetoed(Verb.freeze, OURS, "stop")
        assert "b.service" in reason
        assert note != OURS
        bus.units["b.service"] = unit(ActiveState="inactive")
        await tell(Verb.freeze, OURS, "stop")
        assert "StopUnit a.service fail" in bus.said


async def cut_short(bus: FakeBus, verb: Verb, how: str = "freeze") -> str:
    """Tell a verb, and call it off where the bus answers otherwise than usual; its note."""
    telling = ProducerCall(verb, "run-1", OURS)
    task = asyncio.ensure_future(Unit("a", unit="a.service", how=how).carry_out(telling))
    await bus.reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    bus.reached.clear()
    return telling.note


async def test_a_freeze_cut_short_has_been_taken_up_before_its_undo_is_told(place: Path) -> None:
    async with serving(place, a=unit()) as bus:
        late = bus.instead["FreezeUnit"] = asyncio.Event()
        note = await cut_short(bus, Verb.freeze)
        assert said(bus)[-2:] == ["FreezeUnit", "Ping"]
        bus.units["a.service"] = unit(FreezerState="freezing")
        await tell(Verb.thaw, note)
        assert bus.state("a.service", "FreezerState") == "running"
        late.set()


async def test_a_systemd_that_stands_still_holds_no_abort_up(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("khod.systemd.manager.SETTLE_SECONDS", 0.01)
    async with serving(place, a=unit()) as bus:
        bus.instead = {method: asyncio.Event() for method in ("FreezeUnit", "Ping")}
        assert await cut_short(bus, Verb.freeze) == OURS


async def test_a_stop_cut_short_is_taken_back_while_its_job_runs(place: Path) -> None:
    async with serving(place, a=unit()) as bus:
        bus.result = None
        note = await cut_short(bus, Verb.freeze, "stop")
        assert bus.state("a.service", "ActiveState") == "deactivating"
        bus.result = "done"
        await tell(Verb.thaw, note, "stop")
        assert bus.state("a.service", "ActiveState") == "active"


@pytest.mark.parametrize("method", ["LoadUnit", "GetAll"])
@pytest.mark.parametrize("verb", [Verb.prepare, Verb.freeze, Verb.thaw])
async def test_cut_short_anywhere_it_hangs_up_and_leaves_nothing(place: Path, verb: Verb, method: str) -> None:
    async with serving(place, a=unit()) as bus:
        bus.instead[method] = asyncio.Event()
        await cut_short(bus, verb)
        assert "FreezeUnit a.service" not in bus.said


async def test_a_stop_job_not_yet_begun_is_replaced(place: Path) -> None:
    async with serving(place, a=unit(Job=(7, "/job/7"))) as bus:
        await tell(Verb.thaw, OURS, "stop")
        assert "StartUnit a.service replace" in bus.said


async def test_a_unit_that_is_active_already_is_not_started(place: Path) -> None:
    async with serving(place, a=unit()) as bus:
        await tell(Verb.thaw, OURS, "stop")
        assert "StartUnit a.service replace" not in bus.said


GARBAGE = b"\xff" * 64
HUGE = b"l\x02\x01\x01" + struct.pack("<III", 0xFFFFFFF0, 1, 0)
# A return whose body, of type s, claims more bytes than there are.
TRUNCATED = b"l\x02\x01\x01" + struct.pack("<III", 8, 1, 15) + b"\5\1u\0\2\0\0\0\x08\1g\0\1s\0\0\xf0\0\0\0abcd"
CALLS = [(Verb.prepare, "freeze", method) for method in ("LoadUnit", "GetAll", "GetUnitProcesses", "Get")] + [
    (Verb.freeze, "freeze", "FreezeUnit"),
    (Verb.thaw, "freeze", "ThawUnit"),
    (Verb.freeze, "stop", "StopUnit"),
    (Verb.thaw, "stop", "StartUnit"),
]


@asynccontextmanager
async def ready_for(place: Path, verb: Verb, how: str) -> AsyncIterator[FakeBus]:
    """Serve a.service as it stands when this verb comes."""
    thaw = unit(FreezerState="frozen") if how == "freeze" else unit(ActiveState="inactive")
    async with serving(place, a=thaw if verb is Verb.thaw else unit()) as bus:
        yield bus


@pytest.mark.parametrize(("verb", "how", "method"), CALLS)
@pytest.mark.parametrize(
    ("instead", "reason"),
    [
        (Refusal("org.freedesktop.systemd1.UnitBusy", "Unit has a pending job.\nWait."), "pending job"),
        (Refusal("org.freedesktop.DBus.Error.NoReply", ""), "org.freedesktop.DBus.Error.NoReply"),
        (b"", "hung up"),
        (GARBAGE, "not a D-Bus message"),
        (HUGE, "not a D-Bus message"),
    ],
    ids=["error", "no-text", "hangs-up", "garbage", "huge"],
)
async def test_whatever_the_bus_does_is_a_veto(
    place: Path, verb: Verb, how: str, method: str, instead: Any, reason: str
) -> None:
    async with ready_for(place, verb, how) as bus:
        bus.instead[method] = instead
        assert reason in (await vetoed(verb, OURS, how))[0]


@pytest.mark.parametrize("method", ["LoadUnit", "GetAll", "GetUnitProcesses", "Get"])
@pytest.mark.parametrize(
    "instead",
    [(None, ()), ("i", (7,)), ("as", (["x"],)), ("v", (("i", 7),))],
    ids=["nothing", "i", "as", "v"],
)
async def test_another_type_than_documented_is_a_veto(place: Path, method: str, instead: Any) -> None:
    async with serving(place, a=unit()) as bus:
        bus.instead[method] = instead
        assert "another type" in (await vetoed(Verb.prepare))[0]


@pytest.mark.parametrize("key", ["LoadState", "ActiveState", "FreezerState", "CanFreeze", "Job", "Names"])
async def test_a_property_that_is_missing_or_of_another_type_is_a_veto(place: Path, key: str) -> None:
    async with serving(place, a=unit(**{key: 7})) as bus:
        assert key in (await vetoed(Verb.prepare))[0]
        del bus.units["a.service"][key]
        assert key in (await vetoed(Verb.prepare))[0]


async def test_a_message_cut_off_within_is_a_veto(place: Path) -> None:
    async with serving(place, a=unit()) as bus:
        bus.instead["LoadUnit"] = TRUNCATED
        assert "not a D-Bus message" in (await vetoed(Verb.prepare))[0]


@pytest.mark.parametrize("welcome", [b"REJECTED EXTERNAL\r\n", b"\r\n", b"x" * 9000, b"OK 1\r\nOK 2\r\n" + b"x" * 1024])
async def test_a_bus_that_does_not_let_us_in_is_a_veto(place: Path, welcome: bytes) -> None:
    async with serving(place, a=unit()) as bus:
        bus.welcome = welcome
        assert "let khod in" in (await vetoed(Verb.prepare))[0]


async def test_what_systemd_says_at_once_is_no_part_of_its_welcome(place: Path) -> None:
    async with serving(place, a=unit()) as bus:
        bus.welcome += new_signal(MANAGER, "UnitNew", "so", ("b.service", "/unit/b")).serialise(serial=1)
        await tell(Verb.prepare)


async def test_a_bus_that_is_not_there_is_a_veto(place: Path) -> None:
    assert str(place) in (await vetoed(Verb.prepare))[0]


async def test_an_address_that_is_no_socket_is_a_veto(monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (f"/{'x' * 200}", "/dev/null", "/nonsense\0"):
        monkeypatch.setattr(dbus, "PRIVATE_SOCKET", path)
        assert "systemd cannot be reached" in (await vetoed(Verb.prepare))[0]


@pytest.mark.parametrize(
    "address", ["nonsense", "unix:", "tcp:host=localhost,port=1", f"unix:path=/{'x' * 200}", "unix:path=/dev/null"]
)
async def test_an_address_that_is_no_message_bus_is_an_error(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", address)
    with pytest.raises(BusError):
        async with dbus.system_bus():
            pass


async def test_a_bus_at_which_too_many_wait_is_waited_for(place: Path) -> None:
    """To asyncio's own connect it would look connected."""
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(str(place))
        listener.listen(0)
        first.connect(str(place))
        telling = asyncio.ensure_future(vetoed(Verb.prepare))
        for _turn in range(10):
            await asyncio.sleep(0)
        assert not telling.done()
        listener.accept()[0].close()
        listener.setblocking(False)
        taken, _ = await asyncio.get_running_loop().sock_accept(listener)
        taken.close()
        assert "systemd h" in (await telling)[0], "hung up, or has gone"


async def test_a_verb_that_cannot_be_cut_short_is_left_to_itself(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("khod.concurrency.bounded.CUT_SECONDS", 0.05)
    ended = asyncio.Event()
    cancelled: list[Verb] = []

    async def stubborn(_bus: Bus, *_call: object) -> None:
        while not ended.is_set():
            try:
                await ended.wait()
            except asyncio.CancelledError:
                cancelled.append(Verb.thaw)
        raise ParticipantVeto("too late")

    monkeypatch.setattr(Bus, "call_method", stubborn)
    async with serving(place, a=unit()):
        told = {"a": PriorCall(Verb.freeze, OURS)}
        barrier = Barrier.from_producers([Unit("a", 0.1, unit="a.service")], "run-1", lambda _member: None, told)
        ((name, error),) = await barrier.undo_verb(Verb.freeze)
        assert (name, cancelled) == ("a", [Verb.thaw]), "it is cancelled once, and left to clean up"
        assert "did not answer thaw within 0.1 s, and it cannot be cut short" in str(error)
        ended.set()
        await asyncio.sleep(0)


async def test_a_verb_that_is_cancelled_from_within_is_a_veto(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def cancelled(_bus: Bus, *_call: object) -> None:
        raise asyncio.CancelledError

    monkeypatch.setattr(Bus, "call_method", cancelled)
    async with serving(place, a=unit()):
        assert "cancelled from within" in (await vetoed(Verb.freeze, OURS))[0]


@pytest.mark.parametrize("how", ["freeze", "stop"])
@pytest.mark.parametrize("state", ["running", "frozen", "inactive"])
async def test_without_a_record_a_unit_is_thawed_that_systemd_says_is_frozen(place: Path, how: str, state: str) -> None:
    """Whether a unit at rest was stopped by khod nobody knows: it is not started, and that is said."""
    found = unit(ActiveState="inactive") if state == "inactive" else unit(FreezerState=state)
    async with serving(place, a=dict(found), b=unit(FreezerState="frozen")) as bus:
        nobody = Peers(cast("Sessions", None), lambda _peer: None, lambda _peer: None)
        registry = ProducerRegistry(lambda: [Unit("a", unit="a.service", how=how)], nobody)
        barrier = registry.resume_barrier("", lambda _member: None, (), Verb.freeze)
        assert await barrier.undo_verb(Verb.freeze) == []
        assert bus.units["a.service"] == (found if state == "inactive" else unit())
        (member,) = barrier.members
        left = how == "stop" and state == "inactive"
        assert (member.answer, member.gone) == ((GONE, True) if left else ("ready", False))
        assert bus.state("b.service", "FreezerState") == "frozen", "no producer names it"


@pytest.mark.parametrize("note", ["", "frozen", "inactive", UNTOUCHED])
async def test_what_somebody_else_has_frozen_stays_frozen_where_there_is_a_record(place: Path, note: str) -> None:
    async with serving(place, a=unit(FreezerState="frozen")) as bus:
        nobody = Peers(cast("Sessions", None), lambda _peer: None, lambda _peer: None)
        registry = ProducerRegistry(lambda: [Unit("a", unit="a.service")], nobody)
        barrier = registry.resume_barrier(
            "run-1", lambda _member: None, [ProducerRecord("a", "unit", "", note)], Verb.freeze
        )
        assert await barrier.undo_verb(Verb.freeze) == []
        assert bus.state("a.service", "FreezerState") == "frozen"
        # A record in which nobody stands is one, too: this file came later.
        barrier = registry.resume_barrier("run-1", lambda _member: None, (), Verb.freeze)
        assert await barrier.undo_verb(Verb.freeze) == []
        assert bus.state("a.service", "FreezerState") == "frozen"


async def test_without_a_record_a_masked_unit_is_thawed_by_the_control_group_it_has(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    freezer = control_group(monkeypatch, tmp_path)
    async with serving(place, a=unit(LoadState="masked", FreezerState="frozen")):
        await tell(Verb.thaw, NOT_RECORDED)
        assert freezer.read_text() == "0"


@pytest.mark.parametrize("verb", [Verb.freeze, None], ids=["verb", "leave"])
async def test_a_surprise_is_a_veto(place: Path, monkeypatch: pytest.MonkeyPatch, verb: Verb | None) -> None:
    async def surprise(_bus: Bus, *_call: object) -> None:
        raise RuntimeError("what nobody expected")

    monkeypatch.setattr(Bus, "call_method", surprise)
    async with serving(place, a=unit()):
        if verb:
            assert "what nobody expected" in (await vetoed(verb, OURS))[0]
        else:
            with pytest.raises(ParticipantVeto, match="what nobody expected"):
                await Unit("a", unit="a.service").make_way(OURS)


@pytest.mark.parametrize("job", [("u", (7,)), (None, ())], ids=["u", "nothing"])
async def test_a_job_of_another_type_is_a_veto(place: Path, job: Any) -> None:
    async with serving(place, a=unit()) as bus:
        bus.instead["StopUnit"] = job
        assert "another type" in (await vetoed(Verb.freeze, OURS, "stop"))[0]


@pytest.mark.parametrize(
    "name", ["a.service", "a@b.service", "my.slice", "session-1.scope", r"dev-disk-by\x2duuid.swap", "A:b_c.mount"]
)
def test_names_of_units(name: str) -> None:
    check_unit(name)


@pytest.mark.parametrize(
    "name",
    [
        *("", "a", ".service", "a.conf", "a/b.service", "a.service\n", "a\0.service", "é.service", "a b.service"),
        *("a@.service", "@b.service", "x" * 248 + ".service"),
    ],
)
def test_what_is_no_name_of_a_unit(name: str) -> None:
    with pytest.raises(UsageError, match="not a valid name of a unit"):
        check_unit(name)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "init.scope",
            "-.slice",
            "system.slice",
            "kho.slice",
            "-.mount",
            "dbus.service",
            "dbus.socket",
            "dbus-broker.service",
        ),
        *(
            "kho-handover.service",
            "kho-handover@x.service",
            "kho-after@x.service",
            "kho-verify.service",
            "kho-hooks.service",
            "kho-sessions.socket",
        ),
        *(
            "systemd-journald.service",
            "systemd-journald-dev-log.socket",
            "systemd-logind.service",
            "systemd-udevd.service",
        ),
    ],
)
def test_units_without_which_the_host_stands_still(name: str) -> None:
    with pytest.raises(UsageError, match="stands still"):
        check_unit(name)
