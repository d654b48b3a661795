# SPDX-License-Identifier: LGPL-2.1-or-later
"""The sections of unified kernel images (UKIs, UAPI.5), as systemd-boot lists them and systemd-stub starts them."""

import os
from dataclasses import dataclass
from pathlib import Path

from khod.errors import Refused
from khod.images.pe import Section, read_pe
from khod.text import join_names, split_words

SIZE = 256 * 1024
"""The maximum number of bytes read of the headers, and of each section."""
MAX_SHOWN = 4
MAX_PROFILES = 256
"""UNIFIED_PROFILES_MAX of systemd's src/fundamental/uki.h."""
THIN = ".linuxh"
"""The section of lanzaboote's thin images with the SHA-256 of the file that .linux names.

In these images .linux and .initrd are paths.
"""
TREES = (".dtb", ".dtbauto")
POLICY = (".pcrsig", ".pcrpkey")
"""The sections of a signed PCR policy, which systemd-stub puts into the initrd as files below /.extra."""


@dataclass(frozen=True)
class Unified:
    """An image's sections by name: one mapping for each profile, with the common sections it does not replace."""

    path: Path
    profiles: tuple[dict[str, Section], ...]

    def section_bytes(self, name: str, profile: int = 0) -> bytes:
        """Return the contents of a section, at most SIZE bytes; b"" if the profile has no such section."""
        section = self.profiles[profile].get(name)
        if section is None:
            return b""
        with self.path.open("rb") as file:
            file.seek(section.offset)
            return file.read(min(section.size, SIZE))

    def section_text(self, name: str, profile: int = 0) -> str:
        """Return a section as text, or "" if the profile has none."""
        return self.section_bytes(name, profile).decode("utf-8", "replace").rstrip("\0")


def read_unified(path: Path) -> Unified:
    """Read the sections of a file; one profile without sections if it is not a PE file or its headers are cut off.

    Each section `.profile` begins a profile; the sections before the first are common to all.
    """
    common, profiles = dict[str, Section](), list[dict[str, Section]]()
    for section in _read_sections(path):
        if section.name == ".profile" and len(profiles) < MAX_PROFILES:
            profiles.append({})
        (profiles[-1] if profiles else common).setdefault(section.name, section)
    return Unified(path, tuple({**common, **own} for own in profiles) or (common,))


def _read_sections(path: Path) -> tuple[Section, ...]:
    """Return the sections of a PE file, or none if it is not one or is cut off; khod reports that when it is used."""
    with path.open("rb") as file:
        head = memoryview(file.read(SIZE))
        try:
            portable = read_pe(head, str(path), os.fstat(file.fileno()).st_size)
        except Refused:
            return ()
    return portable.sections if portable else ()


def left_behind(image: Unified, name: str, partition: Path | None) -> str:
    """Return a sentence on what systemd-stub would add to the image and kexec does not; "" if there is nothing.

    `name` is the file name without its boot counter; `partition` is the file system it lies on, None if unknown.
    """
    if ".linux" not in image.profiles[0]:
        return ""
    beside = [image.path.parent / f"{one}.extra.d" for one in dict.fromkeys((name, image.path.name))]
    common = [partition / "loader"] if partition else []
    lost = []
    if addons := _list_files([*beside, *(place / "addons" for place in common)], "*.addon.efi"):
        words = " ".join(filter(None, (_addon_words(path) for path in addons)))
        lost.append(_name_files("addons", addons) + (f", with the words {words}" if words else ""))
    if credentials := _list_files([*beside, *(place / "credentials" for place in common)], "*.cred"):
        lost.append(_name_files("credentials", credentials))
    if extensions := _list_files(beside, "*.raw"):  # system extensions need no .sysext in their names
        lost.append(_name_files("extensions", extensions))
    if any(section in image.profiles[0] for section in TREES):
        lost.append("its device tree (kexec hands on the running one)")
    if any(section in image.profiles[0] for section in POLICY):
        lost.append("its signed PCR policy, so that a disk which that unlocks stays locked")
    return f"systemd-stub would add to {name}, and kexec does not: {'; '.join(lost)}." if lost else ""


def _list_files(places: list[Path], pattern: str) -> list[Path]:
    return [path for place in places for path in sorted(place.glob(pattern)) if path.is_file()]


def _name_files(what: str, paths: list[Path]) -> str:
    return f"{what} ({join_names((path.name for path in paths), MAX_SHOWN)})"


def _addon_words(addon: Path) -> str:
    try:
        return " ".join(split_words(read_unified(addon).section_text(".cmdline")))
    except OSError:
        return ""
