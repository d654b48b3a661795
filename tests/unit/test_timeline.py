# SPDX-License-Identifier: LGPL-2.1-or-later
"""The timeline of a run: its rows add up to the blackout, and what is not known is said, not drawn."""

import random
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest

from khod.history.model import (
    Arrival,
    ClockSource,
    ColdBoot,
    Departure,
    RowKind,
    RunEnd,
    RunLog,
    Standstill,
    Timeline,
    TimelineRow,
    UnitStop,
)
from khod.history.phases import split_events
from khod.history.timeline import CONTRADICTION, NO_FREEZE, NO_TIMES, NOT_STAMPED, UNRECOVERED, build_timeline
from khod.model import Phase
from tests.unit.timelines import (
    ARRIVAL,
    DEPARTURE,
    SECOND,
    ZERO,
    at_once,
    call,
    event,
    events_after,
    orderly,
    steps_before,
)

MICROSECOND = 1e-6
BOOT_STAMPS = [one.name for one in fields(Arrival) if one.name.endswith("_monotonic") and one.default is None]


def parts(timeline: Timeline) -> list[tuple[str, float, float]]:
    """Give the name, begin and duration of each row from 0 on that lies in no other."""
    return [(row.name, row.begin, row.seconds) for row in timeline.rows if not row.parent and row.begin >= 0]


def children(timeline: Timeline, parent: str) -> list[TimelineRow]:
    return [row for row in timeline.rows if row.parent == parent]


def without(name: str) -> dict[str, Any]:
    return {name: None}


def adds_up(timeline: Timeline) -> None:
    """Hold that the rows from 0 on have neither a gap nor an overlap, and are the blackout, to the microsecond."""
    reached = 0
    for _, begin, seconds in parts(timeline):
        assert round(begin / MICROSECOND) == reached
        assert seconds >= 0
        reached += round(seconds / MICROSECOND)
    if timeline.blackout_seconds is not None:
        assert round(timeline.blackout_seconds / MICROSECOND) == reached


def test_an_orderly_handover_is_explained_from_freeze_to_finish() -> None:
    timeline = build_timeline(orderly())
    assert parts(timeline) == [
        ("freeze", 0.0, 0.25),
        ("activate", 0.25, 0.05),
        ("until shutdown", 0.3, 0.2),
        ("shutdown", 0.5, 4.5),
        ("exit", 5.0, 0.1),
        ("systemd-shutdown", 5.1, 0.3),
        ("LUO and jump", 5.4, 4.6),
        ("kernel", 10.0, 1.25),
        ("userspace before khod", 11.25, 5.75),
        ("khod", 17.0, 1.0),
        ("restore", 18.0, 1.5),
        ("finish", 19.5, 0.2),
    ]
    adds_up(timeline)
    assert timeline.blackout_seconds == 19.7
    assert timeline.source is ClockSource.tsc
    assert timeline.error_seconds < 0.02
    assert timeline.analyze == ARRIVAL.analyze
    assert timeline.unknown == []


def test_a_kernel_whose_clock_did_not_begin_at_0_has_the_same_timeline() -> None:
    plain, later = orderly(), orderly()
    plain.arrival = Arrival(SECOND)
    later.arrival = Arrival(SECOND, began_monotonic=5000.0)
    before, after = split_events(plain.events)
    later.events = [*before, *(replace(one, seconds=one.seconds + 5000) for one in after)]
    later.readings = [
        replace(one, monotonic=one.monotonic + 5000, boottime=one.boottime + 5000)
        if one.boot_id == SECOND.boot_id
        else one
        for one in plain.readings
    ]
    rounded = [
        [(name, round(begin, 6), round(seconds, 6)) for name, begin, seconds in parts(build_timeline(log))]
        for log in (later, plain)
    ]
    assert rounded[0] == rounded[1]
    assert build_timeline(later).blackout_seconds == 19.7


def test_what_was_before_the_freeze_is_before_0() -> None:
    rows = [row for row in build_timeline(orderly()).rows if row.begin < 0]
    assert [(row.name, row.begin, row.seconds) for row in rows] == [("prepare", -3.0, 1.0), ("load", -1.0, 0.5)]


