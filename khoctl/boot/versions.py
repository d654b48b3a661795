# SPDX-License-Identifier: LGPL-2.1-or-later
"""Versions in order, as the Version Format Specification has it (UAPI.10, uapi-group.org)."""

import re

_SKIPPED = re.compile(r"[^a-zA-Z0-9.~^-]*")
_DIGITS = re.compile(r"[0-9]*")
_LETTERS = re.compile(r"[a-zA-Z]*")
_LONGEST = 1 << 14
"""Characters that are looked at: every step copies what is left."""
_MARKS = ("~", "", "-", "^", ".")
"""What sorts before anything else at a place, lowest first; "" is the end of the string."""


def compare_versions(left: str, right: str) -> int:
    """-1 where `left` is the older version, 1 where it is the newer, 0 where the two sort alike.

    The specification's steps in its order: `123~rc1` < `123` < `123-1` < `123.1`, and 9 < 10.
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
        # No number is older than any. As text, shorter first: a number may be longer than int() takes.
        numbers = [(bool(one), len(text), text) for one in digits for text in [one.lstrip("0")]]
        if numbers[0] != numbers[1]:
            return -1 if numbers[0] < numbers[1] else 1
        pair = digits if any(digits) else (_matching_head(_LETTERS, left), _matching_head(_LETTERS, right))
        if pair is not digits and pair[0] != pair[1]:
            return -1 if pair[0] < pair[1] else 1
        left, right = left[len(pair[0]) :], right[len(pair[1]) :]


def _matching_head(pattern: re.Pattern[str], text: str) -> str:
    """What the pattern takes of the text's beginning; every pattern here takes nothing, too."""
    found = pattern.match(text)
    return found.group() if found else ""
