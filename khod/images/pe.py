# SPDX-License-Identifier: LGPL-2.1-or-later
"""The PE headers of EFI kernels and unified kernel images (PE Format, Microsoft), as far as khod needs them."""

import struct

from khod.dataclass import dataclass
from khod.errors import Refused

DOS_HEADER, E_LFANEW = 0x40, 0x3C
COFF = struct.Struct("<4sHHIIIHH")  # with the signature before it
SECTION = struct.Struct("<8sIIII16x")
OPTIONAL = {0x10B: 92, 0x20B: 108}  # PE32, PE32+: the offset of NumberOfRvaAndSizes
CERTIFICATE_TABLE = 4  # the data directory's index; its address is an offset in the file


@dataclass(frozen=True)
class Section:
    """One section, and the place of its contents in the file, in bytes."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Portable:
    """A PE file: its processor, its sections in order, and the size of its certificate table in bytes."""

    machine: int
    sections: tuple[Section, ...]
    certificates: int


def read_pe(view: memoryview, where: str, file_size: int | None = None) -> Portable | None:
    """Read a PE file's headers; None if it has none, Refused if the file ends before what they name.

    `file_size` in bytes is needed if `view` is only the beginning of the file.
    """
    size = len(view) if file_size is None else file_size
    if len(view) < DOS_HEADER or bytes(view[:2]) != b"MZ":
        return None
    (at,) = struct.unpack_from("<I", view, E_LFANEW)
    if at + COFF.size > len(view):
        return None
    magic, machine, count, _, _, _, optional, _ = COFF.unpack_from(view, at)
    if magic != b"PE\0\0":
        return None
    table = at + COFF.size + optional
    if table + count * SECTION.size > len(view):
        raise truncated_error("the PE section table", table + count * SECTION.size, len(view), where)
    sections = tuple(_read_section(view, table + number * SECTION.size, size, where) for number in range(count))
    return Portable(machine, sections, _certificates_size(view, at + COFF.size, optional, size, where))


def _read_section(view: memoryview, at: int, file_size: int, where: str) -> Section:
    raw_name, virtual, _, raw, offset = SECTION.unpack_from(view, at)
    name = raw_name.rstrip(b"\0").decode(errors="replace")
    size = min(virtual, raw)  # in the file a section is padded; in memory it may be larger
    if size and offset + size > file_size:
        raise truncated_error(f"section {name!r}", offset + size, file_size, where)
    return Section(name, offset, size)


def _certificates_size(view: memoryview, at: int, size: int, file_size: int, where: str) -> int:
    """Return the size of the certificate table, which holds signatures, in bytes; 0 without one."""
    counts = OPTIONAL.get(int.from_bytes(view[at : at + min(size, 2)], "little"))
    if counts is None:
        return 0
    entry = counts + 4 + 8 * CERTIFICATE_TABLE
    if entry + 8 > size or struct.unpack_from("<I", view, at + counts)[0] <= CERTIFICATE_TABLE:
        return 0
    offset, length = struct.unpack_from("<II", view, at + entry)
    if length and offset + length > file_size:
        raise truncated_error("its certificate table", offset + length, file_size, where)
    return int(length)


def truncated_error(what: str, promised: int, size: int, where: str) -> Refused:
    """Return the refusal of a file that ends before what its headers name."""
    return Refused(
        f"The image is truncated: {what} ends at byte {promised}, the file at byte {size}",
        where=where,
        remedy="Copy the kernel image again.",
    )
