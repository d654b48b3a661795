# SPDX-License-Identifier: LGPL-2.1-or-later
"""The window of a profile: weekdays and times of day at which a handover may begin.

It is open while a clock on the wall in its time zone shows a time within it. So a change of summer time needs no rule:
an hour that does not exist is left out, and one that comes twice is open twice.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from khod.errors import ConfigError, Refused
from khod.files import Fragment
from khod.text import printable

DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
LONG_DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
MINUTES_A_DAY = 24 * 60
MINUTE = timedelta(minutes=1)
LOOKED_AHEAD = timedelta(days=15)
"""How far an opening is looked for: the one of a week may fall into an hour that does not exist."""
TIME_OF_DAY = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])|24:00")
LOCAL_TIME = Path("/etc/localtime")


@dataclass(frozen=True)
class Window:
    """From `begin` to `end` (minutes of the day) on these weekdays (0 is Monday), those on which it opens.

    With an end that is not after the begin it ends on the next day; with the same time it is open for 24 hours.
    """

    days: frozenset[int]
    begin: int
    end: int
    zone: tzinfo
    zone_name: str

    def is_open(self, at: datetime) -> bool:
        """Whether it is open at this instant."""
        local = at.astimezone(self.zone)
        minute, day = local.hour * 60 + local.minute, local.weekday()
        if self.begin < self.end:
            return day in self.days and self.begin <= minute < self.end
        began_today = day in self.days and minute >= self.begin
        return began_today or ((day - 1) % len(DAYS) in self.days and minute < self.end)

    def find_opening(self, after: datetime) -> datetime | None:
        """Return when it opens next; None if it does not within LOOKED_AHEAD."""
        return next((at for at in _next_minutes(after) if self.is_open(at)), None)

    def find_closing(self, after: datetime) -> datetime | None:
        """Return when the open window closes; None if it does not within LOOKED_AHEAD."""
        return next((at for at in _next_minutes(after) if not self.is_open(at)), None)

    def describe(self) -> str:
        """Return its days, times and time zone."""
        times = f"{_format_time(self.begin)}-{_format_time(self.end)}"
        days = "" if len(self.days) == len(DAYS) else f"{','.join(DAYS[day] for day in sorted(self.days))} "
        return f"{days}{times} {self.zone_name}".rstrip()

    def describe_state(self, now: datetime) -> str:
        """Return whether it is open, and until or from when."""
        if self.is_open(now):
            closing = self.find_closing(now)
            return f"open until {self._format_instant(closing)}" if closing else "open"
        opening = self.find_opening(now)
        return f"closed; it opens next {self._format_instant(opening)}" if opening else "closed; it does not open"

    def require_open(self, profile: str, now: datetime) -> None:
        """Raise Refused, with the time of the next opening, if it is closed."""
        if not self.is_open(now):
            raise Refused(
                f"The window of profile {profile} ({self.describe()}) is {self.describe_state(now)}",
                where="window",
                remedy="Wait until then, or have it ignored: --ignore-window",
            )

    def _format_instant(self, at: datetime) -> str:
        return f"{at.astimezone(self.zone):%a %Y-%m-%d %H:%M %Z}".rstrip()


def _next_minutes(after: datetime) -> Iterator[datetime]:
    """Yield each full minute after an instant; the clocks of all zones change at one."""
    at = after.astimezone(UTC).replace(second=0, microsecond=0)
    ends = at + LOOKED_AHEAD
    while at < ends:
        at += MINUTE
        yield at


def _format_time(minute: int) -> str:
    return f"{minute // 60:02}:{minute % 60:02}"


def parse_window(values: dict[str, Any], fragment: Fragment) -> Window:
    """Return the window of the table [window] of a profile, whose values have their types; ConfigError otherwise."""
    begin, end = (
        _parse_time(values.get(key, known), key, fragment) for key, known in (("from", "00:00"), ("to", "24:00"))
    )
    days = _parse_days(values.get("days", DAYS), fragment)
    name = values.get("timezone", "")
    try:
        zone = ZoneInfo(name) if name else read_local_zone()
    except (OSError, ValueError, KeyError):  # ZoneInfoNotFoundError is a KeyError
        raise ConfigError(
            f"`window.timezone` is {name!r}, which this host does not know",
            where=fragment.locate_key("window.timezone"),
            remedy='Name one of: timedatectl list-timezones, for example "Europe/Berlin".',
        ) from None
    return Window(days, begin % MINUTES_A_DAY, end, zone, name)


def read_local_zone(path: Path = LOCAL_TIME) -> tzinfo:
    """Return the time zone of the host, whatever TZ says: a unit and a terminal must agree. UTC if it has none."""
    try:
        with path.open("rb") as file:
            return ZoneInfo.from_file(file)
    except FileNotFoundError:
        return UTC


def _parse_time(text: str, key: str, fragment: Fragment) -> int:
    found = TIME_OF_DAY.fullmatch(text)
    if not found or (key == "from" and not found[1]):  # the end of a day is not the begin of a window
        raise ConfigError(
            f"`window.{key}` is {text!r}",
            where=fragment.locate_key(f"window.{key}"),
            remedy='It must be a time of day, for example "22:00".',
        )
    return int(found[1]) * 60 + int(found[2]) if found[1] else MINUTES_A_DAY


def _parse_days(texts: Sequence[str], fragment: Fragment) -> frozenset[int]:
    """Return the weekdays of names and of ranges of names (`Mon-Fri`, `Sat-Mon`)."""
    found: set[int] = set()
    for text in texts or ("",):  # a window that never opens is a mistake
        first, dash, last = text.partition("-")
        begin, end = _find_day(first), _find_day(last if dash else first)
        if begin is None or end is None:
            raise ConfigError(
                f"`window.days` has {printable(text)!r}",
                where=fragment.locate_key("window.days"),
                remedy=f"It takes weekdays and ranges of them: {', '.join(DAYS)}, Mon-Fri.",
            )
        found |= {(begin + step) % len(DAYS) for step in range((end - begin) % len(DAYS) + 1)}
    return frozenset(found)


def _find_day(text: str) -> int | None:
    """Return the number of a weekday that is named in English, in full or by its first three letters."""
    names = [(day.lower(), long) for day, long in zip(DAYS, LONG_DAYS, strict=True)]
    return next((number for number, known in enumerate(names) if text.strip().lower() in known), None)
