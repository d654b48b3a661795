# SPDX-License-Identifier: LGPL-2.1-or-later
"""Search a kernel's code and data for its release, its configuration and the KHO formats it knows."""

import re
import zlib
from collections.abc import Iterator
from itertools import islice

from khod.dataclass import dataclass
from khod.errors import Refused
from khod.images import elf
from khod.images.elf import Read

MARKS = ("dt_max",)
"""Words that distinguish v3's KHO from mainline's: names of files that only v3 has."""

WINDOW_BYTES = 64 << 10  # bytes that stay in the processor's cache while they are searched three times
OVERLAP_BYTES = 256  # bytes searched twice: more than the longest string of interest
MAX_NAME_BYTES = 64
MAX_CONFIG_BYTES = 4 << 20  # bytes; an allyesconfig is 300 kB

VERSION = re.compile(rb"-v[0-9]{1,4}\0")
# A format name is a string of its own (in a struct, the bytes of a pointer may precede it), or the end of a string that
# a linker has merged it into; known names are cut out of such a string.
WHOLE = re.compile(rb"(?:^|[^ -~])([a-z][a-z0-9,_-]*)$")
TAIL = re.compile(rb"(kho|kho-test|luo|luo-session|memfd|memblock|reserve-mem|ftrace(?:,array|,cpu)?)$")
MAX_VERSIONS = 100_000  # versions: a kernel has hundreds
LINUX = b"Linux version "  # init/version-timestamp.c: linux_banner
BANNER = re.compile(LINUX + rb"([0-9][^ \0]{0,63}) ")
BUILD = re.compile(r"\) #[0-9]")
"""What the banner in use contains, and not the weak one before it, with which init/version.c is built (7.3.4)."""
MAX_BANNERS = 16
MAX_BANNER_BYTES = 512  # bytes: the release, who built it where, the compiler and linker, and UTS_VERSION
IKCFG_ST = b"IKCFG_ST"  # kernel/configs.c
IKCONFIG = IKCFG_ST + b"\x1f\x8b\x08"


@dataclass(frozen=True)
class Contents:
    """What was found; the fields are those of `khod.images.kernel.KernelImageInfo`."""

    version: str
    config: str | None
    compatible: frozenset[str]
    marks: frozenset[str]
    banner: str = ""


def scan_image(read: Read, size: int, where: str) -> Contents:
    """Search an uncompressed kernel of `size` bytes; in a vmlinux only the sections with its constants.

    Raises Refused if it has more version strings than MAX_VERSIONS.
    """
    version, banner, config, marks = "", "", None, set[str]()
    names, count = set[str](), 0
    for at, seen, text, constant in _constant_windows(read, size):
        for found in VERSION.finditer(text):
            count += 1
            if count > MAX_VERSIONS:
                raise Refused(
                    f"There are more than {MAX_VERSIONS} versions in it", where=where, remedy="Is it a kernel?"
                )
            if found.end() > seen:
                names |= _format_names(text, found.start(), found.end() - 1)
        if not constant:
            continue
        # bytes.rfind() takes half to two thirds of find()'s time on such text (Python 3.11).
        marks |= {mark for mark in MARKS if text.rfind(b"\0" + mark.encode() + b"\0") >= 0}
        if not banner and (start := text.find(LINUX)) >= 0:
            for named in islice(BANNER.finditer(text, start), MAX_BANNERS):
                version = version or named[1].decode(errors="replace")
                line = _banner_line(bytes(read(at + named.start(), MAX_BANNER_BYTES)))
                banner = banner or (line if BUILD.search(line) else "")
        if config is None and (start := text.rfind(IKCONFIG)) >= 0:
            config = _read_config(read, at + start + len(IKCFG_ST))
    return Contents(version, config, frozenset(_drop_foreign(names)), frozenset(marks), banner)


def _banner_line(text: bytes) -> str:
    """Return the banner as in /proc/version, without its line end."""
    return re.split(rb"[\0\n]", text)[0].decode(errors="replace").rstrip()


def _constant_windows(read: Read, size: int) -> Iterator[tuple[int, int, bytes, bool]]:
    """Yield what is not code, in overlapping windows.

    A window is: its offset, how many of its bytes were seen before, its bytes, and whether they are constants.
    Constants contain everything except the names in structs.
    """
    found = elf.read_elf(read)
    sections = [
        (section.offset, min(section.offset + section.size, size), "rodata" in section.name)
        for section in (found.sections if found else ())
        if "rodata" in section.name or section.name in (".data", ".init.data")
    ]
    done = 0
    for begin, end, constant in sorted(sections) or [(0, size, True)]:
        start = max(begin, done)  # sections of a damaged file may overlap
        done = max(end, done)
        for at in range(start, end, WINDOW_BYTES):
            first = max(at - OVERLAP_BYTES, start)
            yield first, at - first, bytes(read(first, min(at + WINDOW_BYTES, end) - first)), constant


def _format_names(text: bytes, start: int, end: int) -> set[str]:
    """Return the format names that end in the version `text[start:end]`."""
    before, version = text[max(start - MAX_NAME_BYTES, 0) : start], text[start:end]
    return {(found[1] + version).decode() for pattern in (WHOLE, TAIL) if (found := pattern.search(before))}


def _drop_foreign(names: set[str]) -> set[str]:
    """Remove device tree names (`arm,gic-v3`): a name with a comma stays only if its first part is also a format."""
    families = {name.rpartition("-v")[0] for name in names}
    return {name for name in names if "," not in name or name.partition(",")[0] in families}


def _read_config(read: Read, at: int) -> str | None:
    engine = zlib.decompressobj(zlib.MAX_WBITS | 16)
    try:
        text = engine.decompress(read(at, MAX_CONFIG_BYTES), MAX_CONFIG_BYTES)
    except zlib.error:
        return None
    return text.decode(errors="replace") if engine.eof else None
