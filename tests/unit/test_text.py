# SPDX-License-Identifier: LGPL-2.1-or-later
"""Text of others: one line of a page stays one line, and moves no cursor, whatever is in it."""

import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from khod.text import format_size, join_names, one_line, printable, shorten, split_words

FORGERIES = {
    "an escape sequence": ("\x1b[2J\x1b[8m", "\\x1b"),
    "a line": ("x\npass  signature", "\\n"),
    "a carriage return": ("a\rb", "\\r"),
    "DEL": ("a\x7fb", "\\x7f"),
    "C1: CSI": ("a\x9b2Jb", "\\x9b"),
    "C1: NEL": ("a\x85b", "\\x85"),
    "a line separator": ("a\u2028b", "\\u2028"),
    "a paragraph separator": ("a\u2029b", "\\u2029"),
    "a bidirectional override": ("a\u202eb", "\\u202e"),
    "a bidirectional isolate": ("a\u2066b\u2069", "\\u2066"),
    "a right-to-left mark": ("a\u200fb", "\\u200f"),
    "a byte that was no UTF-8": ("a\udcffb", "\\xff"),
    "a surrogate": ("a\ud99bb", "\\ud99b"),
    "a tag": ("a\U000e0041b", "\\U000e0041"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_what_a_terminal_would_act_on_is_escaped(name: str) -> None:
    text, escaped = FORGERIES[name]
    assert escaped in printable(text)
    assert printable(text).isprintable()
    assert one_line(text).isprintable()


def test_every_control_format_and_separator_is_escaped() -> None:
    """Cc has C0, DEL and C1, Cf the bidirectional controls, Zl and Zp the other line ends."""
    bad = [
        char for char in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(char) in ("Cc", "Cf", "Zl", "Zp")
    ]
    assert "\u202a" in bad
    assert not [char for char in bad if char in printable(f"a{char}b") or char in one_line(f"a{char}b")]


def test_what_is_printable_stays_as_it_is() -> None:
    text = 'voilà: 東京 \N{GREEK SMALL LETTER ALPHA} \\ "x" 🙂'
    assert printable(text) == one_line(text) == text


@given(st.text(), st.integers(1, 40))
def test_one_line_is_printable_and_no_longer_than_asked(text: str, limit: int) -> None:
    line = one_line(text, limit)
    assert line.isprintable()
    assert len(line) <= limit
    assert line == line.strip()


def test_white_space_of_any_kind_is_one_blank_in_a_line() -> None:
    assert one_line("  no\n\troom\u2028here \r\n") == "no room here"


def test_what_is_cut_off_is_marked() -> None:
    assert shorten("abcdef", 6) == "abcdef"
    assert shorten("abcdefg", 6) == "abcde…"


def test_names_are_joined_up_to_a_limit() -> None:
    assert join_names([], 3) == ""
    assert join_names(["a", "b", "c"], 3) == "a, b, c"
    assert join_names((name for name in "abcde"), 3) == "a, b, c and 2 more"
    assert join_names("abcdefghijklmn") == "a, b, c, d, e, f, g, h, i, j and 4 more", "one bound for all that name none"
    assert join_names(["a\nb"], 3) == "a\\nb"


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (1, "1 byte"), (1023, "1023 bytes"), (1024, "1 KiB"), (1536, "1.5 KiB"), (1 << 70, "1024 EiB")],
)
def test_sizes_are_in_the_largest_unit_they_reach(size: int, text: str) -> None:
    assert format_size(size) == text


def test_words_are_separated_by_ascii_white_space_alone() -> None:
    assert split_words(" a\tb\u3000c\u00a0d\n\x1f e\x0b\x0c\rf ") == ["a", "b\u3000c\u00a0d", "\x1f", "e", "f"]