def test_each_unit_and_producer_lies_in_its_row() -> None:
    timeline = build_timeline(orderly())
    assert [(row.name, row.kind, row.begin, row.seconds) for row in children(timeline, "shutdown")] == [
        ("kv.service", RowKind.unit, 0.6, 0.9),
        ("ssh.service", RowKind.unit, 1.0, 3.9),
    ]
    for parent, begin, seconds in (("freeze", 0.0, 0.2), ("restore", 19.0, 0.5), ("finish", 19.6, 0.1)):
        (row,) = children(timeline, parent)
        assert (row.name, row.kind, row.begin, row.seconds) == ("kv", RowKind.producer, begin, seconds)


def test_each_producer_that_took_its_state_back_has_its_standstill() -> None:
    """From the first `freeze` to the answer to `restore`; one that came after the verdict has one too."""
    log = orderly()
    said = [
        replace(one, producer=replace(one.producer, stopped_seconds=19.25))
        for one in events_after()[3:5]
        if one.producer
    ]
    late, lost = (
        call("late", "freeze", Phase.freezing, ZERO + 0.1, ZERO + 0.2),
        call("lost", "freeze", Phase.freezing, ZERO, ZERO),
    )
    log.events = [
        *[*steps_before()[:-1], *late, *lost, steps_before()[-1]],
        *[*events_after()[:3], *said, *events_after()[5:]],
        *call("lost", "restore", Phase.degraded, 20.0, 21.0, "veto"),
        *call("late", "restore", Phase.degraded, 30.0, 31.0),
    ]
    timeline = build_timeline(log)
    assert timeline.standstills == [
        Standstill("late", "peer", 40.9, timeline.error_seconds),
        Standstill("kv", "peer", 19.5, timeline.error_seconds, 19.25),
    ]
    log.readings = []
    assert build_timeline(log).standstills == [], "nobody knows how long the jump took"


def test_only_the_jump_has_the_error_of_the_bridge() -> None:
    timeline = build_timeline(orderly())
    assert {row.name: row.error_seconds for row in timeline.rows if row.error_seconds} == {
        "LUO and jump": timeline.error_seconds
    }


def test_with_now_nothing_is_between_departure_and_the_kernel() -> None:
    timeline = build_timeline(at_once())
    assert parts(timeline)[:5] == [
        ("freeze", 0.0, 0.25),
        ("activate", 0.25, 0.05),
        ("until jump", 0.3, 0.1),
        ("jump", 0.4, 9.6),
        ("kernel", 10.0, 1.25),
    ]
    adds_up(timeline)
    assert timeline.unknown == []


def test_an_initrd_has_its_row() -> None:
    log = orderly()
    log.arrival = replace(ARRIVAL, initrd_monotonic=0.75)
    rows = {name: (begin, seconds) for name, begin, seconds in parts(build_timeline(log))}
    assert (rows["kernel"], rows["initrd"]) == ((10.0, 0.75), (10.75, 0.5))


def test_the_sleep_lies_in_systemd_shutdown() -> None:
    log = orderly()
    log.departure = replace(DEPARTURE, sleep_seconds=0.25)
    (row,) = children(build_timeline(log), "systemd-shutdown")
    assert (row.kind, row.begin, row.seconds) == (RowKind.sleep, 5.15, 0.25)


def test_without_producers_the_blackout_ends_with_the_verification() -> None:
    log = orderly()
    log.events = [one for one in log.events if one.producer is None]
    timeline = build_timeline(log)
    adds_up(timeline)
    name, _, seconds = parts(timeline)[-1]
    assert (name, seconds) == ("verification", 1.8)


def test_a_producer_after_the_verdict_does_not_count() -> None:
    log = orderly()
    late = call("late", "finish", Phase.verified, 60.0, 61.0)
    log.events = [*steps_before(), *events_after(), *late, event(62.0, Phase.degraded)]
    assert build_timeline(log) == build_timeline(orderly())


