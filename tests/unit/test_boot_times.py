# SPDX-License-Identifier: LGPL-2.1-or-later
"""How this boot came up and the one before went down, asked of a systemd and a journal of the test's own."""

import os
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from khod.concurrency.worker import Worker
from khod.history.model import Arrival, Departure, KernelFacts, UnitStop
from khod.systemd import dbus, departure, stops
from khod.systemd.boot_times import describe_boot, read_arrival
from khod.systemd.departure import NO_ANSWER, read_departure
from khod.systemd.stops import CUT_OFF, NO_BOOT, NO_STOP, UNIT_STOPPED, UNIT_STOPPING, read_stops
from khod.systemd.time_span import format_span
from tests.unit.fakebus import FakeBus, fake_bus, unit

BOOT = "11111111222233334444555555555555"
OTHER = "99999999222233334444555555555555"
KERNEL = KernelFacts("7.3.4", boot_id="second")
SECOND = 10**6
SHUTDOWN = {
    "PreviousShutdownStartTimestampMonotonic": 100 * SECOND,
    "PreviousShutdownFinishTimestampMonotonic": 100_981_000,
    "PreviousShutdownLateStartTimestampMonotonic": 101_160_000,
    "PreviousShutdownLateFinishTimestampMonotonic": 101_375_000,
}
BOOTED = {
    "UserspaceTimestampMonotonic": 1_481_999,
    "FinishTimestampMonotonic": 8_000_000,
    "SecurityStartTimestampMonotonic": 1_500_000,
    "InitRDTimestampMonotonic": 0,
}
TARGET = {"Id": "multi-user.target", "ActiveEnterTimestampMonotonic": 7_981_999}


@pytest.mark.parametrize(
    ("microseconds", "text"),
    [
        (0, "0"),
        (500, "500us"),
        (981_000, "981ms"),
        (981_999, "981ms"),
        (1_000_000, "1s"),
        (1_481_234, "1.481s"),
        (2_000_001, "2.000s"),
        (59_999_999, "59.999s"),
        (62_345_678, "1min 2.345s"),
        (3_661_001_234, "1h 1min 1.001s"),
    ],
)
def test_a_time_span_is_written_as_systemd_does(microseconds: int, text: str) -> None:
    """As `systemd-analyze timespan` says, at the accuracy of milliseconds that `systemd-analyze time` has."""
    assert format_span(microseconds, 1000) == text


def test_the_boot_is_described_as_systemd_analyze_does() -> None:
    assert describe_boot(BOOTED | SHUTDOWN, TARGET) == (
        "Startup finished in 981ms (stopping) + 179ms (exit) + 215ms (systemd-shutdown) + 1.481s (kernel) "
        "+ 6.518s (userspace) = 9.375s\nmulti-user.target reached after 6.500s in userspace."
    )
    firmware = {"FirmwareTimestampMonotonic": 3 * SECOND, "LoaderTimestampMonotonic": SECOND}
    with_initrd = BOOTED | firmware | {"InitRDTimestampMonotonic": 481_999}
    assert describe_boot(with_initrd, TARGET | {"ActiveEnterTimestampMonotonic": 0}) == (
        "Startup finished in 2s (firmware) + 1s (loader) + 481ms (kernel) + 1s (initrd) + 6.518s (userspace) = 11s\n"
        "multi-user.target was never reached."
    )


@pytest.mark.parametrize(
    "changed", [{"FinishTimestampMonotonic": 0}, {"SecurityStartTimestampMonotonic": 0}, {"SoftRebootsCount": 1}]
)
def test_an_unfinished_boot_a_container_and_a_soft_reboot_are_not_described(changed: dict[str, int]) -> None:
    assert describe_boot(BOOTED | changed, TARGET) == ""


@pytest.mark.parametrize("missing", SHUTDOWN)
def test_three_stamps_of_the_shutdown_are_none(missing: str) -> None:
    left = {name: value for name, value in SHUTDOWN.items() if name != missing}
    assert "stopping" not in describe_boot(BOOTED | left, TARGET)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "private"
    monkeypatch.setattr(dbus, "PRIVATE_SOCKET", str(path))
    return path


def stamped(bus: FakeBus, pid: int) -> None:
    """Give systemd its stamps, and khod's service its own."""
    bus.stamps = BOOTED | SHUTDOWN
    bus.units["kho-handover.service"] = unit() | {
        "MainPID": ("u", pid),
        "ExecMainStartTimestampMonotonic": ("t", 6_000_000),
    }
    bus.units["default.target"] = unit(Id="multi-user.target") | {
        "ActiveEnterTimestampMonotonic": ("t", TARGET["ActiveEnterTimestampMonotonic"])
    }


async def test_an_arrival_has_the_times_of_the_boot(place: Path) -> None:
    async with fake_bus(place) as bus:
        stamped(bus, os.getpid())
        found = await read_arrival(KERNEL, 7.5)
    assert found == Arrival(KERNEL, None, 1.481999, 6.0, 7.5, describe_boot(BOOTED | SHUTDOWN, TARGET))


