# SPDX-License-Identifier: LGPL-2.1-or-later
"""The way forward and the operator's way back, with the real engine on the embedded kernel."""

import asyncio
import dataclasses
import time

import pytest

from khod.errors import Exit, Failed, Refused, UsageError
from khod.handover.machine import RESTING
from khod.handover.record import Store
from khod.model import Event, EventKind, Phase, Step
from khod.simulated.kernel import Rebooted
from khod.target.target import Request
from tests.unit.harness import ACTIVE, Host

VERBS = ("prepare", "freeze")
UNDONE = ["a prepare", "b prepare", "a freeze", "b freeze", "b thaw", "a thaw", "b cancel", "a cancel"]


def two_producers(host: Host) -> None:
    host.hook("a")
    host.hook("b", after=("a",))


async def test_a_whole_handover_ends_verified_in_the_second_kernel(host: Host) -> None:
    two_producers(host)
    engine = await host.started()
    before = host.kernel.read_file("/proc/sys/kernel/random/boot_id")

    with pytest.raises(Rebooted):
        await host.kexec(engine)

    assert host.kernel.calls == ["active=1", "load", "reboot"]
    assert host.kernel.read_file("/proc/sys/kernel/random/boot_id") != before
    second = await host.started()
    status = await second.queries.status()
    assert status.phase is Phase.verified
    assert status.exit_code == Exit.done
    assert status.handovers == 1
    assert status.verdict is not None
    assert status.verdict.arrived == ["ftrace"]
    assert (await second.queries.tree("in")).root == (await second.queries.tree("snapshot")).root
    assert f"khod.run={status.run}" in host.kernel.read_file("/proc/cmdline").decode().split()
    assert host.verbs == UNDONE[:4], "no producer is called back after the jump"


async def test_events_say_what_they_are_about(host: Host) -> None:
    """Whoever keeps or counts them reads no message: step, producer, duration and both clocks are fields."""
    host.hook("a")
    engine = await host.started()
    seen, began = len(host.events), time.time()
    await engine.activate()
    host.guard.event("add", "memory")
    await engine.abort()

    events = host.events[seen:]
    steps = [(event.kind.value, event.step) for event in events if event.step]
    assert steps == [(f"step_{end}", step) for step in ("prepare", "freeze", "activate") for end in ("began", "ended")]
    calls = [(event.kind.value, event.producer.phase) for event in events if event.producer is not None]
    verbs = ("prepare", "freeze", "thaw", "cancel")
    assert calls == [(f"producer_{what}", verb) for verb in verbs for what in ("called", "answered")]
    timed = [event for event in events if event.kind in (EventKind.step_ended, EventKind.producer_answered)]
    assert all(event.duration is not None and event.duration >= 0 for event in timed)
    assert [event.phase for event in events if event.kind is EventKind.phase][-1] is Phase.idle
    assert sum(event.kind is EventKind.device for event in events) == 1
    assert all(began <= event.at <= time.time() for event in events)


async def test_each_step_is_recorded_before_it_is_taken(host: Host) -> None:
    copies = {
        verb: f"mkdir {host.directory / verb}; cp {host.store.record_path} {host.directory / verb}" for verb in VERBS
    }
    host.hook("a", copies)
    engine = await host.started()
    with pytest.raises(Rebooted):
        await host.kexec(engine)

    for noted, step in zip(host.kernel.noted, (Step.activate, Step.load, Step.execute), strict=True):
        assert step in noted.recorded.done, noted.what
        assert noted.recorded.phase not in RESTING
    assert host.kernel.noted[-1].recorded.phase is Phase.executing
    told = {verb: Store(host.directory / verb).read() for verb in ("prepare", "freeze")}
    assert {verb: found and found.phase for verb, found in told.items()} == {
        "prepare": Phase.preparing,
        "freeze": Phase.freezing,
    }


async def test_activate_stops_at_active_and_abort_puts_all_back(host: Host) -> None:
    two_producers(host)
    engine = await host.started()
    await engine.activate()
    before = await engine.queries.status()
    assert (before.phase, before.kernel_active, before.kernel_loaded) == (Phase.active, True, False)
    assert host.record.phase.value == "active"
    assert (await engine.queries.tree("out")).root == host.kernel.read_file("/sys/kernel/kho/dt")

    await engine.abort()
    after = await engine.queries.status()
    assert (after.phase, after.kernel_active, after.done) == (Phase.idle, False, [])
    assert host.record.phase is Phase.idle
    assert host.verbs == UNDONE
    with pytest.raises(Refused):
        await engine.queries.tree("out")


