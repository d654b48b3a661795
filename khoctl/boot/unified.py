# SPDX-License-Identifier: LGPL-2.1-or-later
"""Unified kernel images (UKIs, UAPI.5) by their sections, as systemd-boot lists them and systemd-stub starts them."""

import os
from dataclasses import dataclass
from pathlib import Path

from khod.errors import Refused
from khod.images.pe import Section, read_pe
from khod.text import join_names, split_words

SIZE = 256 * 1024
"""The most that is read of the headers, and of a section, in bytes."""
MAX_SHOWN = 4
MAX_PROFILES = 256
"""UNIFIED_PROFILES_MAX of systemd's src/fundamental/uki.h."""
THIN = ".linuxh"
"""Of lanzaboote's thin images, where .linux and .initrd are paths: the SHA-256 of the file that .linux names."""
TREES = (".dtb", ".dtbauto")
POLICY = (".pcrsig", ".pcrpkey")
"""Sections of a signed PCR policy, which systemd-stub lays into the initrd as files below /.extra."""


@dataclass(frozen=True)
class Unified:
    """An image's sections by name, a mapping for each profile: its own, else the common ones."""

    path: Path
    profiles: tuple[dict[str, Section], ...]

    def section_bytes(self, name: str, profile: int = 0) -> bytes:
        """A section's contents, none where the profile has no such section."""
        section = self.profiles[profile].get(name)
        if section is None:
            return b""
        with self.path.open("rb") as file:
            file.seek(section.offset)
            return file.read(min(section.size, SIZE))

    def section_text(self, name: str, profile: int = 0) -> str:
        """A section as text, "" where the profile has none."""
        return self.section_bytes(name, profile).decode("utf-8", "replace").rstrip("\0")


def read_unified(path: Path) -> Unified:
    """Read a file's sections: a single profile without any where it is not a PE file, or ends before its headers do.

    Each section `.profile` begins a profile; what stands before the first is common to all.
    """
    common, profiles = dict[str, Section](), list[dict[str, Section]]()
    for section in _read_sections(path):
        if section.name == ".profile" and len(profiles) < MAX_PROFILES:
            profiles.append({})
        (profiles[-1] if profiles else common).setdefault(section.name, section)
    return Unified(path, tuple({**common, **own} for own in profiles) or (common,))


def _read_sections(path: Path) -> tuple[Section, ...]:
    """The sections of a PE file; none of a file that is none or is cut, and khod will say so where it is asked for."""
    with path.open("rb") as file:
        head = memoryview(file.read(SIZE))
        try:
            portable = read_pe(head, str(path), os.fstat(file.fileno()).st_size)
        except Refused:
            return ()
    return portable.sections if portable else ()


def left_behind(image: Unified, name: str, partition: Path | None) -> str:
    """What systemd-stub would add to the image and kexec does not, in a sentence; "" where there is nothing.

    `name` is the file's without a boot counter; `partition` is the file system it lies on, None where nobody knows.
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
