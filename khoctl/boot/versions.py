# SPDX-License-Identifier: LGPL-2.1-or-later
"""Compare versions by the Version Format Specification (UAPI.10, uapi-group.org)."""

import re

_SKIPPED = re.compile(r"[^a-zA-Z0-9.~^-]*")
_DIGITS = re.compile(r"[0-9]*")
_LETTERS = re.compile(r"[a-zA-Z]*")
_LONGEST = 1 << 14
"""The number of characters compared; every step copies the rest."""
_MARKS = ("~", "", "-", "^", ".")
"""Characters that sort before all others, lowest first; "" is the end of the string."""


def compare_versions(left: str, right: str) -> int:
    """Return -1 if `left` is the older version, 1 if it is the newer, 0 if they are equal.

    The steps are in the specification's order: `123~rc1` < `123` < `123-1` < `123.1`, and 9 < 10.
    """
    left, right = left[:_LONGEST], right[:_LONGEST]
    while True:
        left, right = left[len(_matching_head(_SKIPPED, left)) :], right[len(_matching_head(_SKIPPED, right)) :]
        for mark in _MARKS:
            ours, theirs = left[:1] == mark, right[:1] == mark
            if ours != theirs:
                return -1 if ours else 1
            if ours and not mark:
                return 0
            if ours:
                left, right = left[1:], right[1:]
        digits = _matching_head(_DIGITS, left), _matching_head(_DIGITS, right)
        # A missing number is older than any number. Numbers are compared as text, the shorter first: a number may be
        # too long for int().
        numbers = [(bool(one), len(text), text) for one in digits for text in [one.lstrip("0")]]
        if numbers[0] != numbers[1]:
            return -1 if numbers[0] < numbers[1] else 1
        pair = digits if any(digits) else (_matching_head(_LETTERS, left), _matching_head(_LETTERS, right))
        if pair is not digits and pair[0] != pair[1]:
            return -1 if pair[0] < pair[1] else 1
        left, right = left[len(pair[0]) :], right[len(pair[1]) :]


def _matching_head(pattern: re.Pattern[str], text: str) -> str:
    """Return the beginning of the text that the pattern matches; every pattern here also matches ""."""
    found = pattern.match(text)
    return found.group() if found else ""
