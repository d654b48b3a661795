# SPDX-License-Identifier: LGPL-2.1-or-later
r"""Make the manual pages in packaging/man from packaging/man/source: python -m tests.manuals, or `make manuals`.

A source is a page of man(7) in which these lines are replaced:

    .\"@ option COMMAND --NAME   an option of khoctl, with its help; what follows it is added to the help
    .\"@ khod.toml               every key of etc/kho/khod.toml, with its default, its comment and the words it takes

`@VERSION@` is replaced by that of khod, and lines of text are wrapped as mandoc -Tlint asks for. So what the help and
the configuration say is written once.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import click
import typer

from khoctl.app import app
from khod import __version__
from khod.config import CHOICES, Config, list_settings

REPOSITORY = Path(__file__).parents[1]
PAGES = REPOSITORY / "packaging/man"
SOURCES = sorted((PAGES / "source").iterdir())
CONFIGURATION = REPOSITORY / "etc/kho/khod.toml"
WIDTH = 79
DIRECTIVE = '.\\"@ '
KINDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", tuple: "a list of texts"}


@dataclasses.dataclass(frozen=True)
class Comment:
    """Keys that stand below one comment of khod.toml, or a table that does, which has no keys then."""

    table: str
    keys: list[str]
    lines: list[str]


def make_page(source: Path) -> str:
    """Return the page that a source gives."""
    lines: list[str] = []
    for line in source.read_text().replace("@VERSION@", __version__).splitlines():
        if line.startswith(DIRECTIVE):
            lines += run_directive(line.removeprefix(DIRECTIVE).split(" "))
        else:
            lines.append(line)
    return "".join(f"{line}\n" for line in wrap_lines(lines))


def run_directive(words: list[str]) -> Iterator[str]:
    """Return the lines for a directive."""
    if words == ["khod.toml"]:
        yield from describe_configuration()
        return
    name, *command, option = words
    assert name == "option", f"unknown directive: {' '.join(words)}"
    yield from describe_option(find_option(command, option))


# khoctl


def find_command(words: Iterable[str]) -> click.Command:
    """Return a command of khoctl."""
    command: click.Command = typer.main.get_command(app)
    for word in words:
        assert isinstance(command, click.Group), word
        found = command.get_command(click.Context(command), word)
        assert found is not None, word
        command = found
    return command


def find_option(command: Iterable[str], name: str) -> click.Option:
    """Return an option of a command."""
    (found,) = [
        param for param in find_command(command).params if isinstance(param, click.Option) and name in param.opts
    ]
    return found


def describe_option(option: click.Option) -> Iterator[str]:
    """Return an option with its help, as an item of a list."""
    names = ", ".join(f"\\fB{escape(name)}\\fR" for name in sorted(option.opts, key=len, reverse=True))
    yield ".TP"
    yield names if option.is_flag else f"{names} \\fI{escape(option.metavar or 'TEXT')}\\fR"
    yield mark_up(option.help or "")


# khod.toml


def read_comments(text: str) -> Iterator[Comment]:
    """Return the comments of khod.toml with the keys or the table below them."""
    comment: list[str] = []
    last: Comment | None = None
    table = ""
    for line in text.splitlines():
        if line.startswith("#"):
            comment.append(line.removeprefix("#").removeprefix(" "))
            continue
        if header := re.fullmatch(r"\[(\w+)\]", line):
            table = header[1]
            yield Comment(table, [], [*comment])
        elif key := re.match(r"(\w+) = ", line):
            if not comment and last is not None:
                last.keys.append(key[1])
                continue
            if last is not None:
                yield last
            last = Comment(table, [key[1]], [*comment])
        if header or not line:
            if last is not None:
                yield last
            last = None
        comment.clear()
    if last is not None:
        yield last


def describe_configuration() -> Iterator[str]:
    """Return a subsection for each table of khod.toml, and an item for each comment."""
    defaults = list_settings(Config())
    found = list(read_comments(CONFIGURATION.read_text()))
    for table in dict.fromkeys(one.table for one in found):
        yield f".SS [{table}]"
        for one in found:
            if one.table != table:
                continue
            if not one.keys:
                yield from format_comment(one.lines)
                continue
            for tag, key in zip([".TP", *[".TQ"] * len(one.keys)], one.keys, strict=False):
                yield tag
                yield f'.BR {key} " = {escape(write_toml(defaults[f"{table}.{key}"]))}"'
            yield from format_comment([*one.lines, *describe_type(table, one.keys)])


def format_comment(lines: Iterable[str]) -> Iterator[str]:
    """Return a comment as text; a line of it that is indented, such as WORD and what it means, stays one."""
    text: list[str] = []
    is_item = False
    for line in lines:
        if line.startswith("  ") or is_item:
            yield from [mark_up(" ".join(text))] if text else []
            yield ".br"
            text.clear()
        is_item = line.startswith("  ")
        text.append(re.sub(" {2,}", ": ", line.strip(), count=1))
    yield from [mark_up(" ".join(text))] if text else []


def describe_type(table: str, keys: list[str]) -> Iterator[str]:
    """Return in a sentence what a key may be; [checks] says it once for all of its keys."""
    if table == "checks":
        return
    hints = get_type_hints(type(getattr(Config(), table)))
    kinds = {getattr(hints[key], "__origin__", hints[key]) for key in keys}
    choices = CHOICES.get(f"{table}.{keys[0]}")
    for kind in kinds:
        yield f"(One of {', '.join(choices)}.)" if choices else f"({KINDS[kind].capitalize()}.)"


def write_toml(value: Any) -> str:
    """Return a default as khod.toml has it."""
    if isinstance(value, str):
        return f"\\(dq{value}\\(dq"
    if isinstance(value, tuple):
        return f"[{', '.join(map(write_toml, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


# man(7)


def escape(text: str) -> str:
    """Return text for a page: a hyphen that is typed stays one."""
    return text.replace("-", "\\-")


def mark_up(text: str) -> str:
    """Return plain text for a page; what is in backticks is set in bold."""
    made = re.sub(r"`([^`]*)`", r"\\fB\1\\fR", escape(text.replace("\\", "\\e").replace('"', "\\(dq")))
    return f"\\&{made}" if made.startswith((".", "'")) else made


def wrap_lines(lines: Iterable[str]) -> Iterator[str]:
    """Wrap lines of text; what is set as it stands, rows of tables and requests stay as they are."""
    is_literal = is_row = False
    for line in lines:
        if line.startswith((".EX", ".nf")):
            is_literal = True
        elif line.startswith((".EE", ".fi")):
            is_literal = False
        elif line.startswith((".TS", "T}")):
            is_row = True
        elif line.startswith(".TE"):
            is_row = False
        stays = is_literal or is_row or line.startswith((".", "'"))
        yield from [line] if stays else wrap_text(line)
        if is_row and line.endswith("T{"):
            is_row = False


def wrap_text(text: str) -> Iterator[str]:
    """Break a line between words; no part becomes a request."""
    line = ""
    for word in re.split(r"(?<!\\) ", text):
        if line and len(f"{line} {word}".encode()) > WIDTH:
            yield line
            line = f"\\&{word}" if word.startswith((".", "'")) else word
        else:
            line = f"{line} {word}" if line else word
    yield line


def main() -> None:
    """Write every page."""
    for source in SOURCES:
        (PAGES / source.name).write_text(make_page(source))


if __name__ == "__main__":
    main()
