# SPDX-License-Identifier: LGPL-2.1-or-later
"""A kernel command line in words, as the kernel reads it: next_arg() and parse_args() (lib/cmdline.c, kernel/params.c).

The kernel reads bytes, and what separates words is what its isspace() says: _ctype in lib/ctype.c marks as `_S` the
bytes 9 to 13, 32 and 160. That table is Latin-1's, where 160 is the no-break space. In UTF-8 0xA0 is the last byte of
U+00A0 and of every character whose code ends in 0x20 (à is C3 A0, † is E2 80 A0): the kernel ends a word in the middle
of these, unless they stand between double quotes. 0x85 is no space to it, and no other byte from 0x80 on is.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

WORD = re.compile(rb'(?:[^\t-\r \xa0"]|"[^"]*(?:"|\Z))+')
"""What one call of next_arg() takes: double quotes keep white space together, an open one goes to the end."""

INIT = "--"
"""Words after this one are init's (Documentation/admin-guide/kernel-parameters.rst)."""

QUOTE = '"'


@dataclass(frozen=True)
class Arg:
    """One parameter; `value` is None where there is no `=`. Bytes that are no UTF-8 stand as surrogates."""

    param: str
    value: str | None

    def is_parameter(self, name: str) -> bool:
        """Whether it is this parameter: parameq() takes a dash in a name for an underscore."""
        return same_name(self.param, name)


def same_name(one: str, other: str) -> bool:
    """Tell whether two names mean one parameter."""
    return one.replace("-", "_") == other.replace("-", "_")


def kernel_words(line: str) -> list[str]:
    """Split a line where the kernel does, quotes and all; init's words among them."""
    return [word.decode(errors="surrogateescape") for word in WORD.findall(line_bytes(line))]


def kernel_args(line: str) -> Iterator[Arg]:
    """Give the parameters of the kernel's own, up to `--`."""
    for word in kernel_words(line):
        arg = parse_word(word)
        if arg == Arg(INIT, None):
            return
        yield arg


def parse_word(word: str) -> Arg:
    """Take one word apart as next_arg() does: at the first `=` that does not begin it, less quotes around a value."""
    quoted = word.startswith(QUOTE)
    text = word[1:] if quoted else word
    if quoted and text.endswith(QUOTE):
        text = text[:-1]
    at = text.find("=", 1)
    if at < 0:
        return Arg(text, None)
    value = text[at + 1 :]
    if value.startswith(QUOTE):
        value = value[1:]
        if not quoted and value.endswith(QUOTE):
            value = value[:-1]
    return Arg(text[:at], value)


def kstrtobool(value: str | None) -> bool | None:
    """Read a boolean as the kernel does (lib/kstrtox.c), by its first letters; None where it does not take it."""
    if value is None:
        return None
    if value[:1] in tuple("yYtT1eE") or value[:2] in ("on", "oN", "On", "ON"):
        return True
    if value[:1] in tuple("nNfF0dD") or value[:2] in ("of", "oF", "Of", "OF"):
        return False
    return None


def boolean_value(line: str, parameter: str) -> bool | None:
    """Tell what a command line sets a boolean parameter to, None nothing: the last value the kernel takes counts."""
    values = [kstrtobool(arg.value) for arg in kernel_args(line) if arg.is_parameter(parameter)]
    return next((value for value in reversed(values) if value is not None), None)


def is_switched_on(line: str, parameter: str) -> bool:
    """Tell whether a command line switches a boolean parameter on."""
    return boolean_value(line, parameter) is True


def line_bytes(line: str) -> bytes:
    """The bytes of a line, those that were no UTF-8 too."""
    try:
        return line.encode(errors="surrogateescape")
    except UnicodeEncodeError:  # a surrogate that stands for no byte
        return line.encode(errors="replace")
