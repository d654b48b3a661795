# SPDX-License-Identifier: LGPL-2.1-or-later
"""The timeline's picture: every bar and label lies in it, at the place its time has."""

import itertools
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace

import pytest

from khoctl.report.picture import CHAR_PIXELS, MIN_BAR, NARROW, WIDE, draw_file, draw_picture
from khoctl.timeline_rows import MAX_CHILDREN
from khod.history.model import RowKind, Timeline, TimelineRow
from tests.unit import attempts

TIMELINES = {
    "orderly": attempts.orderly_attempt().timeline,
    "200 producers": attempts.orderly_attempt(200).timeline,
    "wall clock": attempts.degraded_attempt().timeline,
    "cold boot": attempts.cold_boot_attempt().timeline,
    "rolled back": attempts.rolled_back_attempt().timeline,
    "hostile": attempts.hostile_attempt().timeline,
    "nothing": Timeline(),
    "one moment": Timeline([TimelineRow(RowKind.step, "freeze", 0.0, 0.0)]),
    "wide characters": Timeline([TimelineRow(RowKind.unit, "接続" * 40, 0.0, 3.0)]),
    "a day before": Timeline(
        [TimelineRow(RowKind.wait, "wait", -86400.0, 86400.0), *attempts.orderly_attempt().timeline.rows], 15.0
    ),
    "microseconds": Timeline([TimelineRow(RowKind.step, "freeze", 0.0, 2e-6)], 2e-6),
}
every_timeline = pytest.mark.parametrize("timeline", TIMELINES.values(), ids=TIMELINES.keys())
every_width = pytest.mark.parametrize("width", [WIDE, NARROW])


def draw(timeline: Timeline, width: int = WIDE) -> ET.Element:
    return ET.fromstring(draw_picture(timeline, width))


def bars(picture: ET.Element) -> list[ET.Element]:
    """The bars of the rows, without hatches and the legend."""
    return [found for group in picture.iter("g") for found in group.findall("rect") if not found.get("fill")]


def labels(picture: ET.Element) -> Iterator[tuple[float, float, float, str]]:
    """The left, the right, the base line and the text of each label, with the widest characters it may have."""
    for found in picture.iter("text"):
        text = found.text or ""
        size = CHAR_PIXELS * sum(2 if ord(char) > 0x2FFF else 1 for char in text)
        at, names = float(found.get("x", "nan")), (found.get("class") or "").split()
        left = at - size if "t-value" in names else at - size / 2 if "t-middle" in names else at
        yield left, left + size, float(found.get("y", "nan")), text


@every_timeline
@every_width
def test_everything_lies_in_the_picture(timeline: Timeline, width: int) -> None:
    picture = draw(timeline, width)
    left, top, wide, high = map(float, picture.get("viewBox", "").split())
    assert (left, wide) == (0, width)
    for box in picture.findall("rect") + bars(picture):
        x, y, w, h = (float(box.get(name, "nan")) for name in ("x", "y", "width", "height"))
        assert w > 0
        assert h > 0
        assert left <= x <= x + w <= left + wide
        assert top <= y <= y + h <= top + high
    for begin, end, base, text in labels(picture):
        assert left <= begin <= end <= left + wide, text
        assert top + 8 <= base <= top + high - 2, text


@every_timeline
@every_width
def test_no_label_covers_another(timeline: Timeline, width: int) -> None:
    found = sorted(labels(draw(timeline, width)), key=lambda label: label[2])
    for number, (left, right, base, text) in enumerate(found):
        for other_left, other_right, other_base, other in found[number + 1 :]:
            if other_base - base >= 11:  # the height of the smaller text
                break
            assert right <= other_left or other_right <= left, (text, other)


@every_timeline
def test_no_number_of_the_picture_is_unreal(timeline: Timeline) -> None:
    for found in draw(timeline).iter():
        for value in found.attrib.values():
            assert not re.search(r"\b(nan|inf)\b", value)


def test_a_row_that_has_no_time_is_not_drawn() -> None:
    rows = [TimelineRow(RowKind.step, "freeze", math.nan, 1.0), TimelineRow(RowKind.step, "load", 0.0, math.inf)]
    assert bars(draw(Timeline(rows))) == []


