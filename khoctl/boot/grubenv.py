# SPDX-License-Identifier: LGPL-2.1-or-later
"""GRUB's environment block, and the variables in GRUB's own boot loader entries (Fedora and its derivatives)."""

import re
from collections.abc import Mapping
from pathlib import Path

from khoctl.boot.loader import GRUB
from khod.errors import Refused
from khod.text import ASCII_SPACE, split_words

SIZE = 64 * 1024
"""The maximum number of bytes read; GRUB's own block is 1 KiB."""
OPTIONAL = frozenset({"tuned_params", "tuned_initrd", "early_initrd", "extra_cmdline"})
"""Variables that an entry may name although they are not set: they are empty then, as in GRUB."""
# The quantifiers are possessive, and a backslash at the very end of the text ends a value. Otherwise a block of
# continued lines would be scanned again from each of them.
_SETTING = re.compile(r"^([^#=\n]+)=((?:\\.|[^\\\n])*+)\\?$", re.MULTILINE | re.DOTALL)
_WORD = re.compile(
    r"""(?:\\.|'[^']*+'|"(?:\\.|[^"\\])*+"|\$\{[\w?#*@]+\}|[^ \t\n\v\f\r'"\\{}|&;<>]|\\\Z)++""", re.DOTALL | re.ASCII
)
_PIECE = re.compile(r"""\\(.)|'([^']*+)'|"((?:\\.|[^"\\])*+)"|([^'"\\]++|\\)""", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:\{(\w+|[?#*@])\}|(\w+|[?#*@]))", re.ASCII)
SEPARATORS = frozenset("{}|&;<>")
"""The characters that are not part of a word unless quoted (grub-core/script/yylex.l)."""
_ESCAPED = re.compile(r"""\\([$"\\])""")
"""The characters that a backslash makes literal between double quotes."""
IGNITION, STAMP = "ignition_firstboot", "boot/ignition.firstboot"
"""Fedora CoreOS: grub.cfg sets the variable to "", and gives it a value if the stamp file exists."""


def read_variables(root: Path) -> dict[str, str]:
    """Return the variables of the first environment block below `root`, or none if no block can be read.

    They include $ignition_firstboot, empty, only if the first boot is over.
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
    """Return what GRUB's `linux` command passes to the kernel for `text`.

    A word is put in double quotes only if it holds a quoted space. Variables are expanded, quotes and backslashes are
    read as in GRUB (its manual, "Quoting"), a word that begins with `#` begins a comment, and the space between words
    stays. Raises Refused, with `where`, for a variable that is not set, a quote without an end, or a character that
    would end the command.
    """
    return _WORD.sub(lambda word: _for_kernel(word[0], variables, where), _command_words(text, where))


def expand_paths(text: str, variables: Mapping[str, str], where: str) -> list[str]:
    """Return the files that GRUB reads for `text`; the rules and errors are those of `expand_cmdline`."""
    found = []
    for word in _WORD.findall(_command_words(text, where)):
        value, quoted = _taken_apart(word, variables, where)
        found += [value] if quoted else split_words(value)
    return found


def expand_variables(text: str, variables: Mapping[str, str], where: str) -> str:
    """Replace `$name` and `${name}` with their values; raise Refused, with `where`, for a variable without one.

    GRUB would silently leave such a variable out, but grub.cfg may set it, as it does `kernelopts`, which holds root=.
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
    """Return the text up to a comment; raise Refused if GRUB's script would not read it as the words of one command."""
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
    """Return a word as GRUB's script reads it, and whether it holds a quoted space.

    A space in the value of a variable separates words.
    """
    pieces, quoted = "", False
    for escaped, single, double, bare in _PIECE.findall(word):
        quoted |= " " in escaped + single + double
        pieces += (
            escaped + single + _between_quotes(double, variables, where) + expand_variables(bare, variables, where)
        )
    return pieces, quoted


def _between_quotes(text: str, variables: Mapping[str, str], where: str) -> str:
    parts = _ESCAPED.split(text)
    parts[::2] = [expand_variables(part, variables, where) for part in parts[::2]]  # the others were escaped
    return "".join(parts)
