# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ELF headers of a vmlinux (elf(5)), 64 bits, either byte order."""

import struct
from collections.abc import Callable

from khod.dataclass import dataclass

MAGIC = b"\x7fELF\x02"  # ELFCLASS64
ORDER = {1: "<", 2: ">"}
MACHINES = {
    (62, "<"): "x86_64",
    (183, "<"): "aarch64",
    (243, "<"): "riscv64",
    (258, "<"): "loongarch64",
    (21, "<"): "ppc64le",
    (21, ">"): "ppc64",
    (22, ">"): "s390x",
}
EHDR = "16xHHIQQQIHHHHHH"
PHDR = "IIQQQQQQ"
SHDR = "IIQQQQIIQQ"
EHDR_SIZE, PHDR_SIZE, SHDR_SIZE = 64, 56, 64  # bytes
PT_LOAD, SHT_NOBITS = 1, 8
MAX_NAME_BYTES = 64  # bytes of a section's name that are read

Read = Callable[[int, int], bytes | memoryview]  # offset, length: the bytes there, fewer at the end


@dataclass(frozen=True)
class ElfSection:
    """The place of a section's contents in the file, in bytes."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Elf:
    """A vmlinux: processor ("" if unknown), bytes it spans in physical memory, alignment, and its end in the file."""

    arch: str
    memory: int
    alignment: int
    end: int
    sections: tuple[ElfSection, ...]


def read_elf(at: Read) -> Elf | None:
    """Read the headers; None if it is not an ELF64 file or loads nothing. A stripped one may have no sections."""
    head = bytes(at(0, EHDR_SIZE))
    if len(head) < EHDR_SIZE or not head.startswith(MAGIC) or head[5] not in ORDER:
        return None
    order = ORDER[head[5]]
    _, machine, _, _, phoff, shoff, _, _, phentsize, phnum, shentsize, shnum, shstrndx = struct.unpack_from(
        order + EHDR, head
    )
    table = _whole_entries(at(phoff, phnum * PHDR_SIZE), PHDR_SIZE)
    loads = [entry for entry in struct.iter_unpack(order + PHDR, table) if entry[0] == PT_LOAD]
    if phentsize != PHDR_SIZE or not loads:
        return None
    return Elf(
        MACHINES.get((machine, order), ""),
        max(paddr + memsz for _, _, _, _, paddr, _, memsz, _ in loads) - min(entry[4] for entry in loads),
        max(entry[7] for entry in loads),
        max(offset + filesz for _, _, offset, _, _, filesz, _, _ in loads),
        _read_sections(at, order, shoff, shnum, shstrndx) if shentsize == SHDR_SIZE else (),
    )


def _read_sections(at: Read, order: str, shoff: int, shnum: int, shstrndx: int) -> tuple[ElfSection, ...]:
    entries = list(struct.iter_unpack(order + SHDR, _whole_entries(at(shoff, shnum * SHDR_SIZE), SHDR_SIZE)))
    if shstrndx >= len(entries):
        return ()
    names = entries[shstrndx][4]
    return tuple(
        ElfSection(
            bytes(at(names + entry[0], MAX_NAME_BYTES)).split(b"\0")[0].decode(errors="replace"), entry[4], entry[5]
        )
        for entry in entries
        if entry[1] != SHT_NOBITS
    )


def _whole_entries(table: bytes | memoryview, entry: int) -> bytes | memoryview:
    """Drop an entry that is cut off by the end of the file."""
    return table[: len(table) // entry * entry]
