# SPDX-License-Identifier: LGPL-2.1-or-later
"""The answer to a shell that completes a command line: a line for each candidate, VALUE or VALUE<TAB>DESCRIPTION.

The scripts of the shells are in packaging/completions. They set _KHOCTL_COMPLETE to the form
in which they give the command line, up to the cursor:

    words   the words as arguments, the last one is completed (zsh, fish)
    line    the line, and the part of its last word that the shell replaces, which has split words at = and : (bash)

Where the shell has to complete names of files, FILES or DIRECTORIES is the only line. Whatever goes wrong, nothing is
printed, also on standard error, and within LIMIT_SECONDS khoctl has ended.
"""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NoReturn

import click

# Which parameter is completed is known inside only: click 8.0 to 8.5.
from click.shell_completion import _resolve_context as resolve_context
from click.shell_completion import _resolve_incomplete as resolve_incomplete
from click.shell_completion import split_arg_string

LIMIT_SECONDS = 1.0
FILES, DIRECTORIES = ":files", ":directories"
IS_FILE = ("FILE", "PATH", "TREE", "A", "B")
"""Words in the help that stand for a file, or may."""


def complete(command: click.Command, form: str, arguments: Sequence[str]) -> NoReturn:
    """Print the candidates for a command line in this form, and end the process."""
    signal.signal(signal.SIGALRM, lambda _number, _frame: os._exit(0))
    signal.setitimer(signal.ITIMER_REAL, LIMIT_SECONDS)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    with suppress(Exception):
        sys.stdout.write("".join(f"{line}\n" for line in _answer(command, form, arguments)))
        sys.stdout.flush()
    os._exit(0)


def _answer(command: click.Command, form: str, arguments: Sequence[str]) -> list[str]:
    """Return the lines to print, each as the shell puts it in place of what it replaces."""
    if form == "words":
        *words, last = arguments
        last = last[1:] if last.startswith(("'", '"')) else last  # a quote that is still open
        replaced = last
    else:
        line, replaced = arguments
        words = split_arg_string(line)[1:]
        last = "" if line[-1:].isspace() or not words else words.pop()
        replaced = "" if replaced in ("=", ":") else replaced
    # What the shell keeps of the last word stands before the value (--option=) or is the beginning of it (a colon).
    option, equals, _value = last.partition("=")
    before = f"{option}=" if equals and last.startswith("-") else ""
    kept = max(0, len(last) - len(replaced))
    found = list_candidates(command, words, last)
    return [line if line in (FILES, DIRECTORIES) else f"{before}{line}"[kept:] for line in found]


def list_candidates(command: click.Command, words: Sequence[str], last: str) -> Iterator[str]:
    """Return the candidates for the word `last` after others: VALUE, VALUE<TAB>DESCRIPTION, FILES or DIRECTORIES."""
    context = resolve_context(command, {}, "khoctl", list(words))
    found, last = resolve_incomplete(context, list(words), last)
    is_empty = True
    with suppress(Exception):  # what was found until then is shown
        for item in found.shell_complete(context, last):
            line = f"{item.value}\t{' '.join((item.help or '').split())}".rstrip("\t")
            if item.type == "plain" and line.replace("\t", "").isprintable():
                is_empty = False
                yield line
    if is_empty and isinstance(found, click.Parameter):
        name = (found.metavar or "").strip("[].")
        if name == "DIR":
            yield DIRECTORIES
        elif name in IS_FILE:
            yield FILES