@every_width
def test_bars_are_as_long_as_their_times(width: int) -> None:
    picture = draw(TIMELINES["orderly"], width)
    rows = {row.name: row for row in TIMELINES["orderly"].rows if not row.parent}
    drawn = {(group.findtext("text") or ""): group.find("rect") for group in picture.iter("g")}
    long = {name: row for name, row in rows.items() if row.seconds > 0.4 and name in drawn}
    assert len(long) > 8
    pixels = {name: float(found.get("width", "nan")) for name, found in drawn.items() if found is not None}
    for name, row in long.items():
        assert pixels[name] / pixels["shutdown"] == pytest.approx(row.seconds / 4.9, abs=0.001)


def test_rows_follow_one_another_without_a_gap() -> None:
    picture = draw(TIMELINES["orderly"])
    spans = [
        (float(box.get("x", "nan")), float(box.get("width", "nan")))
        for box in bars(picture)
        if box.get("opacity") == "1"
    ]
    for (begin, size), (after, _) in itertools.pairwise(spans):
        assert begin + size == pytest.approx(after, abs=0.02) or size == MIN_BAR


def test_of_many_children_the_slowest_are_drawn() -> None:
    timeline = TIMELINES["200 producers"]
    picture = draw(timeline)
    shown = [group.findall("text")[0].text for group in picture.iter("g")]
    for parent in ("prepare", "freeze", "restore"):
        children = sorted((row for row in timeline.rows if row.parent == parent), key=lambda row: -row.seconds)
        at = shown.index(parent)
        assert {row.name for row in children[:MAX_CHILDREN]} == set(shown[at + 1 : at + 1 + MAX_CHILDREN])
        assert shown[at + 1 + MAX_CHILDREN] == "192 more"


def test_a_large_error_is_hatched_and_explained() -> None:
    wall, tsc = draw(TIMELINES["wall clock"]), draw(TIMELINES["orderly"])
    hatched = [group.findtext("text") for group in wall.iter("g") for box in group.findall("rect") if box.get("fill")]
    assert hatched == ["LUO preservation and the jump"]
    assert "largest error" in [found.text for found in wall.iter("text")]
    assert "largest error" not in [found.text for found in tsc.iter("text")]
    assert list(tsc.iter("pattern")) == []


def test_what_began_long_before_is_cut_off_and_marked() -> None:
    picture = draw(TIMELINES["a day before"])
    waited, *others = list(picture.iter("g"))
    assert waited.findall("text")[1].text == "86400.000 s"
    assert [found.get("class") for found in waited.findall("path")] == ["t-mark"]
    assert not [found for group in others for found in group.findall("path") if found.get("class") == "t-mark"]
    shutdown = next(group for group in others if group.findtext("text") == "shutdown").find("rect")
    assert shutdown is not None
    assert float(shutdown.get("width", "nan")) > 80


def test_a_child_without_its_parent_is_drawn_all_the_same() -> None:
    row = TimelineRow(RowKind.unit, "ssh.service", 1.0, 2.0, parent="shutdown")
    assert len(bars(draw(Timeline([row])))) == 1


def test_a_file_stands_for_itself() -> None:
    """It has its namespace, its size and its style, and refers to nothing outside."""
    text = draw_file(attempts.hostile_attempt().timeline)
    picture = ET.fromstring(text)
    assert picture.tag == "{http://www.w3.org/2000/svg}svg"
    assert picture.find("{*}style") is not None
    assert float(picture.get("width", "nan")) == WIDE + 32
    assert "script" not in {found.tag.partition("}")[2] for found in picture.iter()}
    assert text.count("://") == 1


def test_a_blackout_that_is_not_known_is_not_drawn() -> None:
    timeline = replace(TIMELINES["orderly"], blackout_seconds=None)
    assert not [found.text for found in draw(timeline).iter("text") if "blackout" in (found.text or "")]
    assert [found.text for found in draw(TIMELINES["orderly"]).iter("text") if "blackout" in (found.text or "")] == [
        "blackout 15.000 s ± 0.004 s"
    ]


def test_a_step_that_was_tried_twice_has_its_own_children() -> None:
    rows = [
        TimelineRow(RowKind.step, "freeze", 0.0, 1.0, detail="failed"),
        TimelineRow(RowKind.step, "freeze", 3.0, 1.0),
        TimelineRow(RowKind.producer, "database", 0.0, 1.0, parent="freeze", detail="busy"),
        TimelineRow(RowKind.producer, "database", 3.0, 0.5, parent="freeze"),
    ]
    shown = [(group.findtext("text"), group.findall("text")[1].text) for group in draw(Timeline(rows)).iter("g")]
    assert shown == [
        ("freeze: failed", "1.000 s"),
        ("database: busy", "1.000 s"),
        ("freeze", "1.000 s"),
        ("database", "0.500 s"),
    ]
