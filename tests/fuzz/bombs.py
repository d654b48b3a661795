# SPDX-License-Identifier: LGPL-2.1-or-later
"""Small files that ask for much: bytes, descriptors, time. Each has a name, and runs as bounded as any case."""

import bz2
import functools
import gzip
import lzma
import struct
import zlib
from collections.abc import Callable

from khod.abi.fdt import FDT_BEGIN_NODE, FDT_END_NODE, FDT_PROP, PROP, U32
from tests.fuzz import entries, images, trees
from tests.unit.images import CPIO, PACK, SETUP_SIZE, bzimage, payload, portable, zboot
from tests.unit.test_fdt import BEGIN, END, STOP, body

LIMIT = 1 << 20
"""What may be unpacked, in bytes."""
TEN_GIB = 10 << 30
FILLED = CPIO[:54] + b"FFFFFFFF" + CPIO[62:116]
"""A file's entry in an archive, which promises 4 GiB."""
assert len(FILLED) == 116, "a header, the name, and nothing of the file"


def made(number: int) -> str:
    """The name of the bomb of this number."""
    return list(BOMBS)[number]


def held(case: str) -> str:
    """Look at it: what is said."""
    return BOMBS[case]()


def gzip_of_zeros(size: int = TEN_GIB) -> bytes:
    """One member: a block of a MiB, ended so that it can stand there over and over."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return b"\x1f\x8b\x08" + bytes(7) + block * (size >> 20) + b"\3\0" + bytes(8)


def zstd_of_zeros(size: int = TEN_GIB) -> bytes:
    """Blocks that each say how often a byte stands there: four bytes for 128 KiB."""
    count = size >> 17
    blocks = [(at == count - 1) | 1 << 1 | 1 << 17 << 3 for at in range(count)]
    return b"\x28\xb5\x2f\xfd\0\x58" + b"".join(block.to_bytes(3, "little") + b"\0" for block in blocks)


def lz4_of_zeros(size: int = 1 << 30) -> bytes:
    """Blocks of 8 MiB, which are 32 KiB each."""
    packed = PACK["lz4"](bytes(8 << 20))
    return packed[:4] + packed[4:] * (size >> 23)


def xz_of_zeros(size: int = TEN_GIB) -> bytes:
    """One block, whose first chunk resets everything and so can stand there over and over."""
    packed = lzma.compress(bytes(1 << 20), check=lzma.CHECK_CRC32, preset=1)
    start = 12 + (packed[12] + 1) * 4
    length = 6 + int.from_bytes(packed[start + 3 : start + 5], "big") + 1
    return packed[:start] + packed[start : start + length] * (size >> 20)


def packed(method: str) -> bytes:
    """Zeros without end, as a kernel's build would pack them."""
    match method:
        case "bzip2":
            return bz2.compress(bytes(64 << 20))
        case "lzma":
            return lzma.compress(bytes(32 << 20), format=lzma.FORMAT_ALONE, preset=0)
    return {"gzip": gzip_of_zeros, "zstd": zstd_of_zeros, "lz4": lz4_of_zeros, "xz": xz_of_zeros}[method]()


def kernel(data: bytes, machine: str = "x86_64") -> str:
    """Take it apart."""
    return images.held(images.Case(data, machine, LIMIT))


def initrd(data: bytes) -> str:
    """Walk it."""
    return images.held(images.Case(data, "", LIMIT))


def loaded(code: bytes) -> str:
    """Look into a bzImage that has this for its packed code."""
    whole = bytearray(bzimage(size=SETUP_SIZE + len(code) + 1024, contents=b"x"))
    whole[SETUP_SIZE : SETUP_SIZE + len(code)] = code
    struct.pack_into("<I", whole, 0x24C, len(code))
    return images.held(images.Case(bytes(whole), "x86_64", 8 * LIMIT))


def in_zboot(packed_: bytes) -> bytes:
    """An EFI zboot image of what is packed already."""
    whole = bytearray(zboot(b"", "gzip"))
    (start,) = struct.unpack_from("<I", whole, 8)
    struct.pack_into("<I", whole, 12, len(packed_))
    return bytes(whole[:start]) + packed_


def sections() -> str:
    """A PE file of as many sections as it may have, all of them the whole file."""
    size = 0x40 + 24 + 40 * 0xFFFF
    coff = struct.pack("<4sHHIIIHH", b"PE\0\0", 0x8664, 0xFFFF, 0, 0, 0, 0, 0x22)
    head = b"MZ".ljust(0x3C, b"\0") + struct.pack("<I", 0x40) + coff
    return kernel(head + struct.pack("<8sIIII16x", b".linux", size, 0, size, 0) * 0xFFFF)


