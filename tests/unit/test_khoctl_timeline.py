# SPDX-License-Identifier: LGPL-2.1-or-later
"""A timeline as the terminal shows it, at every width, with names and sentences of others in it."""

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from khoctl.timeline import NO_ROWS, STOPPED, draw_timeline
from khoctl.timeline_rows import MAX_CHILDREN
from khod.errors import Exit
from khod.history.model import ClockSource, RowKind, Standstill, Timeline, TimelineRow, UnitStop
from khod.history.timeline import build_timeline
from khod.model import Phase
from khod.values import decode_value
from tests.unit.histories import attempt, fill, run_of
from tests.unit.khods import Answer, cli
from tests.unit.timelines import DEPARTURE, ZERO, at_once, orderly

NASTY = "\x1b[2J\x1b]0;x\x07\r\nidle: all is well\u202e"


def drawn(timeline: Timeline, width: int | None = None) -> list[str]:
    return list(draw_timeline(timeline, width))


def test_the_page_of_a_handover() -> None:
    """Each row stands with its begin and duration, to the millisecond, and a bar at its place.

    The error is 500 ppm of the 23 s between the readings that are bridged, and of the 12 s of the boot that was read.
    """
    lines = drawn(build_timeline(orderly()), 100)
    assert lines[0].startswith("Blackout: 19.700 s ± 0.018 s, from the first `freeze` to the last `finish`")
    rows = {match[3].strip(): (match[1], match[2], match[4]) for line in lines if (match := ROW.match(line))}
    assert rows["prepare"] == ("-3.000", "1.000", None)
    assert rows["freeze"][:2] == ("0.000", "0.250")
    assert rows["LUO and jump (± 0.018 s)"][:2] == ("5.400", "4.600")
    assert rows["ssh.service"][:2] == ("1.000", "3.900")
    assert rows["finish"][:2] == ("19.500", "0.200")
    assert rows["until shutdown"][2].startswith(".")
    assert rows["shutdown"][2].startswith("#")
    assert rows["ssh.service"][2].startswith("=")


def test_how_long_producers_were_stopped_stands_below_the_rows() -> None:
    made = [
        Standstill(f"vm{number}", "vm", 20.0 - number, 0.004, 19.5 if number == 0 else None) for number in range(10)
    ]
    lines = drawn(replace(build_timeline(orderly()), standstills=made), 100)
    at = lines.index(STOPPED)
    assert lines[at + 1] == "  vm0 (vm): 20.000 s ± 0.004 s, by its own clock 19.500 s"
    assert lines[at + 2] == "  vm1 (vm): 19.000 s ± 0.004 s"
    assert lines[at + 9] == "  2 more: at most 12.000 s ± 0.004 s"


ROW = re.compile(r" *(-?[0-9.]+) s +([0-9.]+) s  (.*?)(?:  +([#=.]+))?$")


def bar(line: str) -> tuple[int, int] | None:
    found = re.search(r"  ([#=.]+)$", line)
    return (found.start(1), found.end(1)) if found else None


@pytest.mark.parametrize("width", [80, 120, 400])
def test_bars_follow_one_another_to_the_end_of_the_line(width: int) -> None:
    lines = [line for line in drawn(build_timeline(at_once()), width) if re.search(r"  [#.]+$", line)]
    bars = [found for line in lines if (found := bar(line))]
    assert len(bars) == len(lines) == 9
    for (_, end), (begin, _) in itertools.pairwise(bars):
        assert abs(begin - end) <= 1
    assert bars[-1][1] == width


@pytest.mark.parametrize("width", [40, 60, 80, 81, 400, None])
def test_no_line_is_longer_than_the_terminal(width: int | None) -> None:
    log = orderly()
    log.departure = DEPARTURE.__class__(**vars(DEPARTURE) | {"unknown": ["A long sentence. " * 20]})
    for line in drawn(build_timeline(log), width):
        assert len(line) <= max(width or 80, 46), line


def test_only_the_longest_units_are_drawn() -> None:
    log = orderly()
    stops = [UnitStop(f"unit-{number}.service", ZERO + 1, ZERO + 1 + number / 100) for number in range(1, 43)]
    log.departure = DEPARTURE.__class__(**vars(DEPARTURE) | {"stops": stops})
    lines = drawn(build_timeline(log), 100)
    shown = [int(found[1]) for line in lines if (found := re.search(r"unit-(\d+)\.service", line))]
    assert sorted(shown) == list(range(43 - MAX_CHILDREN, 43))
    assert len([line for line in lines if f"{42 - MAX_CHILDREN} more" in line]) == 1


def test_a_wall_clock_s_error_is_a_whole_second() -> None:
    log = orderly()
    log.readings = [one.__class__(**vars(one) | {"tsc": None}) for one in log.readings]
    lines = drawn(build_timeline(log), 100)
    assert re.match(r"Blackout: 19\.7 s ± 1\.1 s, .*, bridged by the wall clock\.$", lines[0])
    assert any("LUO and jump (± 1.1 s)" in line for line in lines)


def test_what_systemd_analyze_says_and_what_is_not_known_stand_below() -> None:
    log = orderly()
    log.readings = []
    lines = drawn(build_timeline(log), 100)
    assert lines[0] == "Blackout: not known."
    assert "systemd-analyze time: Startup finished in 1.250s (kernel)" in lines
    assert any(line.startswith("Not known: ") for line in lines)


def test_an_empty_timeline_is_a_sentence() -> None:
    assert drawn(Timeline()) == ["Blackout: not known.", NO_ROWS]


def test_nothing_moves_the_cursor() -> None:
    rows = [TimelineRow(RowKind.step, "freeze", 0.0, 1.0)]
    rows.append(TimelineRow(RowKind.producer, NASTY, 0.0, 1.0, parent="freeze", detail=NASTY))
    timeline = Timeline(rows, 1.0, 0.1, ClockSource.ptp, [NASTY], NASTY)
    for line in drawn(timeline, 120):
        assert line.isprintable(), line


# The command


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = attempt(1)
    fill(tmp_path / "copy.db", replace(made, timeline=build_timeline(orderly())), attempt(2, Phase.idle))
    return tmp_path / "copy.db"


def khoctl(*words: str | Path) -> Answer:
    return cli(Path("/nowhere"), "timeline", *words)


def test_a_run_is_drawn_from_a_file_without_khod(file: Path) -> None:
    answer = khoctl(run_of(1), "--db", file)
    assert answer.code == Exit.done
    lines = answer.out.splitlines()
    assert lines[0] == f"{run_of(1)}: 7.3.4 to 7.3.5, verified"
    assert lines[1:] == drawn(build_timeline(orderly()))


def test_without_a_run_it_is_the_last_attempt(file: Path) -> None:
    lines = khoctl("--db", file).out.splitlines()
    assert lines[0].startswith(run_of(2))
    assert lines[1:] == ["Blackout: not known.", NO_ROWS]


def test_json_is_the_timeline_itself(file: Path) -> None:
    found = json.loads(khoctl(run_of(1), "--db", file, "--json").out)
    assert decode_value(Timeline, found) == build_timeline(orderly())


def test_a_run_that_is_not_there_is_a_usage_error(file: Path) -> None:
    answer = khoctl("ffffffff", "--db", file)
    assert answer.code == Exit.usage
    assert "ffffffff" in answer.err