async def test_the_times_of_another_khod_are_not_ours(place: Path) -> None:
    """A khod that was started by hand is not the unit's main process."""
    async with fake_bus(place) as bus:
        stamped(bus, os.getpid() + 1)
        assert (await read_arrival(KERNEL, 7.5)).khod_monotonic is None


async def test_a_boot_that_does_not_finish_is_not_waited_for_for_ever(place: Path) -> None:
    async with fake_bus(place) as bus:
        stamped(bus, os.getpid())
        bus.stamps["FinishTimestampMonotonic"] = 0
        found = await read_arrival(KERNEL, 7.5, finish_seconds=0.0)
    assert (found.userspace_monotonic, found.analyze) == (1.481999, "")


async def test_without_systemd_only_what_was_given_is_known(place: Path) -> None:
    assert await read_arrival(KERNEL, 7.5, finish_seconds=0.0) == Arrival(KERNEL, ready_monotonic=7.5)
    async with fake_bus(place) as bus:
        bus.instead["GetAll"] = "s", ("nonsense",)
        assert await read_arrival(KERNEL, 7.5, finish_seconds=0.0) == Arrival(KERNEL, ready_monotonic=7.5)


# The journal of the boot before


def entry(message_id: str, name: str, monotonic: float, boot: str = BOOT) -> dict[str, Any]:
    at = (timedelta(seconds=monotonic), uuid.UUID(boot))
    return {"__MONOTONIC_TIMESTAMP": at, "MESSAGE_ID": uuid.UUID(message_id), "UNIT": name}


class Journal:
    """A journal with these entries, each of which every match fits but for the boot."""

    def __init__(self, entries: list[dict[str, Any]]) -> None:
        self.entries = entries
        self.matches: list[dict[str, str]] = []
        self.opened = self.closed = 0

    def __call__(self) -> "Journal":
        self.opened += 1
        return self

    def add_match(self, **match: str) -> None:
        self.matches.append(match)

    def seek_monotonic(self, monotonic: float, bootid: str) -> None:
        """Go to the begin, as a journal whose clocks are in disorder may."""
        self.sought = monotonic, bootid
        self.left: Iterator[dict[str, Any]] = iter(self.entries)

    def get_next(self) -> dict[str, Any]:
        return next(self.left, {})

    def close(self) -> None:
        self.closed += 1


def test_each_unit_stops_from_its_first_message_to_its_last() -> None:
    journal = Journal(
        [
            entry(UNIT_STOPPING, "early.service", 99.0),
            entry(UNIT_STOPPING, "a.service", 100.1),
            entry(UNIT_STOPPED, "some.target", 100.15),
            entry(UNIT_STOPPING, "b.service", 100.2),
            entry(UNIT_STOPPED, "a.service", 100.5),
            entry(UNIT_STOPPED, "b.service", 100.9),
        ]
    )
    found = read_stops(BOOT, 100.0, 101.0, journal)
    assert found.stops == [UnitStop("a.service", 100.1, 100.5), UnitStop("b.service", 100.2, 100.9)]
    assert found.unknown == []
    assert {"_BOOT_ID": BOOT, "_PID": "1"} in journal.matches
    assert journal.opened == journal.closed


@pytest.mark.parametrize(("delay", "sent"), [(0.25, 100.25), (0.0, 100.5), (-3600.0, 100.5), (3600.0, 100.5)])
def test_a_message_counts_from_when_it_was_sent(delay: float, sent: float) -> None:
    """journald takes it later; with a wall clock that was set in between nothing is known of that."""
    taken = datetime(2026, 11, 26, tzinfo=UTC)
    stamps = {"__REALTIME_TIMESTAMP": taken, "_SOURCE_REALTIME_TIMESTAMP": taken - timedelta(seconds=delay)}
    begun = entry(UNIT_STOPPING, "a.service", 100.5) | stamps
    found = read_stops(BOOT, 100.0, 101.0, Journal([begun, entry(UNIT_STOPPED, "a.service", 100.9)]))
    assert found.stops == [UnitStop("a.service", sent, 100.9)]


def test_a_boot_id_with_dashes_is_the_same() -> None:
    journal = Journal([entry(UNIT_STOPPING, "a.service", 100.1), entry(UNIT_STOPPED, "a.service", 100.9)])
    assert read_stops(str(uuid.UUID(BOOT)), 100.0, 101.0, journal).stops == [UnitStop("a.service", 100.1, 100.9)]


def test_a_stop_without_an_end_lasts_as_long_as_the_shutdown_and_is_named() -> None:
    found = read_stops(BOOT, 100.0, 105.0, Journal([entry(UNIT_STOPPING, "a.service", 104.9)]))
    assert found.stops == [UnitStop("a.service", 104.9, 105.0)]
    assert [line for line in found.unknown if "1 unit had stopped" in line]


def test_a_journal_that_ends_early_is_named() -> None:
    journal = Journal([entry(UNIT_STOPPING, "a.service", 100.1), entry(UNIT_STOPPED, "a.service", 100.2)])
    assert any("the last 4.8 s" in line for line in read_stops(BOOT, 100.0, 105.0, journal).unknown)


