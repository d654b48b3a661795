# SPDX-License-Identifier: LGPL-2.1-or-later
"""The entry that the boot loader boots by default: systemd-boot's rules, then GRUB's."""

import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from khoctl.boot import grubenv
from khoctl.boot.entries import BootEntry
from khoctl.boot.loader import GRUB, VARIABLES, Loader, detect_loader, read_settings, read_text, read_variable
from khod.errors import Refused

SAVED = "@saved"
ONCE = "{id} was chosen only for the next boot, and stays chosen for it: kexec passes the boot loader by."
SET_DEFAULT = re.compile(r"""^[ \t]*set[ \t]+default=(?:"([^"\n]*)"|'([^'\n]*)'|([^\s"']*))""", re.MULTILINE)
NEXT_ENTRY = ("$next_entry", "${next_entry}")
DIGITS = 9
"""The maximum number of digits of a position in the menu; int() refuses a number with thousands of digits."""


def default_entry(found: Sequence[BootEntry], root: Path) -> tuple[BootEntry, str]:
    """Return the default entry among `found`, and a note for people, or "".

    `found` is in the specification's order and not empty. The first of these that names an entry decides:
    LoaderEntryOneShot, which is for the next boot only; LoaderEntryPreferred and `preferred` in loader.conf, unless
    that entry failed to boot; LoaderEntryDefault; `default` in loader.conf. If none does and systemd-boot is not the
    loader, GRUB's next_entry decides, then the default in grub.cfg. Otherwise it is the first entry. Raises Refused if
    the loader's default is not an entry of a Linux kernel, such as auto-windows, or lies in a GRUB submenu.
    """
    conf, good = read_settings(root) or {}, [one for one in found if not one.has_failed]
    once = read_variable("LoaderEntryOneShot", root)  # a kernel may note its own reboot there; that names no entry
    if once and (chosen := _first_matching(once, found)):
        return chosen, ONCE.format(id=chosen.id)
    for pattern in (read_variable("LoaderEntryPreferred", root), conf.get("preferred")):
        if pattern and (chosen := _first_matching(pattern, good)):
            return chosen, ""
    for pattern in filter(None, (once, *_default_patterns(conf, root))):
        if chosen := _first_matching(pattern, found):
            return chosen, ""
        if pattern.lower().startswith("auto-"):
            raise Refused(
                f"The boot loader's default is {pattern}, which is not an entry of a Linux kernel",
                where=str(root / VARIABLES),
                remedy="Choose one with --entry ID.",
            )
    return (found[0], "") if detect_loader(root) is Loader.systemd_boot else _of_grub(found, root)


def _of_grub(found: Sequence[BootEntry], root: Path) -> tuple[BootEntry, str]:
    """Return the default of grub.cfg: next_entry if set, else GRUB_DEFAULT; the first entry if that names none."""
    variables = grubenv.read_variables(root)
    once = variables.get("next_entry")
    wanted = once or _grub_default(root, variables)
    *menus, name = wanted.split(">")
    chosen = _in_menu(name, found) if name and not (menus and name.isdecimal()) else None
    if chosen is None and menus:
        raise Refused(
            f"GRUB boots {wanted}, which lies in a submenu: it cannot be found among the entries",
            where="default in grub.cfg",
            remedy="Choose one with --entry ID.",
        )
    chosen = chosen or found[0]
    return chosen, ONCE.format(id=chosen.id) if once else ""


def _grub_default(root: Path, variables: Mapping[str, str]) -> str:
    """Return what grub-mkconfig wrote for GRUB_DEFAULT: a position, a name, or the value of ${saved_entry}.

    Without a grub.cfg that sets it, saved_entry is returned.
    """
    for path in (found for place in GRUB for found in sorted(root.glob(f"{place}/grub.cfg"))):
        try:
            values = ["".join(found) for found in SET_DEFAULT.findall(read_text(path))]
        except OSError:
            continue
        if value := next((value for value in values if value not in NEXT_ENTRY), ""):
            return variables.get(value.strip("${}"), "") if "$" in value else value
    return variables.get("saved_entry", "")


def _default_patterns(conf: dict[str, str], root: Path) -> Iterator[str]:
    for value in (read_variable("LoaderEntryDefault", root), conf.get("default")):
        pattern = read_variable("LoaderEntryLastBooted", root) if value == SAVED else value
        if pattern:
            yield pattern


def _first_matching(pattern: str, found: Sequence[BootEntry]) -> BootEntry | None:
    """Return the first entry whose id, with its suffix, matches the pattern; case is ignored (config_find_entry())."""
    pattern = pattern.casefold()
    return next((one for one in found if fnmatch.fnmatchcase(one.id.casefold(), pattern)), None)


def _in_menu(saved: str, found: Sequence[BootEntry]) -> BootEntry | None:
    """Return the entry that GRUB's `default` names: by id, by title, or by position in the menu, from 0."""
    named = next((one for one in found if saved in (one.id, one.stem, one.field_text("title"))), None)
    if named is None and saved.isdecimal() and len(saved) <= DIGITS and int(saved) < len(found):
        return found[int(saved)]
    return named
