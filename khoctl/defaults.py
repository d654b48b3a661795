"""The entry that the boot loader would boot by itself: systemd-boot's rules, then GRUB's."""

import fnmatch
from collections.abc import Iterator, Sequence
from pathlib import Path

from khoctl import grubenv
from khoctl.entries import Entry, fields, read
from khod.errors import Refused

VARIABLES = "sys/firmware/efi/efivars"
VENDOR = "4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
"""The Boot Loader Interface's vendor UUID."""
LOADERS = ("efi/loader/loader.conf", "boot/efi/loader/loader.conf", "boot/loader/loader.conf")
"""systemd-boot reads the one on the EFI system partition; /boot may be that."""
SAVED = "@saved"
DIGITS = 9
"""The most of a place in the menu; int() refuses a number of thousands."""


def default(found: Sequence[Entry], root: Path) -> Entry:
    """The default of `found`, which is in the specification's order and not empty.

    The first of these that names an entry: LoaderEntryPreferred and loader.conf's `preferred` (not one that failed to
    boot), LoaderEntryDefault, loader.conf's `default`; without a loader.conf GRUB's saved_entry; else the first entry.
    Raises Refused where the loader was told to boot something that is no entry, such as auto-windows.
    """
    conf = _loader_conf(root)
    good = [one for one in found if not one.bad]
    for pattern in (variable("LoaderEntryPreferred", root), (conf or {}).get("preferred")):
        if pattern and (chosen := _matching(pattern, good)):
            return chosen
    for pattern in _patterns(conf or {}, root):
        if chosen := _matching(pattern, found):
            return chosen
        if pattern.lower().startswith("auto-"):
            raise Refused(
                f"The boot loader's default is {pattern}, which is no entry of a Linux kernel",
                where=str(root / VARIABLES),
                remedy="Choose one with --entry ID.",
            )
    saved = grubenv.read(root).get("saved_entry") if conf is None else None
    return (_saved(saved, found) if saved else None) or found[0]


def variable(name: str, root: Path) -> str | None:
    """A variable of the Boot Loader Interface: 4 bytes of attributes, then UTF-16LE with a NUL; None where not set."""
    try:
        raw = (root / VARIABLES / f"{name}-{VENDOR}").read_bytes()
        return raw[4:].decode("utf-16-le").partition("\0")[0] or None
    except (OSError, UnicodeDecodeError):
        return None


def _patterns(conf: dict[str, str], root: Path) -> Iterator[str]:
    for value in (variable("LoaderEntryDefault", root), conf.get("default")):
        pattern = variable("LoaderEntryLastBooted", root) if value == SAVED else value
        if pattern:
            yield pattern


def _matching(pattern: str, found: Sequence[Entry]) -> Entry | None:
    """The first entry of which the id, with or without its suffix, is the pattern's; case does not matter."""
    pattern = pattern.casefold()
    names = ((one, (one.id.casefold(), one.stem.casefold())) for one in found)
    return next((one for one, both in names if any(fnmatch.fnmatchcase(name, pattern) for name in both)), None)


def _saved(saved: str, found: Sequence[Entry]) -> Entry | None:
    """GRUB's saved_entry: an id, a title, or a place in the menu, counted from 0."""
    named = next((one for one in found if saved in (one.id, one.stem, one.text("title"))), None)
    if named is None and saved.isdecimal() and len(saved) <= DIGITS and int(saved) < len(found):
        return found[int(saved)]
    return named


def _loader_conf(root: Path) -> dict[str, str] | None:
    """loader.conf's settings; None where there is no file that can be read."""
    for path in (root / place for place in LOADERS):
        try:
            return {field.key: field.value for field in fields(read(path))}
        except OSError:
            continue
    return None