@pytest.mark.parametrize(
    ("entries", "unknown"),
    [
        ([], NO_BOOT),
        ([entry("0" * 31 + "1", "a.service", 5.0)], NO_STOP),
        ([entry(UNIT_STOPPING, "a.service", 100.5, OTHER)], NO_STOP),
    ],
    ids=["volatile", "nothing said", "another boot"],
)
def test_what_the_journal_does_not_have_is_said(entries: list[dict[str, Any]], unknown: str) -> None:
    found = read_stops(BOOT, 100.0, 101.0, Journal(entries))
    assert (found.stops, found.unknown) == ([], [unknown])


def test_entries_without_their_fields_are_left_out() -> None:
    good = [entry(UNIT_STOPPING, "a.service", 100.1), entry(UNIT_STOPPED, "a.service", 100.9)]
    bad: list[dict[str, Any]] = [
        {"UNIT": "x.service"},
        good[0] | {"__MONOTONIC_TIMESTAMP": "soon"},
        good[0] | {"UNIT": b"\xff"},
        good[0] | {"UNIT": ["a.service", "b.service"]},
        good[0] | {"MESSAGE_ID": "?"},
    ]
    found = read_stops(BOOT, 100.0, 101.0, Journal([*bad, *good]))
    assert found.stops == [UnitStop("a.service", 100.1, 100.9)]


def test_an_endless_journal_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stops, "MAX_MESSAGES", 10)
    many = [entry(UNIT_STOPPING, f"{number}.service", 100.5) for number in range(100)]
    found = read_stops(BOOT, 100.0, 100.6, Journal(many))
    assert len(found.stops) == 10
    assert CUT_OFF in found.unknown


def test_a_slow_journal_is_left() -> None:
    many = [entry(UNIT_STOPPING, f"{number}.service", 100.5) for number in range(100)]
    clock = iter(float(number) for number in range(1000))
    found = read_stops(BOOT, 100.0, 100.6, Journal(many), clock.__next__)
    assert 0 < len(found.stops) < 100
    assert CUT_OFF in found.unknown


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker("journal", "The journal")
    yield made
    made.close()


def reads(monkeypatch: pytest.MonkeyPatch, made: Callable[..., stops.Stops]) -> None:
    monkeypatch.setattr(departure, "read_stops", made)


async def test_a_departure_has_the_stamps_and_the_stops(
    place: Path, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, float, float]] = []

    def read(*where: Any) -> stops.Stops:
        asked.append(where)
        return stops.Stops([UnitStop("a.service", 100.1, 100.9)], ["Something is not known."])

    reads(monkeypatch, read)
    async with fake_bus(place) as bus:
        bus.stamps = BOOTED | SHUTDOWN
        found = await read_departure(BOOT, worker, minimum_uptime=15.0)
    assert asked == [(BOOT, 100.0, 100.981)]
    assert found == Departure(
        100.0,
        100.981,
        101.16,
        101.375,
        stops=[UnitStop("a.service", 100.1, 100.9)],
        unknown=["Something is not known."],
    )


async def test_after_a_jump_at_once_there_is_nothing_to_read(
    place: Path, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads(monkeypatch, lambda *_: pytest.fail("the journal was read"))
    async with fake_bus(place) as bus:
        bus.stamps = BOOTED | dict.fromkeys(SHUTDOWN, 0)
        assert await read_departure(BOOT, worker) == Departure()


@pytest.mark.parametrize(
    ("minimum", "suspended", "slept"),
    [(101.37, 0.0, 0.21), (111.37, 10.0, 0.21), (0.0, 0.0, None), (15.0, 0.0, None), (200.0, 0.0, None)],
)
async def test_a_sleep_ends_when_the_minimum_is_reached(
    place: Path, worker: Worker, monkeypatch: pytest.MonkeyPatch, minimum: float, suspended: float, slept: float | None
) -> None:
    """LateFinish is 101.375 s, LateStart 101.16 s."""
    reads(monkeypatch, lambda *_: stops.Stops())
    async with fake_bus(place) as bus:
        bus.stamps = SHUTDOWN
        found = await read_departure(BOOT, worker, minimum_uptime=minimum, suspended=suspended)
    assert found.sleep_seconds == (None if slept is None else pytest.approx(slept))


@pytest.mark.parametrize("error", [OSError(13, "Permission denied"), ValueError("not a journal")])
async def test_a_journal_that_cannot_be_read_is_said_and_no_more(
    place: Path, worker: Worker, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def read(*_: Any) -> stops.Stops:
        raise error

    reads(monkeypatch, read)
    async with fake_bus(place) as bus:
        bus.stamps = SHUTDOWN
        found = await read_departure(BOOT, worker)
    assert found.start_monotonic == 100.0
    assert [line for line in found.unknown if str(error.args[-1]) in line]


@pytest.mark.usefixtures("place")
async def test_without_systemd_a_departure_says_so(worker: Worker) -> None:
    assert await read_departure(BOOT, worker) == Departure(unknown=[NO_ANSWER])
