# SPDX-License-Identifier: LGPL-2.1-or-later
"""Find the kernel to boot, from the host's boot loader entries or its kernel packages."""

import functools
import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from khoctl.boot import grubenv, versions
from khoctl.boot.default import default_entry
from khoctl.boot.entries import BootEntry, boot_partitions, list_entries, os_release, searched_places
from khoctl.boot.loader import Field, Loader, detect_loader, read_text, secure_boot
from khoctl.boot.unified import THIN, Unified, left_behind, read_unified
from khod.errors import Refused, UsageError, errno_text
from khod.text import ASCII_SPACE, split_words

__all__ = ["BootEntry", "Source", "image_note", "list_entries", "source_of_entry", "source_of_version"]

ARCHITECTURES = {
    "x86_64": "x64",
    "i686": "ia32",
    "aarch64": "aa64",
    "armv7l": "arm",
    "riscv64": "riscv64",
    "loongarch64": "loongarch64",
}
"""Machine names of uname(2), and those of UEFI, which entries use."""
KERNELS = (
    *(f"usr/lib/modules/{{}}/{name}" for name in ("vmlinuz", "vmlinux", "Image", "vmlinuz.efi", "Image.gz")),
    *(f"lib/modules/{{}}/{name}" for name in ("vmlinuz", "vmlinux", "Image", "vmlinuz.efi", "Image.gz")),
    *(f"boot/{name}-{{}}" for name in ("vmlinuz", "vmlinux", "Image", "kernel")),
)
INITRDS = (
    "boot/initrd.img-{}",  # Debian
    "boot/initramfs-{}.img",  # Fedora, Gentoo
    "boot/initrd-{}",  # SUSE
    "boot/initrd-{}.img",  # Mageia
    "boot/initramfs-{}",  # Alpine
    "usr/lib/modules/{}/initrd",
    "usr/lib/modules/{}/initrd.img",
    "usr/lib/modules/{}/initramfs.img",  # ostree
)
PKGBASE, OF_PKGBASE = "usr/lib/modules/{}/pkgbase", "boot/initramfs-{}.img"
"""Arch: an initrd is named after the package, and each version of the package replaces the one before."""
ADDRESS = "\\"
"""The separator in UEFI paths."""


@dataclass(frozen=True)
class Source:
    """What to boot: files by path, and the command line that comes with them.

    `initrds` are in order. `cmdline` is None if the source brings none: a UKI carries its own inside, an installed
    kernel has none. `name` is for people; `note` is what the operator should know before the jump, mostly "".
    """

    kernel: Path
    initrds: tuple[Path, ...]
    cmdline: str | None
    name: str
    note: str = ""


def source_of_entry(wanted: str | None, root: Path = Path("/")) -> Source:
    """Return the source for a boot loader entry, by its id with or without suffix; None: the loader's default.

    Raises UsageError if no entry has this id, Refused if kexec cannot boot the entry or there are no entries.
    """
    found = list_entries(root)
    if not found:
        raise Refused(
            "This host has no boot loader entries",
            where=searched_places(root),
            remedy="Name an installed kernel with --kernel VERSION, or files with --image and --initrd.",
        )
    if wanted is not None:
        return _source_of(_entry_named(wanted, found, root), root)
    chosen, once = default_entry([one for one in found if _fits_machine(one)] or found, root)
    return _with_note(_source_of(chosen, root), once)


def source_of_version(version: str, root: Path = Path("/")) -> Source:
    """Return the source for an installed kernel, by its version, with the initrd made for it.

    The search order is: a kernel and an initrd that packages installed for that version, a boot loader entry of that
    version, the layout of kernel-install(8). Raises UsageError if there is no such kernel, Refused if no initrd is
    known to be its own, or if only an entry has it and kexec cannot boot that entry.
    """
    if version in ("", ".", "..") or "/" in version or "\0" in version:
        raise UsageError(
            f"{version!r} is not a kernel version", where="--kernel", remedy="Give it as `uname -r` says it."
        )
    name = f"kernel {version}"
    kernel = _first_existing(root / place.format(version) for place in KERNELS)
    initrd = _first_existing(root / place.format(version) for place in INITRDS) or _of_package(version, root)
    if kernel and initrd:
        return Source(kernel, (initrd,), None, name)
    of_version = [one for one in list_entries(root) if not one.number and _fits_machine(one) and _is_of(one, version)]
    if of_version:
        chosen, *others = of_version
        note = f"There are also the entries {', '.join(one.id for one in others)} of {version}." if others else ""
        return _with_note(replace(_source_of(chosen, root), name=f"{name}, entry {chosen.id}"), note)
    laid_out = [directory / version for directory in _token_directories(root)]
    for place in laid_out:
        own, beside = _first_existing([place / "linux"]), _initrds_beside(place)
        if own and beside:
            return Source(own, beside, None, name)
        if kernel and beside:
            _refuse_several(version, beside)
            return Source(kernel, beside, None, name)
        kernel = kernel or own
    if kernel:
        raise Refused(
            f"No initrd is known to be kernel {version}'s own",
            where=str(kernel),
            remedy=f"Name the files: --image {kernel} --initrd FILE; without --initrd where the kernel needs none.",
        )
    raise UsageError(
        f"No kernel {version} is installed",
        where=", ".join(map(str, (root / "boot", root / "usr/lib/modules", *laid_out))),
        remedy=f"There are: {', '.join(found)}." if (found := list_versions(root)) else "None is installed.",
    )