async def test_activate_twice_is_done_once(host: Host) -> None:
    engine = await host.started()
    await engine.activate()
    await engine.activate()
    assert host.kernel.calls == ["active=1"]


async def test_abort_unloads_before_it_leaves_the_active_phase(host: Host) -> None:
    two_producers(host)
    engine = await host.started()
    await host.kexec(engine, load_only=True)
    assert (await engine.queries.status()).phase is Phase.loaded
    assert host.record.phase is Phase.loaded

    await engine.abort()
    assert host.kernel.calls == ["active=1", "load", "unload", "active=0"]
    assert not host.kernel.active
    assert not host.kernel.loaded
    assert host.verbs == UNDONE


async def test_the_active_phase_is_entered_and_left_by_the_same_thread(host: Host) -> None:
    engine = await host.started()
    for _attempt in range(3):
        await engine.activate()
        await engine.queries.tree("out")
        await engine.abort()
    writes = [noted for noted in host.kernel.noted if noted.what.startswith("active=")]
    assert [noted.what for noted in writes] == ["active=1", "active=0"] * 3
    assert len({noted.thread for noted in writes}) == 1
    assert host.kernel.readers == {noted.thread for noted in writes}, "a read of dt beside a write of 0 is a deadlock"


async def test_load_only_then_kexec_jumps_with_the_image_loaded_before(host: Host) -> None:
    engine = await host.started()
    await host.kexec(engine, load_only=True)
    with pytest.raises(Rebooted):
        await engine.kexec(Request())
    assert host.kernel.calls == ["active=1", "load", "reboot"]


async def test_kexec_goes_on_from_active(host: Host) -> None:
    two_producers(host)
    engine = await host.started()
    await engine.activate()
    with pytest.raises(Rebooted):
        await host.kexec(engine)
    assert host.kernel.calls == ["active=1", "load", "reboot"]
    assert host.verbs == UNDONE[:4]


async def test_an_image_given_twice_is_refused_and_nothing_moves(host: Host) -> None:
    engine = await host.started()
    await host.kexec(engine, load_only=True)
    with pytest.raises(Refused):
        await host.kexec(engine)
    assert (await engine.queries.status()).phase is Phase.loaded
    assert host.kernel.calls == ["active=1", "load"]


async def test_kexec_without_any_image_is_refused_where_it_stands(host: Host) -> None:
    engine = await host.started()
    with pytest.raises(UsageError):
        await engine.kexec(Request())
    assert (await engine.queries.status()).phase is Phase.idle
    assert host.kernel.calls == []


@pytest.mark.parametrize("contents", [b"", b"MZ no kernel", b"\0" * 0x5000])
async def test_an_unusable_image_leaves_active_as_it_was(host: Host, contents: bytes) -> None:
    (host.directory / "bad").write_bytes(contents)
    engine = await host.started()
    await engine.activate()
    with host.request("bad") as request, pytest.raises(Refused):
        await engine.kexec(request)
    assert (await engine.queries.status()).phase is Phase.active
    assert host.kernel.active
    assert host.kernel.calls == ["active=1"]


@pytest.mark.parametrize("phase", sorted(RESTING, key=str))
async def test_an_unusable_image_leaves_a_resting_phase_as_it_was(host: Host, phase: Phase) -> None:
    """Design: what is wrong before the kernel was touched leaves the phase as it was."""
    (host.directory / "bad").write_bytes(b"no kernel")
    first = await host.started()
    await first.activate()
    await first.abort()
    host.store.write(dataclasses.replace(host.record, phase=phase))
    engine = await host.started()
    assert (await engine.queries.status()).phase is phase
    with host.request("bad") as request, pytest.raises(Refused):
        await engine.kexec(request)
    assert (await engine.queries.status()).phase is phase
    assert host.record.phase is phase


async def test_status_answers_while_the_kernel_serializes(host: Host) -> None:
    engine = await host.started()
    host.kernel.gate.clear()
    activation = asyncio.ensure_future(engine.activate(by="root (khoctl, process 4711)"))
    try:
        await host.seen(lambda event: event.phase is Phase.activating)
        status = await engine.queries.status()
        assert status.phase is Phase.activating
        assert status.stale
        assert status.done == ["prepare", "freeze"]
        assert status.under_way is not None
        assert status.under_way.step == "activate"
        assert status.begun is not None
        assert status.begun.by == "root (khoctl, process 4711)"
        with pytest.raises(Refused, match=r"begun by root \(khoctl, process 4711\)"):
            await engine.activate()
    finally:
        host.kernel.gate.set()
    await activation
    status = await engine.queries.status()
    assert (status.phase, status.stale) == (Phase.active, False)


