# SPDX-License-Identifier: LGPL-2.1-or-later
"""The bridge between the clocks of two kernels, on invented clocks: the stated error covers the truth."""

import random
from collections.abc import Collection
from dataclasses import dataclass, field, replace

import pytest

from khod.history.bridge import MAX_JUMP_SECONDS, Bridge, bridge_clocks
from khod.history.model import ClockReading, ClockSource, Moment

EPOCH = 1_800_000_000.0
DRIFT = 100e-6
"""What a crystal is off by at most."""


@dataclass
class World:
    """Two kernels on one host; real time is 0 at the first one's start. Drifts are relative."""

    random: random.Random
    first_drift: float = 0.0
    second_drift: float = 0.0
    rtc_drift: float = 0.0
    second_start: float = 1000.0
    tsc_hz: float = 2.4e9
    span: float = 0.001
    wall_step: float = 0.0
    """By how much the wall clock is set between the kernels, and with `rtc_step` the hardware clock."""
    rtc_step: float = 0.0
    wall_seconds: float = 0.0
    """What the second kernel's wall clock is off by, because it was set in whole seconds."""
    have: frozenset[str] = field(default_factory=lambda: frozenset({"tsc", "ptp", "rtc"}))

    def first(self, real: float) -> float:
        return real * (1 + self.first_drift)

    def second(self, real: float) -> float:
        return (real - self.second_start) * (1 + self.second_drift)

    def read(self, moment: Moment, real: float) -> ClockReading:
        """Read every clock at an instant of its own, at most half of the span from the one of CLOCK_MONOTONIC."""
        before = real < self.second_start

        def near() -> float:
            return real + self.random.uniform(-0.5, 0.5) * self.span

        monotonic = self.first(real) if before else self.second(real)
        rtc = EPOCH + 0.37 + near() * (1 + self.rtc_drift) + (0.0 if before else self.rtc_step)
        return ClockReading(
            moment=moment,
            boot_id="first" if before else "second",
            monotonic=monotonic,
            boottime=monotonic,
            realtime=EPOCH + near() + (0.0 if before else self.wall_step + self.wall_seconds),
            span_seconds=self.span,
            tsc=round(near() * self.tsc_hz) + 10**12 if "tsc" in self.have else None,
            ptp=EPOCH + 37 + near() if "ptp" in self.have else None,
            ptp_name="KVM virtual PTP",
            rtc=float(int(rtc)) if "rtc" in self.have else None,
        )

    def readings(self) -> tuple[list[ClockReading], list[ClockReading]]:
        """Read before the jump, which is asked for 12 s before the second kernel's start, and after it."""
        asked = self.second_start - 12
        before = [(Moment.start, asked - 40), (Moment.begin, asked - 3)]
        after = [(Moment.arrival, self.second_start + 9), (Moment.end, self.second_start + 14)]
        return [self.read(*one) for one in before], [self.read(*one) for one in after]

    def bridge(self) -> Bridge:
        before, after = self.readings()
        return bridge_clocks(before, after, before[-1].monotonic)


def any_world(seed: int, have: Collection[str] = ("tsc", "ptp", "rtc"), wall_step: float = 0.0) -> World:
    chosen = random.Random(seed)
    return World(
        chosen,
        first_drift=chosen.uniform(-DRIFT, DRIFT),
        second_drift=chosen.uniform(-DRIFT, DRIFT),
        rtc_drift=chosen.uniform(-DRIFT, DRIFT),
        second_start=chosen.uniform(50, 1e6),
        tsc_hz=chosen.uniform(1e9, 5e9),
        span=chosen.uniform(1e-5, 0.02),
        wall_seconds=chosen.uniform(-0.5, 0.5),
        wall_step=wall_step,
        have=frozenset(have),
    )


def holds(world: World, bridge: Bridge) -> None:
    """Hold that instants of the second kernel's boot are where they were, within the error."""
    for passed in (0.0, 3.0, 9.0, 14.0):
        real = world.second_start + passed
        truth, found = world.first(real), bridge.to_first(world.second(real))
        assert abs(found - truth) <= bridge.error_seconds, (world, bridge, passed)


@pytest.mark.parametrize(
    ("have", "source", "most"),
    [
        ({"tsc", "ptp", "rtc"}, ClockSource.tsc, 0.1),
        ({"ptp", "rtc"}, ClockSource.ptp, 0.1),
        ({"rtc"}, ClockSource.wall, 1.2),
        (set[str](), ClockSource.wall, 1.2),
    ],
)
@pytest.mark.parametrize("wall_step", [0.0, -3600.0, 3600.0])
def test_the_error_covers_the_truth(have: set[str], source: ClockSource, most: float, wall_step: float) -> None:
    """With the wall clock alone nobody can tell an hour from a step: then the source is unknown, never wrong."""
    for seed in range(300):
        world = any_world(seed, have, wall_step)
        bridge = world.bridge()
        if not have and wall_step:
            assert bridge.source is None, bridge
            continue
        assert bridge.source is source
        assert bridge.error_seconds < most
        holds(world, bridge)


