"""Which kernel to boot, as the host's boot loader or its kernel packages have it."""

import functools
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from khoctl import grubenv, versions
from khoctl.defaults import default
from khoctl.entries import Entry, entries, os_release, partitions, searched
from khoctl.loader import Field, Loader, loader, read
from khoctl.unified import THIN, Unified, left_behind, unified
from khod.errors import Refused, UsageError, errno_text
from khod.text import ASCII_SPACE, split_words

__all__ = ["Entry", "Source", "entries", "entry", "image", "installed"]

ARCHITECTURES = {
    "x86_64": "x64",
    "i686": "ia32",
    "aarch64": "aa64",
    "armv7l": "arm",
    "riscv64": "riscv64",
    "loongarch64": "loongarch64",
}
"""uname(2)'s names of machines, and UEFI's, which entries use."""
KERNELS = (
    *(f"usr/lib/modules/{{}}/{name}" for name in ("vmlinuz", "vmlinux", "Image", "vmlinuz.efi", "Image.gz")),
    *(f"lib/modules/{{}}/{name}" for name in ("vmlinuz", "vmlinux", "Image", "vmlinuz.efi", "Image.gz")),
    *(f"boot/{name}-{{}}" for name in ("vmlinuz", "vmlinux", "Image")),
)
INITRDS = (
    "boot/initrd.img-{}",  # Debian
    "boot/initramfs-{}.img",  # Fedora
    "boot/initrd-{}",  # SUSE
    "usr/lib/modules/{}/initrd",
    "usr/lib/modules/{}/initrd.img",
    "usr/lib/modules/{}/initramfs.img",  # ostree
)

ADDRESS = "\\"
"""What separates the parts of a path in UEFI's own way of writing it."""


@dataclass(frozen=True)
class Source:
    """What to boot: files by path, and the command line it brings along.

    `initrds` are in order. `cmdline` is None where it brings none: a UKI carries its own inside, an installed kernel
    has none. `name` is for people; `note` is what the operator should be told before the jump, "" mostly.
    """

    kernel: Path
    initrds: tuple[Path, ...]
    cmdline: str | None
    name: str
    note: str = ""


def entry(wanted: str | None, root: Path = Path("/")) -> Source:
    """A boot loader entry by its id, with or without the suffix; None: the one that the loader would boot by itself.

    Raises UsageError where there is none of this id, Refused where it cannot be booted by kexec, or there are none.
    """
    found = entries(root)
    if not found:
        raise Refused(
            "This host has no boot loader entries",
            where=searched(root),
            remedy="Name an installed kernel with --kernel VERSION, or files with --image and --initrd.",
        )
    if wanted is not None:
        return _source(_named(wanted, found, root), root)
    chosen, once = default([one for one in found if _fits(one)] or found, root)
    return _noted(_source(chosen, root), once)


def installed(version: str, root: Path = Path("/")) -> Source:
    """An installed kernel by its version, with its initrd; a note says so where it has none.

    Looks where kernel packages put it, then where kernel-install(8) does, then for an entry of that version. Raises
    UsageError where it is nowhere, Refused where only an entry has it and kexec cannot boot that.
    """
    if version in ("", ".", "..") or "/" in version or "\0" in version:
        raise UsageError(f"{version!r} is no kernel version", where="--kernel", remedy="Give it as `uname -r` says it.")
    laid_out = [directory / version for directory in _token_directories(root)]
    packaged = [root / place.format(version) for place in KERNELS]
    kernel = next((path for path in (*packaged, *(place / "linux" for place in laid_out)) if path.is_file()), None)
    if kernel is None:
        for one in entries(root):
            if version == one.text("version") or one.stem == version or one.stem.endswith(f"-{version}"):
                return replace(_source(one, root), name=f"kernel {version}, entry {one.id}")
        raise UsageError(
            f"No kernel {version} is installed",
            where=", ".join(map(str, (root / "boot", root / "usr/lib/modules", *laid_out))),
            remedy=f"There are: {', '.join(_versions(root)) or 'none'}.",
        )
    singles = [(path,) for path in (root / place.format(version) for place in INITRDS) if path.is_file()]
    beside = [found for place in laid_out if (found := _beside(place))]
    groups = [*beside, *singles] if kernel.parent in laid_out else [*singles, *beside]
    note = "" if groups else f"No initrd of {version} was found below {root / 'boot'} or {root / 'usr/lib/modules'}."
    return Source(kernel, groups[0] if groups else (), None, f"kernel {version}", note)


def image(path: str, root: Path = Path("/")) -> str:
    """What the operator should be told of an image that is given as a file, "" mostly."""
    try:
        found = unified(Path(path))
    except OSError:
        return ""  # khod is given it all the same, and whoever opens it says what is the matter
    real = Path(os.path.realpath(path))
    on = [place for place in partitions(root) if real.is_relative_to(os.path.realpath(place))]
    return left_behind(found, real.name, max(on, key=lambda place: len(place.parts), default=None))