@pytest.mark.parametrize("name", [one.name for one in fields(Departure) if one.name.endswith("_monotonic")])
def test_a_stamp_of_the_shutdown_that_is_missing_leaves_no_gap(name: str) -> None:
    log = orderly()
    log.departure = replace(DEPARTURE, **without(name))
    timeline = build_timeline(log)
    adds_up(timeline)
    assert timeline.blackout_seconds == build_timeline(orderly()).blackout_seconds


@pytest.mark.parametrize("name", BOOT_STAMPS)
def test_a_stamp_of_the_boot_that_is_missing_leaves_no_gap(name: str) -> None:
    log = orderly()
    log.arrival = replace(ARRIVAL, **without(name))
    timeline = build_timeline(log)
    adds_up(timeline)
    assert timeline.blackout_seconds == build_timeline(orderly()).blackout_seconds


def test_without_any_stamp_the_rest_is_still_drawn() -> None:
    log = orderly()
    log.departure, log.arrival = None, Arrival(SECOND)
    timeline = build_timeline(log)
    adds_up(timeline)
    assert [name for name, _, _ in parts(timeline)] == [
        "freeze",
        "activate",
        "until shutdown and jump",
        "shutdown and jump",
        "boot",
        "restore",
        "finish",
    ]
    assert timeline.unknown == [NOT_STAMPED, NO_TIMES]


@pytest.mark.parametrize(
    "wrong",
    [
        replace(DEPARTURE, start_monotonic=ZERO - 100, finish_monotonic=ZERO - 90),
        replace(DEPARTURE, late_finish_monotonic=ZERO + 4),
    ],
    ids=["of another shutdown", "not in order"],
)
def test_stamps_that_cannot_be_of_this_run_are_left_out(wrong: Departure) -> None:
    log = orderly()
    log.departure = wrong
    timeline = build_timeline(log)
    adds_up(timeline)
    assert CONTRADICTION in timeline.unknown
    assert "shutdown" not in [row.name for row in timeline.rows]


def test_a_unit_s_stop_that_stands_out_is_cut_off() -> None:
    log = orderly()
    stops = [UnitStop("early.service", ZERO, ZERO + 1), UnitStop("open.service", ZERO + 4, ZERO + 50)]
    stops += [UnitStop("outside.service", ZERO + 20, ZERO + 30), UnitStop("turned.service", ZERO + 3, ZERO + 2)]
    log.departure = replace(DEPARTURE, stops=stops)
    rows = children(build_timeline(log), "shutdown")
    assert [(row.name, row.begin, row.seconds) for row in rows] == [
        ("early.service", 0.5, 0.5),
        ("open.service", 4.0, 1.0),
    ]


def test_steps_that_overlap_and_boundaries_that_go_back_still_add_up() -> None:
    for seed in range(300):
        chosen = random.Random(seed)
        log = orderly()
        moved = [replace(one, seconds=one.seconds + chosen.uniform(-1, 1)) for one in log.events]
        log.events = moved
        stamps: dict[str, Any] = {one: chosen.choice([None, chosen.uniform(0, 12)]) for one in BOOT_STAMPS}
        log.arrival = replace(ARRIVAL, **stamps)
        adds_up(build_timeline(log))


# No recovery, no figure


def cold_boot() -> RunLog:
    log = orderly()
    log.events = [*steps_before(), event(20.0, Phase.cold_boot)]
    log.cold_boot, log.end = ColdBoot("The watchdog reset the host."), RunEnd(Phase.cold_boot, 1.8e9 + 90)
    log.departure = None
    return log


def rolled_back() -> RunLog:
    log = orderly()
    log.events = [
        *steps_before()[:5],
        *call("kv", "freeze", Phase.freezing, ZERO, ZERO + 0.5, "veto: not now"),
        event(ZERO + 0.5, Phase.rolling_back),
        *call("kv", "thaw", Phase.rolling_back, ZERO + 0.6, ZERO + 0.7),
        event(ZERO + 0.9, Phase.idle),
    ]
    log.readings, log.arrival, log.departure = log.readings[:1], None, None
    log.end = RunEnd(Phase.idle, 1.8e9 + 10, "Producer kv refuses to freeze")
    return log


