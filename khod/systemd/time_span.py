# SPDX-License-Identifier: LGPL-2.1-or-later
"""Time spans as systemd writes and reads them (systemd.time(7)): `15`, `1min 30s`, `infinity`."""

import math
import re

from khod.text import ASCII_SPACE

MICROSECONDS = {
    **dict.fromkeys(("seconds", "second", "sec", "s"), 10**6),
    **dict.fromkeys(("minutes", "minute", "min"), 60 * 10**6),
    **dict.fromkeys(("months", "month", "M"), 2629800 * 10**6),
    **dict.fromkeys(("msec", "ms"), 1000),
    "m": 60 * 10**6,
    **dict.fromkeys(("hours", "hour", "hr", "h"), 3600 * 10**6),
    **dict.fromkeys(("days", "day", "d"), 86400 * 10**6),
    **dict.fromkeys(("weeks", "week", "w"), 7 * 86400 * 10**6),
    **dict.fromkeys(("years", "year", "y"), 31557600 * 10**6),
    **dict.fromkeys(("usec", "us", "\u03bcs", "\u00b5s"), 1),
}
"""systemd.time(7), in the order in which systemd tries them (extract_multiplier() in src/basic/time-util.c)."""
NUMBER = re.compile(r"\+?([0-9]+)(?:\.([0-9]+))?")
USEC_INFINITY = 2**64 - 1
SHOWN = (
    ("y", 31557600 * 10**6),
    ("month", 2629800 * 10**6),
    ("w", 7 * 86400 * 10**6),
    ("d", 86400 * 10**6),
    ("h", 3600 * 10**6),
    ("min", 60 * 10**6),
    ("s", 10**6),
    ("ms", 1000),
    ("us", 1),
)
"""The units in which systemd writes a time span, with their microseconds."""
MINUTE = 60 * 10**6


def parse_span(text: str) -> float | None:
    """Return the seconds of a time span, as systemd's parse_sec() does; None if it is not one."""
    found = parse_microseconds(text)
    if found is None:
        return None
    return math.inf if found == USEC_INFINITY else found / 10**6


def parse_microseconds(text: str, *, unit_microseconds: int = 10**6) -> int | None:
    """Return the microseconds of a time span, USEC_INFINITY for no end; None if it is not one.

    `unit_microseconds` is the unit of a number without one.
    """
    text = text.strip(ASCII_SPACE)
    if text == "infinity":
        return USEC_INFINITY
    total, left = 0, text
    while left:
        number = NUMBER.match(left)
        if number is None:
            return None
        rest = left[number.end() :]
        left = rest.lstrip(ASCII_SPACE)
        unit = next((unit for unit in MICROSECONDS if left.startswith(unit)), "")
        if not unit and rest and left == rest:  # something else directly after the number
            return None
        left = left[len(unit) :].lstrip(ASCII_SPACE)
        scale = MICROSECONDS[unit] if unit else unit_microseconds
        whole, fraction = number[1], number[2] or ""
        if len(whole) > len(str(USEC_INFINITY)):
            return None
        total += int(whole) * scale
        for digit in fraction:
            scale //= 10
            total += int(digit) * scale
    return total if text and total < USEC_INFINITY else None


def format_span(microseconds: int, accuracy: int) -> str:
    """Write a time span as systemd's format_timespan() does; `accuracy` is a power of ten, in microseconds.

    Below a minute the last unit has a fraction: `1min 2.345s`, `981ms`.
    """
    if microseconds <= 0:
        return "0"
    words, left = list[str](), microseconds
    for name, unit in SHOWN:
        if left <= 0 or (left < accuracy and words):
            break
        if left < unit:
            continue
        whole, rest = divmod(left, unit)
        digits = len(str(unit)) - len(str(accuracy))
        if left < MINUTE and rest and digits > 0:
            words.append(f"{whole}.{rest // accuracy:0{digits}}{name}")
            break
        words.append(f"{whole}{name}")
        left = rest
    return " ".join(words)
