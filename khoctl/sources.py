"""Which kernel to boot, as the host's boot loader or its kernel packages have it.

Boot loader entries are those of the Boot Loader Specification (uapi-group.org): type #1, a file in loader/entries,
and type #2, a unified kernel image in EFI/Linux. Paths in an entry are relative to the partition it stands on.
"""

import fnmatch
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from khod.errors import Refused, UsageError

PARTITIONS = ("efi", "boot", "boot/efi")
"""Where the EFI system partition and the extended boot loader partition are mounted."""
ENTRIES, UNIFIED, LOADER = "loader/entries", "EFI/Linux", "loader/loader.conf"
COUNTED = re.compile(r"(?P<name>.+?)(?:\+(?P<left>\d+)(?:-\d+)?)?(?P<suffix>\.conf|\.efi)")
"""A file name with its boot counter: NAME+LEFT-DONE.conf."""
DEFAULT = "sys/firmware/efi/efivars/LoaderEntryDefault-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
ARCHITECTURES = {"x86_64": "x64", "aarch64": "aa64", "riscv64": "riscv64", "loongarch64": "loongarch64"}
NAMED = re.compile(r"[A-Za-z0-9._+~-]+")
KERNELS = (
    "usr/lib/modules/{}/vmlinuz",
    "lib/modules/{}/vmlinuz",
    "boot/vmlinuz-{}",
    "boot/vmlinux-{}",
    "boot/Image-{}",
)
INITRDS = ("boot/initrd.img-{}", "boot/initramfs-{}.img", "boot/initrd-{}", "usr/lib/modules/{}/initrd")


@dataclass(frozen=True)
class Source:
    """What to boot: files by path, and the command line they bring along, None where they bring none.

    `note` is a sentence the operator should read, "" where there is none.
    """

    kernel: Path
    initrds: tuple[Path, ...]
    cmdline: str | None
    name: str
    note: str = ""


@dataclass(frozen=True)
class Entry:
    """One boot loader entry: `id` as the loader names it, `fields` each key's values in order."""

    id: str
    path: Path
    partition: Path
    fields: dict[str, list[str]]
    left: int | None = None

    def one(self, key: str) -> str:
        """The value of a key, "" where it is not there."""
        return self.fields.get(key, [""])[0]


def entry(wanted: str | None, root: Path = Path("/")) -> Source:
    """The entry of this id, None for the default one; UsageError where there is none, Refused where it is no kernel."""
    found = entries(root)
    ids = ", ".join(one.id for one in found) or "none"
    where = ", ".join(str(root / part / ENTRIES) for part in PARTITIONS)
    if wanted is None:
        chosen = _default(found, root)
    else:
        chosen = next((one for one in found if wanted in (one.id, one.id.rpartition(".")[0])), None)
    if chosen is None:
        what = "There is no boot loader entry" if wanted is None else f"There is no boot loader entry {wanted!r}"
        raise UsageError(what, where=where, remedy=f"Those that are there: {ids}.")
    return _source(chosen)


def entries(root: Path = Path("/")) -> list[Entry]:
    """Every entry, sorted as the specification has it: those that may still boot first, then the newest."""
    found = {one.id: one for one in _all(root)}.values()
    ordered = sorted(found, key=lambda one: one.id)
    ordered.sort(key=lambda one: _version(one.one("version") or one.id), reverse=True)
    ordered.sort(key=lambda one: (not one.one("sort-key"), one.one("sort-key"), one.one("machine-id")))
    return sorted(ordered, key=lambda one: one.left == 0)


def installed(version: str, root: Path = Path("/")) -> Source:
    """An installed kernel by its version, with the initrd that was made for it; UsageError where there is none."""
    if not NAMED.fullmatch(version) or version in (".", ".."):
        raise UsageError(f"{version!r} is no kernel version", where="--kernel", remedy="Give it as uname -r says it.")
    kernel = _first(root, KERNELS, version)
    if kernel is None:
        known = sorted({path.name for path in (root / "usr/lib/modules").glob("*")})
        places = ", ".join(str(root / place.format(version)) for place in KERNELS)
        raise UsageError(
            f"No kernel {version} is installed", where=places, remedy=f"Versions here: {', '.join(known) or 'none'}."
        )
    initrd = _first(root, INITRDS, version)
    places = ", ".join(str(root / place.format(version)) for place in INITRDS)
    note = "" if initrd else f"No initrd of {version} was found ({places}): it boots without one."
    return Source(kernel, (initrd,) if initrd else (), None, f"kernel {version}", note)


