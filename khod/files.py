# SPDX-License-Identifier: LGPL-2.1-or-later
"""Open files named by a user and read TOML files, with checks against unusual files and values."""

import os
import re
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, get_origin

from khod.dataclass import dataclass
from khod.errors import ConfigError, UsageError, errno_text
from khod.values import DecodeError, decode_value

_KINDS: list[tuple[Callable[[int], bool], str]] = [
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
]

MAX_TOML_BYTES = 1 << 20
MAX_NUMBER = 1 << 64
"""The bound for numbers: no number of seconds, bytes or anything else that is set here is as large."""
TYPES = {
    str: 'a text in quotes, for example "kho"',
    int: "a whole number, for example 16",
    float: "a number, for example 60.0",
    bool: "true or false",
    tuple: 'a list of texts without a NUL, for example ["one", "two"]',
}
"""The types of a key's value, in words for people."""
FORMER_KEYS: dict[tuple[str, str], str] = {}
"""What to write in place of a key that an earlier khod knew, by the subject of its file ("" for khod.toml) and the key.

So far none was renamed or removed.
"""


def open_regular(path: str, role: str) -> int:
    """Open a regular file for a request, close-on-exec; raise UsageError with a remedy if that is not possible.

    O_NONBLOCK prevents a FIFO without a writer from blocking the caller for ever.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"The {role} cannot be opened: {_explain(error)}",
            where=repr(path) if "\0" in path else path,
            remedy=f"Give the path of a readable file as the {role}.",
        ) from None
    try:
        check_regular(fd, role, path)
    except UsageError:
        os.close(fd)
        raise
    return fd


def check_regular(fd: int, role: str, name: str) -> None:
    """Raise UsageError if `fd` is not a regular file: the kernel's loader reads no other kind."""
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        kind = next((text for is_kind, text in _KINDS if is_kind(mode)), "no regular file")
        raise UsageError(f"The {role} is {kind}", where=name, remedy="Give a regular file.")


@dataclass(frozen=True)
class Fragment:
    """The text and the values of one file."""

    path: Path
    text: str
    values: dict[str, Any]

    def locate_key(self, key: str) -> str:
        """Return FILE:LINE of a dotted key, or FILE if the line is not found in the text.

        It may stand below its table's header, as a dotted key, or in an inline table, whose line is given then.
        """
        table = inline = ""
        for number, line in enumerate(self.text.splitlines(), 1):
            where = f"{self.path}:{number}"
            if header := re.match(r"\s*\[\[?([^\]]+)\]", line):
                found = table = _plain_key(header[1])
            elif assignment := re.match(r"\s*([\w\s.\"'-]+?)\s*=", line):
                found = ".".join(filter(None, (table, _plain_key(assignment[1]))))
                if key.startswith(f"{found}."):
                    inline = inline or where
            else:
                continue
            if found == key:
                return where
        return inline or str(self.path)


def _plain_key(text: str) -> str:
    """Return a dotted key without quotes and blanks."""
    return ".".join(part.strip(" \t\"'") for part in text.split("."))


def list_toml(directory: Path, subject: str) -> list[Path]:
    """Return the files NAME.toml of a directory, by name; none if it is not there.

    An editor's lock (.#NAME.toml) is left out. Raises ConfigError as list_names() does.
    """
    names = list_names(directory, subject)
    return [directory / name for name in names if name.endswith(".toml") and not name.startswith(".#")]


def list_names(directory: Path, subject: str) -> list[str]:
    """Return the sorted names of all files in a directory; none if it is not there.

    Raises ConfigError with the `subject` if the directory cannot be read, which Path.glob() would hide.
    """
    try:
        return sorted(os.listdir(directory))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(
            f"The directory of {subject}s cannot be read: {errno_text(error)}",
            where=str(directory),
            remedy="Make it a directory that root can read, or remove it.",
        ) from None


def read_toml(path: Path, subject: str) -> tuple[str, dict[str, Any]]:
    """Read a TOML file; return its text, and its values by key.

    Raises ConfigError with the `subject`, and with the line if the TOML parser gives one. Only regular files are read:
    a FIFO would never end.
    """
    import tomllib  # noqa: PLC0415 - in khoctl only a profile needs it

    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK | os.O_NOCTTY)) as file:
            check_regular(file.fileno(), subject, str(path))
            content = file.read(MAX_TOML_BYTES + 1)
        if len(content) > MAX_TOML_BYTES:
            raise ValueError(f"it has more than {MAX_TOML_BYTES} bytes")
        text = content.decode()
    except UsageError as error:
        raise ConfigError(error.what, where=str(path), remedy=error.remedy) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"The {subject} cannot be read: {_explain(error)}", where=str(path)) from None
    try:
        return text, tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: not TOML, or a number with too many digits
        line = re.search(r"line (\d+)", str(error))
        where = f"{path}:{line[1]}" if line else str(path)
        raise ConfigError(f"The {subject} is not valid TOML: {error}", where=where) from None


def _explain(error: OSError | ValueError) -> str:
    return errno_text(error) if isinstance(error, OSError) else str(error)


def require_type(value: Any, wanted: Any, key: str, where: str) -> Any:
    """Return a value from a file in the type of its key, or raise ConfigError.

    The types are str, int, float, bool and tuple[str, ...]. A text in a tuple has one character or more and no NUL.
    """
    kind = get_origin(wanted) or wanted
    with suppress(DecodeError):
        found = decode_value(wanted, value, key)
        if kind is float and abs(found) < MAX_NUMBER:  # an integer may have a thousand digits
            return float(found)
        if kind is tuple and all(word and "\0" not in word for word in found):
            return found
        if kind not in (float, tuple):
            return found
    raise ConfigError(f"`{key}` is {value!r}", where=where, remedy=f"It must be {TYPES.get(kind, kind)}.")


def unknown_key_error(where: str, key: str, known: Sequence[str], of: str = "") -> ConfigError:
    """Return the error for a key that a file cannot have, with one that is near it; `of` names the subject."""
    import difflib  # noqa: PLC0415 - needed only after a typing error

    subject = f" of {of}" if of else ""
    if instead := FORMER_KEYS.get((of, key)):
        return ConfigError(f"`{key}` is a key{subject} that an earlier khod had", where=where, remedy=instead)
    table, dot, name = key.rpartition(".")
    near = difflib.get_close_matches(name, known, 1)
    meant = f"Did you mean `{table}{dot}{near[0]}`? " if near else ""
    return ConfigError(
        f"`{key}` is an unknown key{subject}",
        where=where,
        remedy=f"{meant}Known here: {', '.join(known)}.",
    )
