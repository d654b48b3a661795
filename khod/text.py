# SPDX-License-Identifier: LGPL-2.1-or-later
"""Text of others, made fit for a terminal, a journal record and one line of a page; standard library only.

Names, reasons, command lines and versions come from producers, files, images and other users. What is shown of them
goes through here: no control character moves a cursor, no newline forges a line, no bidirectional control reorders one.
"""

from collections.abc import Iterable

ASCII_SPACE = " \t\n\v\f\r"
"""What separates words in what an operator writes; str.split() and \\s take 23 more characters than these."""

MAX_REASON = 300
"""Characters of somebody else's reason that are kept: it stands in status and record."""

MAX_NAMES = 10
"""Names in one sentence; whatever has a list of them shows all."""

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
BYTES = 0xDC00
"""From here on Python's `surrogateescape` has the bytes that are no UTF-8."""
_TO_SPACE = str.maketrans(dict.fromkeys(ASCII_SPACE, " "))


def printable(text: str) -> str:
    r"""Escape what is not printable as Python writes it: `\x1b`, `\n`, `\u202e`; a byte that was no UTF-8 as `\xff`.

    str.isprintable() is the measure: controls (C0, DEL, C1), formats (the bidirectional controls among them), line and
    paragraph separators, surrogates, and every space but the plain one.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escape_char(char) for char in text)


def _escape_char(char: str) -> str:
    byte = ord(char) - BYTES
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else ascii(char)[1:-1]  # noqa: PLR2004 - the bytes that are not ASCII


def one_line(text: str, limit: int = MAX_REASON) -> str:
    """Give one short line: white space is one blank, `?` what is not printable, so that it cannot grow.

    For status texts, reasons and records, whose room is bounded; where the reader must see what was there: `printable`.
    """
    return shorten("".join(char if char.isprintable() else "?" for char in " ".join(text.split())), limit)


def shorten(text: str, limit: int) -> str:
    """Cut a text to `limit` characters, the last of which then is `…`."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def join_names(names: Iterable[str], limit: int = MAX_NAMES) -> str:
    """Name all in one line, or the first `limit` and how many more there are."""
    found = list(names)
    more = f" and {len(found) - limit} more" if len(found) > limit else ""
    return ", ".join(map(printable, found[:limit])) + more


def format_size(size: int) -> str:
    """Give bytes in the largest unit they reach, with at most one decimal."""
    if size < 1 << 10:
        return f"{size} {'byte' if size == 1 else 'bytes'}"
    unit = min((size.bit_length() - 1) // 10, len(UNITS) - 1)
    scaled = size / (1 << 10 * unit)
    return f"{scaled:.0f} {UNITS[unit]}" if scaled == int(scaled) else f"{scaled:.1f} {UNITS[unit]}"


def split_first(text: str) -> tuple[str, str]:
    """The first word, and the rest without the white space around it, ASCII white space alone."""
    text = text.strip(ASCII_SPACE)
    end = next((at for at, char in enumerate(text) if char in ASCII_SPACE), len(text))
    return text[:end], text[end:].lstrip(ASCII_SPACE)


def split_words(text: str) -> list[str]:
    """Split at ASCII white space alone, as an operator separates words."""
    return [word for word in text.translate(_TO_SPACE).split(" ") if word]