def image_note(path: str, root: Path = Path("/")) -> str:
    """Return what the operator should know about an image given as a file, mostly ""."""
    real = Path(os.path.realpath(path))
    try:
        found = read_unified(real) if real.is_file() else None  # an error is reported when the file is opened for khod
    except OSError:
        found = None
    if found is None:
        return ""
    on = [place for place in boot_partitions(root) if real.is_relative_to(os.path.realpath(place))]
    return left_behind(found, real.name, max(on, key=lambda place: len(place.parts), default=None))


def _first_existing(paths: Iterable[Path]) -> Path | None:
    return next((path for path in paths if path.is_file()), None)


def _of_package(version: str, root: Path) -> Path | None:
    """Return the initrd named after the package of this version, if no other version belongs to the same package."""
    bases = {path.parent.name: read_text(path).strip(ASCII_SPACE) for path in root.glob(PKGBASE.format("*"))}
    base = bases.pop(version, "")
    if not base or "/" in base or base in bases.values():
        return None
    return _first_existing([root / OF_PKGBASE.format(base)])


def _is_of(one: BootEntry, version: str) -> bool:
    """Whether an entry is for this kernel version, judged by its UKI's uname, its name, its version and its paths."""
    if uname := one.field_text("uname"):
        return uname == version
    if one.stem == version or one.stem.endswith(f"-{version}"):
        return True
    said = one.field_text("version")  # a UKI gives the system's version; SUSE's snapshots give SNAPSHOT@VERSION
    kernel = PurePosixPath((one.field_text("linux") or one.field_text("uki")).replace(ADDRESS, "/"))
    named = (said, said.partition("@")[2], kernel.parent.name, kernel.name.partition("-")[2])
    return version in named and not one.is_unified


def _refuse_several(version: str, beside: tuple[Path, ...]) -> None:
    """Raise Refused if several initrds lie beside each other: each may be complete, for a snapshot of its own."""
    whole = [path for path in beside if not path.name.startswith("microcode")]
    if len(whole) > 1:
        raise Refused(
            f"Several initrds of {version} lie beside each other, and no entry says which one is to be taken",
            where=", ".join(map(str, whole)),
            remedy="Name the files: --image and --initrd.",
        )


def _with_note(source: Source, note: str) -> Source:
    return replace(source, note=" ".join(filter(None, (note, source.note))))


def _token_directories(root: Path) -> list[Path]:
    """Return $BOOT/TOKEN, kernel-install's directory, for every token that may be this system's."""
    tokens = []
    for path in (root / "etc/kernel/entry-token", root / "etc/machine-id"):
        if path.is_file():
            tokens.append(read_text(path).strip(ASCII_SPACE))
    for path in (root / "etc/os-release", root / "usr/lib/os-release"):
        if path.is_file():
            said = os_release(read_text(path))
            tokens += [said.get("IMAGE_ID", ""), said.get("ID", "")]
            break
    names = [token for token in (*tokens, "Default") if token not in ("", ".", "..") and "/" not in token]
    return [partition / name for partition in boot_partitions(root) for name in dict.fromkeys(names)]


def _initrds_beside(directory: Path) -> tuple[Path, ...]:
    """Return the initrds that kernel-install put beside a kernel, in their order in an entry: microcode first."""
    return tuple(path for name in ("microcode*", "initrd*") for path in sorted(directory.glob(name)) if path.is_file())


def list_versions(root: Path) -> list[str]:
    """Return every version with an installed kernel, newest first."""
    found = set(_matching_parts(root, KERNELS))
    found |= {path.parent.name for directory in _token_directories(root) for path in directory.glob("*/linux")}
    found |= {
        one.field_text("uname") or (not one.is_unified and one.field_text("version")) or ""
        for one in list_entries(root)
    } - {""}
    return sorted(found, key=functools.cmp_to_key(versions.compare_versions), reverse=True)