def _first(root: Path, places: tuple[str, ...], version: str) -> Path | None:
    return next((path for path in (root / place.format(version) for place in places) if path.is_file()), None)


def _all(root: Path) -> Iterator[Entry]:
    for partition in (root / part for part in PARTITIONS):
        for path in sorted((partition / UNIFIED).glob("*.efi")):
            if name := COUNTED.fullmatch(path.name):
                yield Entry(name["name"] + name["suffix"], path, partition, {"uki": [path.name]}, _left(name))
        for path in sorted((partition / ENTRIES).glob("*.conf")):
            if name := COUNTED.fullmatch(path.name):
                yield Entry(name["name"] + name["suffix"], path, partition, _fields(path), _left(name))


def _left(name: re.Match[str]) -> int | None:
    return None if name["left"] is None else int(name["left"])


def _fields(path: Path) -> dict[str, list[str]]:
    fields: dict[str, list[str]] = {}
    try:
        text = path.read_text(errors="replace")
    except OSError as error:
        raise UsageError(f"The entry cannot be read: {error.strerror}", where=str(path)) from None
    for line in text.splitlines():
        key, _, value = line.strip().replace("\t", " ").partition(" ")
        if key and not key.startswith("#"):
            fields.setdefault(key, []).append(value.strip())
    return fields


def _default(found: list[Entry], root: Path) -> Entry | None:
    """What the loader was told to boot by itself: the EFI variable, loader.conf, else the first entry."""
    for pattern in _patterns(root):
        names = {one.id: one for one in found} | {one.id.rpartition(".")[0]: one for one in found}
        if match := next((one for name, one in names.items() if fnmatch.fnmatchcase(name, pattern)), None):
            return match
    return found[0] if found else None


def _patterns(root: Path) -> Iterator[str]:
    variable = root / DEFAULT
    if variable.exists():  # four bytes of attributes, then UTF-16
        yield variable.read_bytes()[4:].decode("utf-16-le", errors="replace").rstrip("\0")
    for partition in PARTITIONS:
        path = root / partition / LOADER
        if path.is_file():
            yield from (value for value in _fields(path).get("default", []) if value and not value.startswith("@"))


def _source(chosen: Entry) -> Source:
    name = f"entry {chosen.id}" + (f" ({chosen.one('title')})" if chosen.one("title") else "")
    wanted, ours = chosen.one("architecture").lower(), ARCHITECTURES.get(platform.machine(), platform.machine())
    if wanted and wanted != ours:
        raise Refused(f"The {name} is for {wanted}, and this machine is {ours}", where=str(chosen.path))
    if chosen.path.suffix == ".efi":
        return Source(chosen.path, (), None, name)
    if unified := chosen.one("uki"):
        return Source(_inside(chosen, unified), (), _options(chosen), name)
    if not (kernel := chosen.one("linux")):
        raise Refused(
            f"The {name} names no kernel{': it starts an EFI program' if chosen.one('efi') else ''}",
            where=str(chosen.path),
            remedy="Choose an entry with `linux` or `uki`.",
        )
    initrds = tuple(_inside(chosen, path) for path in chosen.fields.get("initrd", []))
    return Source(_inside(chosen, kernel), initrds, _options(chosen) or "", name)


def _options(chosen: Entry) -> str | None:
    options = chosen.fields.get("options")
    if options is None:
        return None
    line = " ".join(options)
    if "$" in line:
        raise Refused(
            f"The entry {chosen.id} has a boot loader's variable in its options: {line}",
            where=str(chosen.path),
            remedy="Give the command line with --cmdline.",
        )
    return line


def _inside(chosen: Entry, path: str) -> Path:
    """A path of an entry, on the partition the entry stands on; Refused where it leaves that or is not there."""
    place = chosen.partition / path.lstrip("/")
    inside = os.path.realpath(place).startswith(os.path.realpath(chosen.partition) + os.sep)
    if not inside or not place.is_file():
        what = "does not exist" if inside else "lies on another file system"
        raise Refused(f"{path}, which the entry {chosen.id} names, {what}", where=str(chosen.path))
    return place


def _version(text: str) -> tuple[tuple[int, int, str], ...]:
    """A version to sort by: runs of digits as numbers, which are newer than letters."""
    return tuple(
        (1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.findall(r"\d+|[a-z]+", text.lower())
    )
