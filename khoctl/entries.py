"""The boot loader entries of this host: the Boot Loader Specification (UAPI.1, uapi-group.org), both its types.

Type #1 is a text file in loader/entries of the EFI system partition or of the extended boot loader partition, type #2 a
unified kernel image (UKI) in their EFI/Linux.
"""

import functools
import os
import re
import shlex
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from khoctl import versions
from khod.errors import Refused, errno_text
from khod.text import ASCII_SPACE, split_first

PARTITIONS = ("boot", "efi", "boot/efi")
"""Where $BOOT and the EFI system partition are mounted; of two entries of one name the first one's counts."""
TYPE_1, TYPE_2 = "loader/entries", "EFI/Linux"
COUNTED = re.compile(r"(?P<stem>.+?)(?:\+(?P<left>[0-9]+)(?:-(?P<done>[0-9]+))?)?(?P<suffix>\.(?:conf|efi))", re.I)
"""A file name with its boot counter: STEM+LEFT-DONE.conf."""
SIZE = 256 * 1024
"""The most that is read of an entry's text, of a UKI's headers and of its os-release, in bytes."""

VALUE = 4096
"""The most of a value in an os-release, in characters: shlex copies what it has at each of them."""


@dataclass(frozen=True)
class Field:
    """One line of an entry: its number, its key, and what follows the key."""

    line: int
    key: str
    value: str


@dataclass(frozen=True)
class Entry:
    """One boot loader entry.

    `id` is the file's name without a boot counter, as the loader has it; `left` and `done` are that counter, None and 0
    where there is none. A UKI's fields are what its os-release says.
    """

    id: str
    path: Path
    partition: Path
    fields: tuple[Field, ...]
    left: int | None = None
    done: int = 0

    @property
    def stem(self) -> str:
        """The id without its suffix."""
        return self.id.rpartition(".")[0]

    @property
    def unified(self) -> bool:
        """Whether it is of type #2, a UKI."""
        return self.path.suffix.lower() == ".efi"

    @property
    def bad(self) -> bool:
        """Whether every attempt to boot it failed."""
        return self.left == 0

    def last(self, key: str) -> Field | None:
        """The line that counts where a key stands for one thing."""
        return next((field for field in reversed(self.fields) if field.key == key), None)

    def text(self, key: str) -> str:
        """The value of a key that stands for one thing, "" where it is not there."""
        return field.value if (field := self.last(key)) else ""

    def where(self, field: Field | None = None) -> str:
        """The file, and the line."""
        return f"{self.path}:{field.line}" if field else str(self.path)


def entries(root: Path = Path("/")) -> list[Entry]:
    """Every entry, in the specification's order: those that failed to boot last, newer versions first.

    Raises Refused where a directory of theirs may not be read.
    """
    return sorted(_all(root), key=_place)


def searched(root: Path) -> str:
    """Where `entries` looks, for a message."""
    return ", ".join(f"{root / partition}/{{{TYPE_1},{TYPE_2}}}" for partition in PARTITIONS)


def partitions(root: Path) -> list[Path]:
    """The mounted partitions, each once: /efi may be a link to /boot/efi."""
    found: dict[str, Path] = {}
    for path in (root / partition for partition in PARTITIONS):
        if path.is_dir():
            found.setdefault(os.path.realpath(path), path)
    return list(found.values())


def fields(text: str) -> tuple[Field, ...]:
    """The lines of an entry, or of loader.conf; comments and empty ones are left out."""
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        key, value = split_first(line)
        if key and not key.startswith("#"):
            found.append(Field(number, key, value))
    return tuple(found)


def os_release(text: str) -> dict[str, str]:
    """The settings of an os-release(5); a line that is none is left out."""
    found = {}
    for line in text.split("\n"):
        name, _, value = line.strip(ASCII_SPACE).partition("=")
        try:
            found[name] = "".join(shlex.split(value[:VALUE]))
        except ValueError:
            continue
    return found


def read(path: Path) -> str:
    """The beginning of a text file; what is no UTF-8 is kept as surrogates."""
    with path.open("rb") as file:
        return file.read(SIZE).decode("utf-8", "surrogateescape")


def _older(one: str, other: str) -> int:
    return versions.compare(other, one)


_NEWEST_FIRST = functools.cmp_to_key(_older)


def _place(entry: Entry) -> tuple[object, ...]:
    """Where an entry sorts: UAPI.1, "Sorting"."""
    key = entry.text("sort-key")
    grouped = (key.encode("utf-8", "surrogateescape"), entry.text("machine-id").encode("utf-8", "surrogateescape"))
    return (
        entry.bad,
        not key,
        grouped if key else (),
        _NEWEST_FIRST(entry.text("version") if key else ""),
        _NEWEST_FIRST(entry.stem),
        entry.done,
    )


def _all(root: Path) -> Iterator[Entry]:
    for partition in partitions(root):
        for directory, suffix in ((TYPE_1, ".conf"), (TYPE_2, ".efi")):
            for path in _listed(partition / directory):
                name = COUNTED.fullmatch(path.name)
                if not name or name["suffix"].lower() != suffix or path.name.startswith(".") or not path.is_file():
                    continue
                left = None if name["left"] is None else int(name["left"])
                try:
                    about = _about(path) if suffix == ".efi" else fields(read(path))
                except OSError as error:
                    raise _unreadable(error, path) from None
                yield Entry(name["stem"] + name["suffix"], path, partition, about, left, int(name["done"] or 0))


def _listed(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise _unreadable(error, directory) from None


def _unreadable(error: OSError, path: Path) -> Refused:
    return Refused(
        f"Boot loader entries cannot be read: {errno_text(error)}", where=str(path), remedy="Run khoctl as root."
    )


def _about(path: Path) -> tuple[Field, ...]:
    """What a UKI says of itself, in the words of a type #1 entry; nothing where it has no os-release in it."""
    said = os_release(_osrel(path))
    named = {
        "title": said.get("PRETTY_NAME") or said.get("NAME"),
        "version": said.get("IMAGE_VERSION") or said.get("VERSION_ID") or said.get("BUILD_ID"),
        "sort-key": said.get("IMAGE_ID") or said.get("ID"),
    }
    return tuple(Field(0, key, value) for key, value in named.items() if value)


def _osrel(path: Path) -> str:
    """The section .osrel of a PE file: DOS header, then COFF header, optional header, section table (PE format)."""
    with path.open("rb") as file:
        head = file.read(SIZE)
        try:
            (start,) = struct.unpack_from("<I", head, 0x3C)
            signature, count, optional = struct.unpack_from("<4s2xH12xH", head, start)
            if signature != b"PE\0\0":
                return ""
            for number in range(count):
                name, size, _, raw, offset = struct.unpack_from("<8s4I", head, start + 24 + optional + 40 * number)
                if name.rstrip(b"\0") == b".osrel":
                    file.seek(offset)
                    return file.read(min(size, raw, SIZE)).decode("utf-8", "replace")
        except struct.error:
            pass  # it ends before its headers do: no PE file, and khod will say so where it is asked for
    return ""
