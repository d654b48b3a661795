# SPDX-License-Identifier: LGPL-2.1-or-later
"""The boot loader of this host: which one it is, its settings, and the syntax of its files."""

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from khod.text import split_first

VARIABLES = "sys/firmware/efi/efivars"
VENDOR = "4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
"""The Boot Loader Interface's vendor UUID."""
GLOBAL = "8be4df61-93ca-11d2-aa0d-00e098032b8c"
"""EFI_GLOBAL_VARIABLE of the UEFI specification."""
SETTINGS = ("efi/loader/loader.conf", "boot/efi/loader/loader.conf", "boot/loader/loader.conf")
"""systemd-boot reads the file on the EFI system partition, which may be mounted at /boot."""
PROGRAMS = tuple(f"{place}/EFI/systemd/systemd-boot*.efi" for place in ("efi", "boot/efi", "boot"))
GRUB = ("boot/grub2", "boot/grub", "efi/EFI/*", "boot/efi/EFI/*")
"""Where GRUB's grub.cfg and its environment block, grubenv, are."""
SIZE = 256 * 1024
"""The maximum number of bytes read from a text file."""


class Loader(enum.Enum):
    """The boot loader whose syntax the entries use."""

    systemd_boot = "systemd-boot"
    grub = "GRUB"
    unknown = ""


@dataclass(frozen=True)
class Field:
    """One line of an entry: its number (0 if it stands on no line), its key, and what follows the key."""

    line: int
    key: str
    value: str


def detect_loader(root: Path) -> Loader:
    """Return the loader that booted this system (LoaderInfo), else the one that is installed."""
    said = read_variable("LoaderInfo", root) or ""
    for one in (Loader.systemd_boot, Loader.grub):
        if said.startswith(one.value):
            return one
    if read_settings(root) is not None or _any_exists(root, PROGRAMS):
        return Loader.systemd_boot
    files = (f"{place}/{name}" for place in GRUB for name in ("grub.cfg", "grubenv"))
    return Loader.grub if _any_exists(root, files) else Loader.unknown


def _any_exists(root: Path, places: Iterable[str]) -> bool:
    return any(True for place in places for _ in root.glob(place))


def read_settings(root: Path) -> dict[str, str] | None:
    """Return the settings in loader.conf, or None if no such file can be read."""
    for path in (root / place for place in SETTINGS):
        try:
            return {field.key: field.value for field in parse_fields(read_text(path), Loader.systemd_boot)}
        except OSError:
            continue
    return None


def read_variable(name: str, root: Path) -> str | None:
    """Return a variable of the Boot Loader Interface, or None if it is not set.

    The file holds 4 bytes of attributes, then UTF-16LE text with a NUL.
    """
    try:
        raw = (root / VARIABLES / f"{name}-{VENDOR}").read_bytes()
        return raw[4:].decode("utf-16-le").partition("\0")[0] or None
    except (OSError, UnicodeDecodeError):
        return None


def secure_boot(root: Path) -> bool:
    """Whether the firmware started this system with Secure Boot: 4 bytes of attributes, then 1."""
    try:
        return (root / VARIABLES / f"SecureBoot-{GLOBAL}").read_bytes()[4:] == b"\1"
    except OSError:
        return False


def parse_fields(text: str, language: Loader) -> tuple[Field, ...]:
    """Return the lines of an entry or of loader.conf, without comments and empty lines.

    systemd-boot removes a pair of quotes around a value: line_get_key_value() in src/boot/efi-string.c. For other
    loaders a value is the text itself (UAPI.1); GRUB reads quotes as part of its script.
    """
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        key, value = split_first(line)
        if key and not key.startswith("#"):
            found.append(Field(number, key, _unquote(value) if language is Loader.systemd_boot else value))
    return tuple(found)


def _unquote(value: str) -> str:
    around = value[:1] + value[-1:]
    return value[1:-1] if len(value) > 1 and around in ('""', "''") else value


def read_text(path: Path) -> str:
    """Return the beginning of a text file; bytes that are not UTF-8 become surrogates."""
    with path.open("rb") as file:
        return file.read(SIZE).decode("utf-8", "surrogateescape")
