# SPDX-License-Identifier: LGPL-2.1-or-later
"""Make text from others safe for a terminal, a journal record and one line of a page; standard library only.

Names, reasons, command lines and versions come from producers, files, images and other users. They are escaped here
before they are shown: no control character moves a cursor, no newline forges a line, no bidirectional control reorders
one.
"""

import re
from collections.abc import Iterable

ASCII_SPACE = " \t\n\v\f\r"
"""The separators of words that an operator writes; str.split() and \\s accept 23 more characters."""

MAX_REASON = 300
"""The number of characters kept of a reason given by others; status and record show it."""

MAX_NAMES = 10
"""The number of names in one sentence; tables and lists show all."""

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
BYTES = 0xDC00
"""The start of the range in which Python's `surrogateescape` stores bytes that are not UTF-8."""
SHA256_REMEDY = "It must be the 64 hexadecimal digits that sha256sum prints."
_TO_SPACE = str.maketrans(dict.fromkeys(ASCII_SPACE, " "))


def printable(text: str) -> str:
    r"""Escape what is not printable, as Python does: `\x1b`, `\n`, `\u202e`; a byte that was not UTF-8 as `\xff`.

    The test is str.isprintable(). It rejects controls (C0, DEL, C1), formats (which include the bidirectional
    controls), line and paragraph separators, surrogates, and every space except the plain one.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escape_char(char) for char in text)


def _escape_char(char: str) -> str:
    byte = ord(char) - BYTES
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else ascii(char)[1:-1]  # noqa: PLR2004 - the bytes that are not ASCII


def one_line(text: str, limit: int = MAX_REASON) -> str:
    """Return one short line: white space becomes one blank, a character that is not printable becomes `?`.

    The text cannot grow, which suits status texts, reasons and records of limited size. Use `printable` where the
    reader must see the original characters.
    """
    return shorten("".join(char if char.isprintable() else "?" for char in " ".join(text.split())), limit)


def shorten(text: str, limit: int) -> str:
    """Cut a text to `limit` characters; the last one of a cut text is `…`."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def join_names(names: Iterable[str], limit: int = MAX_NAMES) -> str:
    """Join all names in one line, or the first `limit` and the number of the others."""
    found = list(names)
    more = f" and {len(found) - limit} more" if len(found) > limit else ""
    return ", ".join(map(printable, found[:limit])) + more


def format_size(size: int) -> str:
    """Format bytes in the largest unit they reach, with at most one decimal."""
    if size < 1 << 10:
        return f"{size} {'byte' if size == 1 else 'bytes'}"
    unit = min((size.bit_length() - 1) // 10, len(UNITS) - 1)
    scaled = size / (1 << 10 * unit)
    return f"{scaled:.0f} {UNITS[unit]}" if scaled == int(scaled) else f"{scaled:.1f} {UNITS[unit]}"


def split_first(text: str) -> tuple[str, str]:
    """Return the first word, and the rest without surrounding space; only ASCII white space counts."""
    text = text.strip(ASCII_SPACE)
    end = next((at for at, char in enumerate(text) if char in ASCII_SPACE), len(text))
    return text[:end], text[end:].lstrip(ASCII_SPACE)


def split_words(text: str) -> list[str]:
    """Split a text at ASCII white space only, as an operator separates words."""
    return [word for word in text.translate(_TO_SPACE).split(" ") if word]


def normalize_sha256(text: str) -> str | None:
    """Return a SHA-256 in hex, in lower case; None if the text is not one."""
    return text.lower() if re.fullmatch(r"[0-9A-Fa-f]{64}", text) else None
