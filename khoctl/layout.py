# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fit a page to a terminal: no word is broken, and a wrapped line continues below its own text."""

import os
import re
import sys
from collections.abc import Sequence

import click
import typer

MIN_WIDTH = 24
"""The minimum width of a text in columns, however long the head before it is."""

COLUMN_PATTERN = re.compile(r"(?:\S+(?: \S+)*? {2,}|-?> | +)*")
"""What precedes a line's own text: columns, each followed by two or more blanks, and arrows."""


def page_width(*, err: bool = False) -> int | None:
    """Return the width to write, from COLUMNS or the terminal; None if the stream is not a terminal.

    Without a width, each line is a record and is not wrapped.
    """
    stream = sys.stderr if err else sys.stdout
    given = os.environ.get("COLUMNS", "")
    if given.isascii() and given.isdigit() and int(given):
        return int(given)
    if not stream.isatty():
        return None
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80  # a serial line reports 0
    except OSError:
        return None


def show_page(page: str, *, err: bool = False) -> None:
    """Write a page, wrapped to the width of its stream."""
    write_text(fit_page(page, page_width(err=err)), err=err)


def write_text(text: str, *, err: bool = False, color: bool | None = None, end: str = "\n") -> None:
    """Write text unwrapped, in the encoding of the stream; click by itself would write UTF-8 to an ASCII stream."""
    typer.echo(text + end, nl=False, file=sys.stderr if err else sys.stdout, color=color)


def fit_page(page: str, width: int | None) -> str:
    """Wrap the lines that are longer than `width`; None wraps nothing."""
    return page if width is None else "\n".join(line for text in page.split("\n") for line in _wrap_line(text, width))


def _wrap_line(text: str, width: int) -> list[str]:
    plain = click.unstyle(text)
    if len(plain) <= width:
        return [text]
    head = COLUMN_PATTERN.match(plain)
    indent = head.end() if head else 0
    longest = max(map(len, plain[indent:].split(" ")))
    indent = max(2, min(indent, width - max(longest, MIN_WIDTH)))
    lines, used = [""], 0
    for part in re.findall(r" *[^ ]+| +$", text):
        size = len(click.unstyle(part))
        if used and used + size > width:
            word = part.lstrip(" ")
            lines.append(" " * indent + word)
            used = indent + len(click.unstyle(word))
        else:
            lines[-1] += part
            used += size
    return lines


def align_table(rows: Sequence[Sequence[str]], width: int | None) -> list[str]:
    """Align rows in columns; columns that do not fit move to a further line, the same columns in each row."""
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    groups: list[list[int]] = [[]]
    for at, size in enumerate(sizes):
        used = sum(sizes[one] + 2 for one in groups[-1]) + (4 if len(groups) > 1 else 0)
        if width is not None and groups[-1] and used + min(size, MIN_WIDTH) > width:
            groups.append([])
        groups[-1].append(at)
    lines = []
    for row in rows:
        for number, group in enumerate(groups):
            cells = "  ".join(row[at].ljust(sizes[at]) for at in group)
            lines += fit_page(f"{'    ' if number else ''}{cells}".rstrip(), width).split("\n")
    return lines