async def test_abort_while_the_kernel_serializes_takes_effect_when_it_comes_back(host: Host) -> None:
    two_producers(host)
    engine = await host.started()
    host.kernel.gate.clear()
    with host.request() as request:
        handover = asyncio.ensure_future(engine.kexec(request))
        await host.seen(lambda event: event.phase is Phase.activating)
        abort = asyncio.ensure_future(engine.abort())
        await asyncio.sleep(0)  # let it ask
        host.kernel.gate.set()
        with pytest.raises(Failed):
            await handover
        await abort
    assert host.kernel.calls == ["active=1", "active=0"], "no image is loaded once it was called off"
    assert (await engine.queries.status()).phase is Phase.idle
    assert host.verbs == UNDONE


@pytest.mark.parametrize("verb", VERBS)
async def test_abort_does_not_wait_for_a_slow_producer(host: Host, verb: str) -> None:
    host.hook("slow", {verb: "sleep 600"}, timeout=600)
    engine = await host.started()
    activation = asyncio.ensure_future(engine.activate())
    await host.seen(lambda event: event.message.startswith(f"slow: {verb}"))
    assert (await engine.queries.status()).waiting_for == ["slow"]
    await engine.abort()
    with pytest.raises(Failed):
        await activation
    assert (await engine.queries.status()).phase is Phase.idle
    assert host.kernel.calls == []
    assert host.verbs[-1] == "slow cancel"
    assert ("slow thaw" in host.verbs) is (verb == "freeze")


async def test_an_abort_before_the_first_step_calls_the_handover_off(host: Host) -> None:
    """While khod still reads and checks the image there is nothing to undo, and nothing may be begun."""
    two_producers(host)
    engine = await host.started()
    with host.request() as request:
        handover = asyncio.ensure_future(engine.kexec(request))
        await asyncio.sleep(0)  # it has begun: the engine is busy, the phase is still idle
        abort = asyncio.ensure_future(engine.abort())
        with pytest.raises(Failed):
            await handover
        await abort
    assert (await engine.queries.status()).phase is Phase.idle
    assert host.kernel.calls == []
    assert host.verbs == []


async def test_abort_of_nothing_changes_nothing(host: Host) -> None:
    engine = await host.started()
    await engine.abort()
    assert host.kernel.calls == []
    assert (await engine.queries.status()).phase is Phase.idle


async def test_events_tell_every_phase_in_order(host: Host) -> None:
    engine = await host.started()
    await engine.activate()
    await engine.abort()
    phases: list[Phase] = []
    for event in host.events:
        if not phases or phases[-1] is not event.phase:
            phases.append(event.phase)
    expected = "idle preparing prepared freezing frozen activating active rolling_back idle"
    assert [phase.value for phase in phases] == expected.split()
    assert all(isinstance(event, Event) and event.seconds > 0 for event in host.events)


async def test_timings_name_each_step_taken(host: Host) -> None:
    engine = await host.started()
    await host.kexec(engine, load_only=True)
    assert [timing.step for timing in (await engine.queries.status()).timings] == [
        step.value for step in (Step.prepare, Step.freeze, Step.activate, Step.load)
    ]


async def test_a_handover_after_a_handover(host: Host) -> None:
    for count in (1, 2, 3):
        engine = await host.started()
        with pytest.raises(Rebooted):
            await host.kexec(engine)
        status = await (await host.started()).queries.status()
        assert (status.phase, status.handovers) == (Phase.verified, count)


async def test_kexec_without_an_initrd(host: Host) -> None:
    engine = await host.started()
    with host.request(initrd=None) as request, pytest.raises(Rebooted):
        await engine.kexec(request)
    assert (await (await host.started()).queries.status()).phase is Phase.verified


async def test_the_kernel_is_active_only_by_one_write(host: Host) -> None:
    """A second write of 1 would be v3's silent no-op: success proves nothing, so none is made."""
    host.kernel.echo_to(ACTIVE, "1")
    engine = await host.started()
    with pytest.raises(Refused):
        await engine.activate()
    assert host.kernel.calls == ["active=1"], "the operator's own"
