# SPDX-License-Identifier: LGPL-2.1-or-later
"""GRUB's environment block, and the variables that GRUB's own boot loader entries (Fedora's and its kin's) refer to."""

import re
from collections.abc import Mapping
from pathlib import Path

from khoctl.boot.loader import GRUB
from khod.errors import Refused
from khod.text import ASCII_SPACE, split_words

SIZE = 64 * 1024
"""The most that is read, in bytes: GRUB's own block is 1 KiB."""
OPTIONAL = frozenset({"tuned_params", "tuned_initrd", "early_initrd", "extra_cmdline"})
"""What an entry may name though nobody set it: empty then, as GRUB has it."""
# A value is never given back once it is read, and a backslash at the very end ends it: else a block of lines that go
# on would be tried from each of them.
_SETTING = re.compile(r"^([^#=\n]+)=((?:\\.|[^\\\n])*+)\\?$", re.MULTILINE | re.DOTALL)
_WORD = re.compile(
    r"""(?:\\.|'[^']*+'|"(?:\\.|[^"\\])*+"|\$\{[\w?#*@]+\}|[^ \t\n\v\f\r'"\\{}|&;<>]|\\\Z)++""", re.DOTALL | re.ASCII
)
_PIECE = re.compile(r"""\\(.)|'([^']*+)'|"((?:\\.|[^"\\])*+)"|([^'"\\]++|\\)""", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:\{(\w+|[?#*@])\}|(\w+|[?#*@]))", re.ASCII)
SEPARATORS = frozenset("{}|&;<>")
"""What is no part of a word unless it is quoted (grub-core/script/yylex.l)."""
_ESCAPED = re.compile(r"""\\([$"\\])""")
"""What a backslash takes the meaning of, between double quotes."""
IGNITION, STAMP = "ignition_firstboot", "boot/ignition.firstboot"
"""Fedora CoreOS: grub.cfg sets the variable to nothing, and fills it in where the stamp is there."""


def read_variables(root: Path) -> dict[str, str]:
    """The variables of the first environment block below `root`, none where there is no block that can be read.

    $ignition_firstboot is among them where it is empty, and never where the first boot is still to come.
    """
    found = _read_block(root)
    found.pop(IGNITION, None)
    return found if (root / STAMP).exists() else {**found, IGNITION: ""}


def _read_block(root: Path) -> dict[str, str]:
    for path in (found for place in GRUB for found in sorted(root.glob(f"{place}/grubenv"))):
        try:
            with path.open("rb") as file:
                text = file.read(SIZE).decode("utf-8", "surrogateescape")
        except OSError:
            continue
        return {name: re.sub(r"\\(.)", r"\1", value, flags=re.DOTALL) for name, value in _SETTING.findall(text)}
    return {}


def expand_cmdline(text: str, variables: Mapping[str, str], where: str) -> str:
    """What GRUB's `linux` command hands to the kernel of `text`: in quotes what holds a space, else none.

    Variables are put in, quotes and backslashes are GRUB's own (its manual, "Quoting"), and a word that begins with `#`
    begins a comment; what separates words stays. Refused names a variable that nobody sets, a quote without its end or
    a character that would end the command, `where` says of what.
    """
    return _WORD.sub(lambda word: _for_kernel(word[0], variables, where), _command_words(text, where))


def expand_paths(text: str, variables: Mapping[str, str], where: str) -> list[str]:
    """The files that GRUB reads for `text`; else as `expand_cmdline`."""
    found = []
    for word in _WORD.findall(_command_words(text, where)):
        value, quoted = _taken_apart(word, variables, where)
        found += [value] if quoted else split_words(value)
    return found


def expand_variables(text: str, variables: Mapping[str, str], where: str) -> str:
    """Put in what `$name` and `${name}` stand for; Refused names one that stands for nothing, `where` says of what.

    GRUB would leave it out without a word; but it may be set in grub.cfg, as `kernelopts` with root= in it is.
    """

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if name in variables or name in OPTIONAL:
            return variables.get(name, "")
        if name == IGNITION:
            raise Refused(
                "The first boot of this system is still to come: its next kernel would provision it again",
                where=f"/{STAMP}",
                remedy="Boot it once through its boot loader.",
            )
        raise Refused(
            f"${name} is a variable of the boot loader's that no grubenv sets",
            where=where,
            remedy="Name the kernel, the initrd and the command line: --image, --initrd, --cmdline. "
            r"In an entry of GRUB's a `$` that begins no variable is written `\$`.",
        )

    return _VARIABLE.sub(value, text)


def _command_words(text: str, where: str) -> str:
    """The text up to a comment; Refused where GRUB's script would not take it for one command's words."""
    comment = next((word.start() for word in _WORD.finditer(text) if word[0].startswith("#")), len(text))
    text = text[:comment]
    rest = _WORD.sub("", text).strip(ASCII_SPACE)
    if rest[:1] in SEPARATORS:
        raise Refused(
            f"`{rest[0]}` is a part of GRUB's script, which ends the command there or does not run it",
            where=where,
            remedy=f"Write it in quotes: '{rest[0]}'.",
        )
    if rest:
        raise Refused(
            "A quote has no end, and GRUB would read on behind the line",
            where=where,
            remedy=r"""Close it, or write \" or \' for the character itself.""",
        )
    return text


def _for_kernel(word: str, variables: Mapping[str, str], where: str) -> str:
    value, quoted = _taken_apart(word, variables, where)
    return f'"{value}"' if quoted else value


def _taken_apart(word: str, variables: Mapping[str, str], where: str) -> tuple[str, bool]:
    """A word as GRUB's script reads it, and whether a space is part of it: those of a variable separate."""
    pieces, quoted = "", False
    for escaped, single, double, bare in _PIECE.findall(word):
        quoted |= " " in escaped + single + double
        pieces += (
            escaped + single + _between_quotes(double, variables, where) + expand_variables(bare, variables, where)
        )
    return pieces, quoted


def _between_quotes(text: str, variables: Mapping[str, str], where: str) -> str:
    parts = _ESCAPED.split(text)
    parts[::2] = [expand_variables(part, variables, where) for part in parts[::2]]  # between these is what was escaped
    return "".join(parts)
