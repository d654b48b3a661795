# SPDX-License-Identifier: LGPL-2.1-or-later
"""Split a kernel command line as the kernel does: next_arg() and parse_args() (lib/cmdline.c, kernel/params.c)."""

from collections.abc import Iterator

from khod.dataclass import dataclass
from khod.kernel.words import kernel_words

INIT = "--"
"""Words after this one belong to init (Documentation/admin-guide/kernel-parameters.rst)."""

QUOTE = '"'


@dataclass(frozen=True)
class Arg:
    """One parameter; `value` is None without a `=`. Bytes that are not UTF-8 become surrogates."""

    param: str
    value: str | None

    def is_parameter(self, name: str) -> bool:
        """Whether this is the parameter `name`: parameq() treats dashes in a name as underscores."""
        return same_name(self.param, name)


def same_name(one: str, other: str) -> bool:
    """Whether two names mean the same parameter."""
    return one.replace("-", "_") == other.replace("-", "_")


def kernel_args(line: str) -> Iterator[Arg]:
    """Yield the kernel's own parameters, up to `--`."""
    for word in kernel_words(line):
        arg = parse_word(word)
        if arg == Arg(INIT, None):
            return
        yield arg


def parse_word(word: str) -> Arg:
    """Split one word as next_arg() does: at the first `=` after its first character, without quotes around a value."""
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
    """Parse a boolean by its first letters, as the kernel does (lib/kstrtox.c); None if the kernel rejects it."""
    if value is None:
        return None
    if value[:1] in tuple("yYtT1eE") or value[:2] in ("on", "oN", "On", "ON"):
        return True
    if value[:1] in tuple("nNfF0dD") or value[:2] in ("of", "oF", "Of", "OF"):
        return False
    return None


def boolean_value(line: str, parameter: str) -> bool | None:
    """Return the value that a command line gives a boolean parameter: the last one the kernel accepts, or None."""
    values = [kstrtobool(arg.value) for arg in kernel_args(line) if arg.is_parameter(parameter)]
    return next((value for value in reversed(values) if value is not None), None)


def is_switched_on(line: str, parameter: str) -> bool:
    """Whether a command line switches a boolean parameter on."""
    return boolean_value(line, parameter) is True