def elf() -> str:
    """A vmlinux of as many sections as it may have, each of them all of its constants."""
    names, count = b"\0.rodata\0", 0xFFFF
    size = 120 + len(names) + 64 * count
    head = struct.pack("<HHIQQQIHHHHHH", 2, 243, 1, 0, 64, 120 + len(names), 0, 64, 56, 1, 64, count, count - 1)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, 0, 16 << 20, size, size, 1 << 12)
    section = struct.pack("<IIQQQQIIQQ", 1, 1, 2, 0, 0, size, 0, 0, 1, 0)
    last = struct.pack("<IIQQQQIIQQ", 0, 3, 0, 0, 120, len(names), 0, 0, 1, 0)
    return kernel(b"\x7fELF\2\1\1" + bytes(9) + head + segment + names + section * (count - 1) + last, "riscv64")


def tree(*tokens: bytes, names: bytes = b"a\0b\0", name: str = "") -> str:
    """Read a tree in every way there is."""
    return trees.held(trees.Case(body(*tokens, names=names), name, trees.SEEDS["v3.dtb"]))


def begin(name: bytes) -> bytes:
    """A node's token and name."""
    return U32.pack(FDT_BEGIN_NODE) + name + bytes(4 - len(name) % 4)


def prop(name: int, value: bytes = b"") -> bytes:
    """A property's token, length, the offset of its name, and its bytes."""
    return U32.pack(FDT_PROP) + PROP.pack(len(value), name) + value + bytes(-len(value) % 4)


def paths() -> str:
    """A leaf in every path, 60 long names deep."""
    leaves = b"".join(begin(b"%05x" % leaf) + U32.pack(FDT_END_NODE) for leaf in range(100_000))
    return tree(BEGIN, *[begin(b"n" * 1000)] * 60, leaves, END * 60, END, STOP)


def distinct() -> str:
    """Names of properties, each of which dtc would look for in all before it."""
    names = b"".join(b"%06x\0" % name for name in range(40_000))
    return tree(BEGIN, *[prop(7 * name) for name in range(40_000)], END, STOP, names=names)


def overlapping() -> str:
    """Names that are the ends of each other, of a kilobyte each."""
    digits = b"".join(b"%06x" % name for name in range(35_000))
    runs = [digits[at : at + 1000] + b"\0" for at in range(0, len(digits), 1000)]
    wanted = [at for at in range(1001 * len(runs)) if at % 1001 < 900]
    return tree(BEGIN, *map(prop, wanted), END, STOP, names=b"".join(runs))


def unlike() -> str:
    """Two blobs that no one knows and that differ in every other byte."""
    size = 4 << 20
    return trees.held(trees.Case(b"\1\0" * (size // 2), "unknown", bytes(size)))


def value(compatible: bytes, key: bytes, raw: bytes) -> str:
    """A tree of one property."""
    return tree(BEGIN, prop(0, compatible + b"\0"), prop(11, raw), END, STOP, names=b"compatible\0" + key + b"\0")


def grubenv(text: bytes) -> str:
    """GRUB's environment block beside an entry."""
    return entries.held(entries.alone("grubenv", text))


LINES_THAT_GO_ON = b"a=\\\n" * 16383 + b"a=\\"
BOMBS: dict[str, Callable[[], str]] = {
    **{f"kernel of zeros, {method}": functools.partial(lambda how: kernel(packed(how)), method) for method in PACK},
    **{f"initrd of zeros, {method}": functools.partial(lambda how: initrd(packed(how)), method) for method in PACK},
    **{f"code of zeros, {method}": functools.partial(lambda how: loaded(packed(how)), method) for method in PACK},
    "zeros in a zboot": lambda: kernel(in_zboot(zstd_of_zeros()), "aarch64"),
    "zeros in a UKI": lambda: kernel(portable([(".linux", zstd_of_zeros())])),
    "zeros packed twice": lambda: kernel(gzip.compress(zstd_of_zeros(), 1)),
    "an initrd's file of 4 GiB": lambda: initrd(gzip.compress(FILLED + bytes(2 << 20))),
    "an initrd of 100,000 parts": lambda: initrd(gzip.compress(b"", mtime=0) * 100_000),
    "blocks of two bytes": lambda: loaded(
        b"\x02\x21\x4c\x18" + b"\3\0\0\0\x20ab" * 1_000_000 + struct.pack("<I", 2_000_000)
    ),
    "a million versions": lambda: loaded(payload(b"-v1\0" * (1 << 20), "zstd")),
    "65,535 sections of a PE file": sections,
    "65,535 sections of an ELF file": elf,
    "200,000 nodes": lambda: tree(BEGIN, *[begin(b"%x" % n) + END for n in range(200_000)], END, STOP),
    "paths longer than all": paths,
    "names of properties that all differ": distinct,
    "names that end each other": overlapping,
    "a million strings": lambda: value(b"kho-v4", b"text", b"ab\0" * 1_000_000),
    "a million events": lambda: value(b"ftrace-v1", b"events", bytes(8) * 1_000_000),
    "650,000 ranges": lambda: value(b"ftrace,cpu-v1", b"mem", bytes(range(16)) * 650_000),
    "blobs that differ everywhere": unlike,
    "lines that go on": lambda: grubenv(LINES_THAT_GO_ON),
    "a place of 60,000 digits": lambda: grubenv(b"saved_entry=" + b"9" * 60_000 + b"\n"),
}
