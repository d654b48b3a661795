# SPDX-License-Identifier: LGPL-2.1-or-later
"""The window of a profile: weekdays, midnight, time zones, and the two changes of summer time."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from khoctl import window
from khod.errors import Refused
from khod.files import Fragment

BERLIN = "Europe/Berlin"  # summer time from 2026-03-29 02:00 CET to 2026-10-25 03:00 CEST


def make(**values: Any) -> window.Window:
    given = {"timezone": BERLIN} | {key.rstrip("_"): value for key, value in values.items()}
    return window.parse_window(given, Fragment(Path("next.toml"), "", {}))


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def local(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(BERLIN))


WEEKDAYS = {"days": ("Mon-Fri",), "from_": "22:00", "to": "04:00"}
DAYTIME = {"days": ("sat", "Sunday"), "from_": "08:00", "to": "18:00"}


@pytest.mark.parametrize(
    ("values", "at", "is_open"),
    [
        (WEEKDAYS, "2026-11-27 21:59", False),  # a Friday
        (WEEKDAYS, "2026-11-27 22:00", True),
        (WEEKDAYS, "2026-11-28 03:59", True),  # of Friday's window
        (WEEKDAYS, "2026-11-28 04:00", False),
        (WEEKDAYS, "2026-11-28 23:00", False),
        (WEEKDAYS, "2026-11-30 01:00", False),  # Sunday has no window
        (WEEKDAYS, "2026-11-30 23:59", True),
        (DAYTIME, "2026-11-28 08:00", True),
        (DAYTIME, "2026-11-29 17:59", True),
        (DAYTIME, "2026-11-29 18:00", False),
        (DAYTIME, "2026-11-30 12:00", False),
        ({"days": ("Sat-Mon",)}, "2026-11-30 12:00", True),
        ({"days": ("Sat-Mon",)}, "2026-12-01 00:00", False),
        ({"from_": "10:00", "to": "10:00"}, "2026-11-30 09:59", True),
        ({"days": ("Mon",), "from_": "10:00", "to": "10:00"}, "2026-11-30 09:59", False),
        ({"days": ("Mon",), "from_": "10:00", "to": "10:00"}, "2026-12-01 09:59", True),
        ({"from_": "22:00", "to": "24:00"}, "2026-11-30 23:59", True),
        ({"from_": "22:00", "to": "00:00"}, "2026-11-30 00:00", False),
    ],
)
def test_when_it_is_open(values: dict[str, Any], at: str, is_open: bool) -> None:
    assert make(**values).is_open(local(at)) == is_open


@pytest.mark.parametrize(
    ("values", "at", "opens", "closes"),
    [
        # The hour from 02:00 to 03:00 does not exist on 2026-03-29.
        ({"from_": "01:30", "to": "02:30"}, "2026-03-29 00:29", "2026-03-29 00:30", "2026-03-29 01:00"),
        ({"from_": "02:30", "to": "04:00"}, "2026-03-29 00:59", "2026-03-29 01:00", "2026-03-29 02:00"),
        ({"from_": "02:15", "to": "02:45"}, "2026-03-29 00:59", "2026-03-30 00:15", "2026-03-30 00:45"),
        ({"from_": "23:00", "to": "02:30"}, "2026-03-28 21:00", "2026-03-28 22:00", "2026-03-29 01:00"),
        # And it comes twice on 2026-10-25.
        ({"from_": "02:00", "to": "03:00"}, "2026-10-24 23:59", "2026-10-25 00:00", "2026-10-25 02:00"),
        ({"from_": "02:15", "to": "02:45"}, "2026-10-25 00:00", "2026-10-25 00:15", "2026-10-25 00:45"),
        ({"from_": "02:15", "to": "02:45"}, "2026-10-25 00:50", "2026-10-25 01:15", "2026-10-25 01:45"),
        ({"from_": "23:00", "to": "04:00"}, "2026-10-24 20:00", "2026-10-24 21:00", "2026-10-25 03:00"),
    ],
)
def test_the_changes_of_summer_time(values: dict[str, Any], at: str, opens: str, closes: str) -> None:
    """All instants are in UTC."""
    made = make(**values)
    opening = made.find_opening(utc(at))
    assert opening == utc(opens)
    assert made.find_closing(opening) == utc(closes)


def test_a_weekly_window_in_an_hour_that_does_not_exist_opens_a_week_later() -> None:
    made = make(days=("Sun",), from_="02:15", to="02:45")
    assert made.find_opening(utc("2026-03-22 12:00")) == utc("2026-04-05 00:15")


def test_a_closed_window_says_when_it_opens_next() -> None:
    with pytest.raises(Refused) as raised:
        make(**WEEKDAYS).require_open("nightly", local("2026-11-28 12:34"))
    assert raised.value.what == (
        "The window of profile nightly (Mon,Tue,Wed,Thu,Fri 22:00-04:00 Europe/Berlin) is closed; it opens next "
        "Mon 2026-11-30 22:00 CET"
    )
    assert "--ignore-window" in raised.value.remedy
    made = make(**WEEKDAYS)
    assert made.describe_state(local("2026-11-30 23:00")) == "open until Tue 2026-12-01 04:00 CET"


def test_a_window_without_an_end_has_no_closing() -> None:
    made = make()
    assert (made.describe(), made.find_closing(utc("2026-11-28 12:34"))) == ("00:00-24:00 Europe/Berlin", None)
    assert made.describe_state(utc("2026-11-28 12:34")) == "open"


def test_without_a_time_zone_it_is_the_host_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever TZ says: a terminal and a unit must find the same."""
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert window.read_local_zone(tmp_path / "localtime") is UTC
    (tmp_path / "localtime").symlink_to(f"/usr/share/zoneinfo/{BERLIN}")
    zone = window.read_local_zone(tmp_path / "localtime")
    assert local("2026-07-01 12:00").astimezone(zone).hour == 12
