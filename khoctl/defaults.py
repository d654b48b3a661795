"""The entry that the boot loader would boot by itself: systemd-boot's rules, then GRUB's."""

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from khoctl import grubenv
from khoctl.entries import Entry
from khoctl.loader import VARIABLES, Loader, loader, settings, variable
from khod.errors import Refused

SAVED = "@saved"
ONCE = "{id} was chosen for the next boot alone, and stays chosen for it: kexec passes the boot loader by."
DIGITS = 9
"""The most of a place in the menu; int() refuses a number of thousands."""


def default(found: Sequence[Entry], root: Path) -> tuple[Entry, str]:
    """The default of `found`, which is in the specification's order and not empty; and a note for people, or "".

    The first of these that names an entry: LoaderEntryOneShot, which is for the next boot alone; LoaderEntryPreferred
    and loader.conf's `preferred` (not one that failed to boot), LoaderEntryDefault, loader.conf's `default`. Where
    systemd-boot is not the loader GRUB's next_entry, else its saved_entry. Else the first entry.
    Raises Refused where the loader was told to boot something that is no entry, such as auto-windows.
    """
    conf, good = settings(root) or {}, [one for one in found if not one.bad]
    once = variable("LoaderEntryOneShot", root)  # a kernel's own note of its reboot stands there, too, and names none
    if once and (chosen := _matching(once, found)):
        return chosen, ONCE.format(id=chosen.id)
    for pattern in (variable("LoaderEntryPreferred", root), conf.get("preferred")):
        if pattern and (chosen := _matching(pattern, good)):
            return chosen, ""
    for pattern in filter(None, (once, *_patterns(conf, root))):
        if chosen := _matching(pattern, found):
            return chosen, ""
        if pattern.lower().startswith("auto-"):
            raise Refused(
                f"The boot loader's default is {pattern}, which is no entry of a Linux kernel",
                where=str(root / VARIABLES),
                remedy="Choose one with --entry ID.",
            )
    return (found[0], "") if loader(root) is Loader.systemd_boot else _of_grub(found, grubenv.read(root))


def _of_grub(found: Sequence[Entry], variables: Mapping[str, str]) -> tuple[Entry, str]:
    """As grub.cfg has it: `default` is next_entry where that is set, else saved_entry; none of both is the first."""
    once = variables.get("next_entry")
    saved = once or variables.get("saved_entry")
    chosen = (_saved(saved, found) if saved else None) or found[0]
    return chosen, ONCE.format(id=chosen.id) if once else ""


def _patterns(conf: dict[str, str], root: Path) -> Iterator[str]:
    for value in (variable("LoaderEntryDefault", root), conf.get("default")):
        pattern = variable("LoaderEntryLastBooted", root) if value == SAVED else value
        if pattern:
            yield pattern


def _matching(pattern: str, found: Sequence[Entry]) -> Entry | None:
    """The first entry whose id, with its suffix, is the pattern's; case does not matter (config_find_entry())."""
    pattern = pattern.casefold()
    return next((one for one in found if fnmatch.fnmatchcase(one.id.casefold(), pattern)), None)


def _saved(saved: str, found: Sequence[Entry]) -> Entry | None:
    """GRUB's saved_entry: an id, a title, or a place in the menu, counted from 0."""
    named = next((one for one in found if saved in (one.id, one.stem, one.text("title"))), None)
    if named is None and saved.isdecimal() and len(saved) <= DIGITS and int(saved) < len(found):
        return found[int(saved)]
    return named