def _matching_parts(root: Path, places: tuple[str, ...]) -> Iterator[str]:
    """Yield what stands for {} in the paths of `places` that exist."""
    for before, after in (place.split("{}") for place in places):
        for path in root.glob(f"{before}*{after}"):
            yield str(path.relative_to(root)).removeprefix(before).removesuffix(after)


def _fits_machine(one: BootEntry) -> bool:
    """Whether an entry is for this machine's architecture; a loader hides the others."""
    machine = os.uname().machine
    wanted = one.field_text("architecture").lower()
    return wanted in ("", ARCHITECTURES.get(machine, machine))


def _source_of(one: BootEntry, root: Path) -> Source:
    """Return what an entry boots; raise Refused, with file and line, if kexec cannot boot it as the loader would."""
    title = one.field_text("title")
    name = f"entry {one.id}" + (f" ({title})" if title else "")
    _refuse_foreign(one)
    if one.is_unified:
        return _unified_source(one, one.path, name)
    kernel = one.last_field("uki") or one.last_field("linux")
    if kernel is None:
        started = one.last_field("efi") or one.last_field("uki-url")
        raise Refused(
            f"The entry {one.id} names no kernel" + (f": it starts {started.value}, an EFI program" if started else ""),
            where=one.locate_field(started),
            remedy="Choose an entry with `linux` or `uki` in it: kexec boots nothing else.",
        )
    read_as = _Language(root)
    initrds = tuple(
        _entry_file(one, field, path, root)
        for field in one.fields
        if field.key == "initrd"
        for path in read_as.expand_paths(field.value, one.locate_field(field))
    )
    path = _entry_file(one, kernel, " ".join(read_as.expand_paths(kernel.value, one.locate_field(kernel))), root)
    image = read_unified(path)
    cmdline, note = _entry_cmdline(one, read_as), ""
    if ".linux" in image.profiles[0]:
        cmdline, note = _of_stub(one, image, cmdline, root)
    elif cmdline is None and kernel.key == "linux":
        cmdline = ""  # as the loader boots it; the running kernel's may name another root
    lost = left_behind(image, path.name, one.partition)
    return _with_note(_with_note(Source(path, initrds, cmdline, name, lost), _entry_note(one)), note)


def _of_stub(one: BootEntry, image: Unified, options: str | None, root: Path) -> tuple[str | None, str]:
    """Return the command line that systemd-stub uses, None for the image's own, and a note.

    The rules are those of use_load_options() in src/boot/stub.c: given options are used, but with Secure Boot only if
    the image has no command line.
    """
    if ".cmdline" not in image.profiles[0]:
        return options or "", ""
    if not options:
        return None, ""
    if secure_boot(root):
        return None, f"The options of {one.id} are left out: with Secure Boot the command line in its image counts."
    return options, ""


def _unified_source(one: BootEntry, path: Path, name: str) -> Source:
    """Return the source for a UKI; for a thin one (lanzaboote) the files it names, verified with the hashes in it."""
    image = read_unified(path)
    note = left_behind(image, one.name, one.partition)
    if THIN not in image.profiles[0]:
        return Source(path, (), None, name, note)
    kernel, initrd = (_of_thin(one, image, section) for section in (".linux", ".initrd"))
    return Source(kernel, (initrd,), " ".join(split_words(image.section_text(".cmdline"))), name, note)


def _of_thin(one: BootEntry, image: Unified, section: str) -> Path:
    path = one.partition / image.section_text(section).partition("\0")[0].replace(ADDRESS, "/").lstrip("/")
    inside = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(one.partition))
    try:
        if inside and path.is_file():
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").digest() == image.section_bytes(f"{section}h"):
                    return path
            what = "another file than it was made for"
        else:
            what = "not a file there"
    except OSError as error:
        what = f"a file that cannot be read: {errno_text(error)}"
    raise Refused(
        f"The entry {one.id} names {str(path)!r}, which is {what}",
        where=one.locate_field(),
        remedy="Make the entry again (nixos-rebuild boot), or choose another one.",
    )


class _Language:
    """How the boot loader of this host reads the values of an entry.

    GRUB reads them as part of its script, with variables, quotes and backslashes. systemd-boot uses them literally, and
    each `initrd` as one path. If the loader is unknown, variables are still expanded, so that nothing that GRUB would
    insert is lost.
    """

    def __init__(self, root: Path) -> None:
        self.loader = detect_loader(root)
        self.variables = grubenv.read_variables(root)

    def expand_options(self, value: str, where: str) -> str:
        """Return what the kernel gets for an entry's `options`."""
        match self.loader:
            case Loader.systemd_boot:
                return value
            case Loader.grub:
                return grubenv.expand_cmdline(value, self.variables, where)
            case Loader.unknown:
                return grubenv.expand_variables(value, self.variables, where)

    def expand_paths(self, value: str, where: str) -> list[str]:
        """Return the files that a value names."""
        match self.loader:
            case Loader.systemd_boot:
                return [value.replace(ADDRESS, "/")]
            case Loader.grub:
                return grubenv.expand_paths(value, self.variables, where)
            case Loader.unknown:
                return split_words(grubenv.expand_variables(value, self.variables, where))


