# SPDX-License-Identifier: LGPL-2.1-or-later
"""The boot loader entries of this host: both types of the Boot Loader Specification (UAPI.1, uapi-group.org).

Type #1 is a text file in loader/entries of the EFI system partition or of the extended boot loader partition. Type #2
is a unified kernel image (UKI) in EFI/Linux of one of them.
"""

import functools
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from khoctl.boot import versions
from khoctl.boot.loader import Field, detect_loader, parse_fields, read_text
from khoctl.boot.unified import read_unified
from khod.errors import Refused, errno_text
from khod.text import ASCII_SPACE

PARTITIONS = ("boot", "efi", "boot/efi")
"""Where $BOOT and the EFI system partition are mounted; of two entries with one name, the first one's is used."""
TYPE_1, TYPE_2 = "loader/entries", "EFI/Linux"
COUNTED = re.compile(r"(?P<stem>.+?)(?:\+(?P<left>[0-9]+)(?:-(?P<done>[0-9]+))?)?(?P<suffix>\.(?:conf|efi))", re.I)
"""A file name with its boot counter: STEM+LEFT-DONE.conf."""
VALUE = 4096
"""The maximum length of a value in an os-release, in characters; shlex copies what it has at each of them."""


@dataclass(frozen=True)
class BootEntry:
    """One boot loader entry.

    `name` is the file name without its boot counter; `left` and `done` are that counter, None and 0 without one. The
    fields of a UKI are those of its os-release. Each profile of a UKI except the first is an entry of its own: `number`
    is its position, `profile` its ID, or its number as text if it has no ID.
    """

    name: str
    path: Path
    partition: Path
    fields: tuple[Field, ...]
    left: int | None = None
    done: int = 0
    number: int = 0
    profile: str = ""

    @property
    def id(self) -> str:
        """The loader's name for it: FILE, or FILE@PROFILE."""
        return f"{self.name}@{self.profile}" if self.number else self.name

    @property
    def stem(self) -> str:
        """The file's name without its suffix."""
        return self.name.rpartition(".")[0]

    @property
    def is_unified(self) -> bool:
        """Whether it is of type #2, a UKI."""
        return self.path.suffix.lower() == ".efi"

    @property
    def has_failed(self) -> bool:
        """Whether every attempt to boot it failed."""
        return self.left == 0

    def last_field(self, key: str) -> Field | None:
        """Return the last line with this key, which is the valid one for a key with a single value."""
        return next((field for field in reversed(self.fields) if field.key == key), None)

    def field_text(self, key: str) -> str:
        """Return the value of a key with a single value, or "" if the key is absent."""
        return field.value if (field := self.last_field(key)) else ""

    def locate_field(self, field: Field | None = None) -> str:
        """Return the path of the entry, with the line of `field` if that stands on one."""
        return f"{self.path}:{field.line}" if field and field.line else str(self.path)


def list_entries(root: Path = Path("/")) -> list[BootEntry]:
    """Return every entry in the specification's order: newer versions first, entries that failed to boot last.

    Raises Refused if one of their directories or files cannot be read.
    """
    return sorted(_find_entries(root), key=_sort_key)


def searched_places(root: Path) -> str:
    """Return the places that `list_entries` searches, for a message."""
    return ", ".join(f"{root / partition}/{{{TYPE_1},{TYPE_2}}}" for partition in PARTITIONS)


def boot_partitions(root: Path) -> list[Path]:
    """Return the mounted partitions, each once: /efi may be a link to /boot/efi."""
    found: dict[str, Path] = {}
    for path in (root / partition for partition in PARTITIONS):
        if path.is_dir():
            found.setdefault(os.path.realpath(path), path)
    return list(found.values())


def os_release(text: str) -> dict[str, str]:
    """Return the settings in the text of an os-release(5); a line that is not a setting is left out."""
    found = {}
    for line in text.split("\n"):
        name, _, value = line.strip(ASCII_SPACE).partition("=")
        try:
            found[name] = "".join(shlex.split(value[:VALUE]))
        except ValueError:
            continue
    return found


def _compare_entries(one: str, other: str) -> int:
    return versions.compare_versions(other, one)


_NEWEST_FIRST = functools.cmp_to_key(_compare_entries)


def _sort_key(entry: BootEntry) -> tuple[object, ...]:
    """Return the sort key of an entry: UAPI.1, "Sorting", and boot_entry_compare(), which compares suffixes too."""
    key = entry.field_text("sort-key")
    grouped = (
        key.encode("utf-8", "surrogateescape"),
        entry.field_text("machine-id").encode("utf-8", "surrogateescape"),
    )
    return (
        entry.has_failed,
        not key,
        grouped if key else (),
        _NEWEST_FIRST(entry.field_text("version") if key else ""),
        _NEWEST_FIRST(entry.name),
        entry.number,
        -(entry.left or 0),
        entry.done,
    )


def _find_entries(root: Path) -> Iterator[BootEntry]:
    language = detect_loader(root)
    for partition in boot_partitions(root):
        for directory, suffix in ((TYPE_1, ".conf"), (TYPE_2, ".efi")):
            for path in _list_files(partition / directory):
                name = COUNTED.fullmatch(path.name)
                if not name or name["suffix"].lower() != suffix or path.name.startswith(".") or not path.is_file():
                    continue
                left = None if name["left"] is None else int(name["left"])
                one = BootEntry(name["stem"] + name["suffix"], path, partition, (), left, int(name["done"] or 0))
                try:
                    yield from (
                        _uki_entries(one)
                        if suffix == ".efi"
                        else [replace(one, fields=parse_fields(read_text(path), language))]
                    )
                except OSError as error:
                    raise _unreadable_error(error, path) from None


def _list_files(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise _unreadable_error(error, directory) from None


def _unreadable_error(error: OSError, path: Path) -> Refused:
    return Refused(
        f"Boot loader entries cannot be read: {errno_text(error)}", where=str(path), remedy="Run khoctl as root."
    )


def _uki_entries(one: BootEntry) -> Iterator[BootEntry]:
    """Yield an entry for each profile of a UKI, with the profile's description as fields of type #1."""
    image = read_unified(one.path)
    for number in range(len(image.profiles)):
        said, profile = (
            os_release(image.section_text(".osrel", number)),
            os_release(image.section_text(".profile", number)),
        )
        title, called = said.get("PRETTY_NAME") or said.get("NAME"), profile.get("TITLE")
        if number:
            called = called or profile.get("ID") or f"Profile #{number + 1}"
        named = {
            "title": f"{title} ({called})" if title and called else title,
            "version": said.get("IMAGE_VERSION") or said.get("VERSION_ID") or said.get("BUILD_ID"),
            "sort-key": said.get("IMAGE_ID") or said.get("ID"),
            "uname": image.section_text(".uname", number).strip(ASCII_SPACE),
        }
        found = tuple(Field(0, key, value) for key, value in named.items() if value)
        yield replace(one, fields=found, number=number, profile=profile.get("ID") or str(number))