@pytest.mark.parametrize("step", [-3600.0, 3600.0])
def test_a_wall_clock_that_was_set_is_named(step: float) -> None:
    bridge = any_world(1, wall_step=step).bridge()
    assert bridge.source is ClockSource.tsc
    assert [note for note in bridge.notes if f"{step:+.0f} s" in note]
    assert not any_world(1).bridge().notes


@pytest.mark.parametrize("step", [-1.5, 1.5])
def test_whole_seconds_of_two_kernels_are_not_taken_for_a_set_clock(step: float) -> None:
    world = replace(any_world(1, wall_step=step), wall_seconds=0.0)
    assert not world.bridge().notes


def test_a_hardware_clock_that_was_set_is_not_believed() -> None:
    for step in (-3600.0, 3600.0):
        world = replace(any_world(2, {"rtc"}, step), rtc_step=step)
        bridge = world.bridge()
        assert bridge.source is None
        assert any(note.startswith("The wall clock is not used") for note in bridge.notes)


def test_a_tsc_that_starts_anew_is_not_used() -> None:
    for seed in range(100):
        world = any_world(seed)
        before, after = world.readings()
        restart = before[0].tsc or 0
        reset = [replace(one, tsc=(one.tsc or 0) - restart - round(20 * world.tsc_hz)) for one in after]
        bridge = bridge_clocks(before, reset, before[-1].monotonic)
        assert bridge.source is ClockSource.ptp
        holds(world, bridge)


def test_a_tsc_with_another_rate_is_not_used() -> None:
    world = any_world(3)
    before, after = world.readings()
    faster = [replace(one, tsc=round((one.tsc or 0) * 1.3)) for one in after]
    bridge = bridge_clocks(before, faster, before[-1].monotonic)
    assert bridge.source is ClockSource.ptp
    assert "The TSC is not used: its rate changed over the jump." in bridge.notes


def test_without_two_readings_in_one_kernel_the_tsc_has_no_rate() -> None:
    before, after = any_world(4).readings()
    assert bridge_clocks(before[-1:], after[:1], before[-1].monotonic).source is ClockSource.ptp
    assert bridge_clocks(before, after[:1], before[-1].monotonic).source is ClockSource.tsc
    assert bridge_clocks(before[-1:], after, before[-1].monotonic).source is ClockSource.tsc


def test_a_host_that_slept_before_the_run_is_bridged_all_the_same() -> None:
    """CLOCK_MONOTONIC and perhaps the TSC stopped meanwhile; what was read before the sleep tells nothing."""
    world = any_world(10)
    before, after = world.readings()
    slept = replace(before[0], monotonic=before[0].monotonic + 30, boottime=before[0].boottime)
    bridge = bridge_clocks([slept, *before[1:]], after, before[-1].monotonic)
    assert bridge.source is ClockSource.tsc
    holds(world, bridge)


def test_readings_at_one_instant_give_no_rate() -> None:
    before, after = any_world(5).readings()
    assert bridge_clocks([before[0], before[0]], [after[0], after[0]], before[0].monotonic).source is ClockSource.ptp


def test_another_ptp_clock_is_no_bridge() -> None:
    world = any_world(6, {"ptp", "rtc"})
    before, after = world.readings()
    other = [replace(one, ptp_name="vmclock0") for one in after]
    assert bridge_clocks(before, other, before[-1].monotonic).source is ClockSource.wall


@pytest.mark.parametrize("have", [{"rtc"}, set[str]()])
def test_a_wall_clock_set_while_it_is_watched_is_not_used(have: set[str]) -> None:
    before, after = any_world(7, have).readings()
    moved = replace(after[1], realtime=after[1].realtime + 5, rtc=after[1].rtc + 5 if after[1].rtc else None)
    bridge = bridge_clocks(before, [after[0], moved], before[-1].monotonic)
    assert bridge.source is None
    assert any("it was set while it was watched" in note for note in bridge.notes)


def test_a_kernel_cannot_start_before_the_last_sign_of_the_one_before() -> None:
    """As where a late stamp of systemd says that the first kernel ran longer than the clocks have room for."""
    world = any_world(8)
    before, after = world.readings()
    for late in (world.first(world.second_start) + 60, world.first(world.second_start) - MAX_JUMP_SECONDS - 60):
        assert bridge_clocks(before, after, late).source is None


@pytest.mark.parametrize("side", [0, 1])
def test_without_readings_of_a_kernel_nothing_is_said(side: int) -> None:
    before, after = any_world(9).readings()
    bridge = bridge_clocks(before, [], 0.0) if side else bridge_clocks([], after, 0.0)
    assert bridge.source is None
    assert len(bridge.notes) == 1