def _entry_named(wanted: str, found: list[BootEntry], root: Path) -> BootEntry:
    """Return the entry with this id.

    A part of an id is not accepted: the next kernel update could change what it means.
    """
    mains = [one for one in found if not one.number]
    chosen = [one for one in found if wanted == one.id] or [one for one in mains if wanted == one.path.name]
    chosen = chosen or [one for one in mains if wanted == one.stem]
    ids = list(dict.fromkeys(one.id for one in chosen))
    if len(ids) > 1:
        raise UsageError(
            f"{wanted!r} is {' and '.join(ids)}", where=searched_places(root), remedy="Name it with its suffix."
        )
    if chosen:
        return chosen[0]
    import difflib  # noqa: PLC0415 - needed only after a typing error

    known = list(dict.fromkeys(one.id for one in found))
    near = [known_id for known_id in known if known_id.startswith(wanted)] or difflib.get_close_matches(wanted, known)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    raise UsageError(
        f"There is no boot loader entry {wanted!r}",
        where=searched_places(root),
        remedy=f"{hint}There are: {', '.join(known)}.",
    )


def _refuse_foreign(one: BootEntry) -> None:
    """Raise Refused if an entry asks its loader for something that kexec cannot do."""
    if not _fits_machine(one):
        raise Refused(
            f"The entry {one.id} is for {one.field_text('architecture')}, and this machine is {os.uname().machine}",
            where=one.locate_field(one.last_field("architecture")),
            remedy="Choose an entry for this machine.",
        )
    given = one.last_field("profile")
    profile = one.profile if one.number else given.value if given else "0"
    if profile != "0":
        raise Refused(
            f"The entry {one.id} boots profile {profile} of its unified kernel image",
            where=one.locate_field(given),
            remedy="kexec boots the image's main profile only: choose an entry of that.",
        )
    for field in one.fields:
        if any("\udc80" <= char <= "\udcff" for char in field.value):
            raise Refused(
                f"The entry {one.id} is not UTF-8",
                where=one.locate_field(field),
                remedy="Write the line again in UTF-8.",
            )


def _entry_cmdline(one: BootEntry, read_as: _Language) -> str | None:
    """Return the entry's options, joined by a space.

    Without options it is `default_kernelopts` of GRUB, or None if that is not set.
    """
    options = [field for field in one.fields if field.key == "options"]
    if not options and read_as.loader is not Loader.systemd_boot:
        fallback = read_as.variables.get("default_kernelopts")
        return read_as.expand_options(fallback, one.locate_field()) if fallback else None
    lines = (read_as.expand_options(field.value, one.locate_field(field)).strip(ASCII_SPACE) for field in options)
    return " ".join(filter(None, lines)) if options else None


def _entry_note(one: BootEntry) -> str:
    """Return a note on what of the entry kexec does not use."""
    notes = []
    if tree := one.last_field("devicetree") or one.last_field("devicetree-overlay"):
        notes.append(f"{one.id} names a device tree ({tree.value}): it is not used, kexec hands on the running one.")
    if extra := [field.value for field in one.fields if field.key == "extra"]:
        notes.append(f"{one.id} names extra files ({', '.join(extra)}): only the EFI stub loads these, kexec does not.")
    return " ".join(notes)


def _entry_file(one: BootEntry, field: Field, value: str, root: Path) -> Path:
    """Return a file that an entry names; raise Refused if it is missing or outside the entry's file system.

    A path is relative to the partition. If the partition is not a file system of its own, as with Fedora's /boot
    without a partition, paths may also begin at the root.
    """
    bases = [one.partition]
    if one.partition.stat().st_dev == root.stat().st_dev:
        bases.append(root)
    paths = [base / value.lstrip("/") for base in bases]
    inside = ".." not in value.split("/") and "\0" not in value
    if inside:
        for base, path in zip(bases, paths, strict=True):
            if os.path.lexists(path):
                inside = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(base))
                if inside and path.is_file():
                    return path
                break
    raise Refused(
        f"The entry {one.id} names {value!r}, which "
        f"{'is not a file there' if inside else 'leads out of its file system'}",
        where=one.locate_field(field),
        remedy=f"Mount {one.partition}, or correct the entry." if inside else "Correct the entry.",
    )