def _noted(source: Source, note: str) -> Source:
    return replace(source, note=" ".join(filter(None, (note, source.note))))


def _token_directories(root: Path) -> list[Path]:
    """$BOOT/TOKEN, kernel-install's directories, for every token that may be this system's."""
    tokens = []
    for path in (root / "etc/kernel/entry-token", root / "etc/machine-id"):
        if path.is_file():
            tokens.append(read(path).strip(ASCII_SPACE))
    for path in (root / "etc/os-release", root / "usr/lib/os-release"):
        if path.is_file():
            said = os_release(read(path))
            tokens += [said.get("IMAGE_ID", ""), said.get("ID", "")]
            break
    names = [token for token in (*tokens, "Default") if token not in ("", ".", "..") and "/" not in token]
    return [partition / name for partition in partitions(root) for name in dict.fromkeys(names)]


def _beside(directory: Path) -> tuple[Path, ...]:
    """The initrds that kernel-install put beside a kernel, in the order it writes into an entry: microcode first."""
    return tuple(path for name in ("microcode*", "initrd*") for path in sorted(directory.glob(name)) if path.is_file())


def _versions(root: Path) -> list[str]:
    """Every version that `installed` takes, the newest first."""
    found = set(_parts(root, KERNELS))
    found |= {path.parent.name for directory in _token_directories(root) for path in directory.glob("*/linux")}
    found |= {one.text("version") for one in entries(root) if one.text("version") and not one.unified}
    return sorted(found, key=functools.cmp_to_key(versions.compare), reverse=True)


def _parts(root: Path, places: tuple[str, ...]) -> Iterator[str]:
    """What stands for {} in those of `places` that are files."""
    for before, after in (place.split("{}") for place in places):
        for path in root.glob(f"{before}*{after}"):
            yield str(path.relative_to(root)).removeprefix(before).removesuffix(after)


def _fits(one: Entry) -> bool:
    """Whether an entry is for this machine's architecture; a loader hides those that are not."""
    machine = os.uname().machine
    wanted = one.text("architecture").lower()
    return wanted in ("", ARCHITECTURES.get(machine, machine))


def _source(one: Entry, root: Path) -> Source:
    """What an entry boots. Raises Refused, with file and line, where kexec cannot boot it as the loader would."""
    title = one.text("title")
    name = f"entry {one.id}" + (f" ({title})" if title else "")
    _refuse_foreign(one)
    if one.unified:
        return _unified(one, one.path, name)
    kernel = one.last("uki") or one.last("linux")
    if kernel is None:
        started = one.last("efi") or one.last("uki-url")
        raise Refused(
            f"The entry {one.id} names no kernel" + (f": it starts {started.value}, an EFI program" if started else ""),
            where=one.where(started),
            remedy="Choose an entry with `linux` or `uki` in it: kexec boots nothing else.",
        )
    read_as = _Language(root)
    initrds = tuple(
        _file(one, field, path, root)
        for field in one.fields
        if field.key == "initrd"
        for path in read_as.paths(field.value, one.where(field))
    )
    cmdline = _cmdline(one, read_as)
    if cmdline is None and kernel.key == "linux":
        cmdline = ""  # as the loader boots it; the running kernel's may name another root
    path = _file(one, kernel, " ".join(read_as.paths(kernel.value, one.where(kernel))), root)
    return _noted(
        Source(path, initrds, cmdline, name, left_behind(unified(path), path.name, one.partition)), _note(one)
    )


def _unified(one: Entry, path: Path, name: str) -> Source:
    """A UKI; of a thin one (lanzaboote's) the files it names, held against the hashes in it."""
    image = unified(path)
    note = left_behind(image, one.name, one.partition)
    if THIN not in image.profiles[0]:
        return Source(path, (), None, name, note)
    kernel, initrd = (_of_thin(one, image, section) for section in (".linux", ".initrd"))
    return Source(kernel, (initrd,), " ".join(split_words(image.text(".cmdline"))), name, note)


def _of_thin(one: Entry, image: Unified, section: str) -> Path:
    path = one.partition / image.text(section).replace(ADDRESS, "/").lstrip("/")
    inside = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(one.partition))
    try:
        if inside and "\0" not in str(path) and path.is_file():
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").digest() == image.bytes(f"{section}h"):
                    return path
            what = "another file than it was made for"
        else:
            what = "no file there"
    except OSError as error:
        what = f"a file that cannot be read: {errno_text(error)}"
    raise Refused(
        f"The entry {one.id} names {str(path)!r}, which is {what}",
        where=one.where(),
        remedy="Make the entry again (nixos-rebuild boot), or choose another one.",
    )