def under_way() -> RunLog:
    log = orderly()
    log.events, log.readings = steps_before(), log.readings[:2]
    log.arrival, log.departure, log.end = None, None, None
    return log


def nobody_back() -> RunLog:
    log = orderly()
    failed = call("kv", "restore", Phase.verifying, 9.0, 9.5, "failed: no file")
    log.events = [*steps_before(), event(8.0, Phase.verifying), *failed, event(9.8, Phase.degraded)]
    log.end = RunEnd(Phase.degraded, 1.8e9 + 30)
    return log


@pytest.mark.parametrize("made", [cold_boot, rolled_back, under_way, nobody_back])
def test_without_a_recovery_there_is_no_figure_and_the_rest_is_drawn(made: Callable[[], RunLog]) -> None:
    timeline = build_timeline(made())
    assert (timeline.blackout_seconds, timeline.error_seconds) == (None, 0.0)
    adds_up(timeline)
    assert [row.name for row in timeline.rows if not row.parent][:3] == ["prepare", "load", "freeze"]
    assert (UNRECOVERED in timeline.unknown) is (made in (cold_boot, nobody_back))


def test_a_rollback_is_a_row_with_its_producers() -> None:
    timeline = build_timeline(rolled_back())
    rows = [(row.name, row.begin, row.seconds, row.detail) for row in timeline.rows if row.begin >= 0]
    assert rows == [
        ("freeze", 0.0, 0.5, "failed"),
        ("kv", 0.0, 0.5, "veto: not now"),
        ("rollback", 0.5, 0.4, ""),
        ("kv", 0.6, 0.1, ""),
    ]


def test_a_run_without_a_freeze_counts_back_from_its_end() -> None:
    log = under_way()
    log.events = log.events[:4]
    timeline = build_timeline(log)
    assert NO_FREEZE in timeline.unknown
    assert [(row.name, row.begin, row.seconds) for row in timeline.rows] == [
        ("prepare", -2.5, 1.0),
        ("load", -0.5, 0.5),
    ]


def test_without_a_bridge_the_boot_follows_at_once_and_there_is_no_figure() -> None:
    log = orderly()
    log.readings = log.readings[:2]
    timeline = build_timeline(log)
    assert (timeline.source, timeline.blackout_seconds) == (None, None)
    names = [name for name, _, _ in parts(timeline)]
    assert "kernel" in names
    assert "LUO and jump" not in names
    adds_up(timeline)
    assert any("placed as if" in sentence for sentence in timeline.unknown)


def test_the_boot_of_an_event_counts_before_its_phase() -> None:
    """The khod after the jump may say something before it verifies."""
    log = orderly()
    before = [replace(one, boot_id="first") for one in steps_before()]
    after = [replace(one, boot_id="second") for one in [event(7.9, Phase.executing), *events_after()]]
    log.events, log.arrival = [*before, *after], replace(ARRIVAL, ready_monotonic=None)
    rows = {name: (begin, seconds) for name, begin, seconds in parts(build_timeline(log))}
    assert rows["khod"] == (17.0, 0.9)


@pytest.mark.parametrize("made", [orderly, at_once])
def test_the_last_event_before_the_jump_may_be_lost(made: Callable[[], RunLog]) -> None:
    """It comes after the last write to the disk."""
    log, whole = made(), build_timeline(made())
    log.events = [one for one in log.events if one.step != "execute"]
    timeline = build_timeline(log)
    adds_up(timeline)
    assert timeline.blackout_seconds == whole.blackout_seconds
    assert [row.name for row in timeline.rows][-6:] == [row.name for row in whole.rows][-6:]


def test_an_empty_log_has_an_empty_timeline() -> None:
    timeline = build_timeline(RunLog())
    assert (timeline.rows, timeline.blackout_seconds) == ([], None)