class _Language:
    """How the boot loader of this host reads an entry's values.

    GRUB runs them as a part of its script, variables, quotes and backslashes and all; systemd-boot takes them as they
    stand, each `initrd` as one path. Where the loader cannot be told a variable is one all the same: nothing that GRUB
    would have put in gets lost.
    """

    def __init__(self, root: Path) -> None:
        self.loader = loader(root)
        self.variables = grubenv.read(root)

    def words(self, value: str, where: str) -> str:
        """What the kernel is given of an entry's `options`."""
        match self.loader:
            case Loader.systemd_boot:
                return value
            case Loader.grub:
                return grubenv.line(value, self.variables, where)
            case Loader.unknown:
                return grubenv.expand(value, self.variables, where)

    def paths(self, value: str, where: str) -> list[str]:
        """The files that a value names."""
        match self.loader:
            case Loader.systemd_boot:
                return [value.replace(ADDRESS, "/")]
            case Loader.grub:
                return grubenv.paths(value, self.variables, where)
            case Loader.unknown:
                return split_words(grubenv.expand(value, self.variables, where))


def _named(wanted: str, found: list[Entry], root: Path) -> Entry:
    """The entry of this id. A part of an id is none: the next kernel update would change what it means."""
    mains = [one for one in found if not one.number]
    chosen = [one for one in found if wanted == one.id] or [one for one in mains if wanted == one.path.name]
    chosen = chosen or [one for one in mains if wanted == one.stem]
    ids = list(dict.fromkeys(one.id for one in chosen))
    if len(ids) > 1:
        raise UsageError(f"{wanted!r} is {' and '.join(ids)}", where=searched(root), remedy="Name it with its suffix.")
    if chosen:
        return chosen[0]
    import difflib  # noqa: PLC0415 - only who mistyped needs it

    known = list(dict.fromkeys(one.id for one in found))
    near = [known_id for known_id in known if known_id.startswith(wanted)] or difflib.get_close_matches(wanted, known)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    raise UsageError(
        f"There is no boot loader entry {wanted!r}",
        where=searched(root),
        remedy=f"{hint}There are: {', '.join(known)}.",
    )


def _refuse_foreign(one: Entry) -> None:
    """Raise Refused for what an entry asks of its loader and kexec cannot give."""
    if not _fits(one):
        raise Refused(
            f"The entry {one.id} is for {one.text('architecture')}, and this machine is {os.uname().machine}",
            where=one.where(one.last("architecture")),
            remedy="Choose an entry for this machine.",
        )
    given = one.last("profile")
    profile = one.profile if one.number else given.value if given else "0"
    if profile != "0":
        raise Refused(
            f"The entry {one.id} boots profile {profile} of its unified kernel image",
            where=one.where(given),
            remedy="kexec boots the image's main profile only: choose an entry of that.",
        )
    for field in one.fields:
        if any("\udc80" <= char <= "\udcff" for char in field.value):
            raise Refused(
                f"The entry {one.id} is no UTF-8", where=one.where(field), remedy="Write the line again in UTF-8."
            )


def _cmdline(one: Entry, read_as: _Language) -> str | None:
    """The entry's options, joined by a space; None where it has none, and GRUB has no `default_kernelopts` either."""
    options = [field for field in one.fields if field.key == "options"]
    if not options and read_as.loader is not Loader.systemd_boot:
        fallback = read_as.variables.get("default_kernelopts")
        return read_as.words(fallback, one.where()) if fallback else None
    lines = (read_as.words(field.value, one.where(field)).strip(ASCII_SPACE) for field in options)
    return " ".join(filter(None, lines)) if options else None


def _note(one: Entry) -> str:
    """What of the entry gets lost on the way."""
    notes = []
    if tree := one.last("devicetree") or one.last("devicetree-overlay"):
        notes.append(f"{one.id} names a device tree ({tree.value}): it is not used, kexec hands on the running one.")
    if extra := [field.value for field in one.fields if field.key == "extra"]:
        notes.append(f"{one.id} names extra files ({', '.join(extra)}): only the EFI stub loads these, kexec does not.")
    return " ".join(notes)


def _file(one: Entry, field: Field, value: str, root: Path) -> Path:
    """A file that an entry names; Refused where it is not there, or not on the entry's own file system.

    A path is relative to that file system. It stands on the partition; where that is none of its own, as with Fedora's
    /boot without a partition, paths begin at the root.
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
        f"The entry {one.id} names {value!r}, which {'is no file there' if inside else 'leads out of its file system'}",
        where=one.where(field),
        remedy=f"Mount {one.partition}, or correct the entry." if inside else "Correct the entry.",
    )
