# SPDX-License-Identifier: LGPL-2.1-or-later
"""Kernel and initrd images small enough for a test, laid out as their documents say."""

import bz2
import functools
import gzip
import lzma
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import cramjam
import zstandard

CMDLINE_SIZE = 2047 - 30 - 1
"""Bytes without the NUL: what x86's loader leaves of the 2047 that kernels name."""

SETUP_SIZE = 5 * 512
CONFIG = "CONFIG_KEXEC_FILE=y\nCONFIG_KEXEC_HANDOVER=y\n"
FORMATS = ("kho-v1", "ftrace-v1", "ftrace,array-v1", "ftrace,cpu-v1", "memblock-v1", "reserve-mem-v1")


def code(*, formats: Sequence[str] = FORMATS, marks: Sequence[str] = ("dt_max",), config: str | None = CONFIG) -> bytes:
    """What a kernel holds uncompressed, as far as anyone looks: strings, and the configuration."""
    strings = b"\0".join([b"", *(word.encode() for word in (*marks, *formats)), b""])
    packed = b"" if config is None else b"IKCFG_ST" + gzip.compress(config.encode(), mtime=0) + b"IKCFG_ED"
    return b"\x90" * 64 + b"Linux version 6.8.0-next (b@h) #1 SMP\n\0" + strings + packed


def _lz4(data: bytes) -> bytes:
    """Pack as `lz4 -l` does: blocks of 8 MiB, each with its size before it."""
    packed = [b"\x02\x21\x4c\x18"]
    for at in range(0, len(data), 8 << 20):
        block = bytes(cramjam.lz4.compress_block(data[at : at + (8 << 20)], store_size=False))
        packed += [struct.pack("<I", len(block)), block]
    return b"".join(packed)


PACK: dict[str, Callable[[bytes], bytes]] = {
    "gzip": functools.partial(gzip.compress, mtime=0),
    "bzip2": bz2.compress,
    "lzma": functools.partial(lzma.compress, format=lzma.FORMAT_ALONE, preset=1),
    "xz": functools.partial(lzma.compress, check=lzma.CHECK_CRC32, preset=1),
    "zstd": zstandard.ZstdCompressor(write_checksum=True).compress,
    "lz4": _lz4,
}


def payload(contents: bytes, method: str) -> bytes:
    """Compress as a kernel's build does: all but gzip's have the size appended (scripts/Makefile.lib, size_append)."""
    return PACK[method](contents) + (b"" if method == "gzip" else struct.pack("<I", len(contents)))


@functools.cache
def bzimage(
    *,
    size: int = 0x4000,
    cmdline_size: int = 2047,
    version: bytes = b"6.8.0-next (b@h) #1",
    contents: bytes = code(),
    method: str = "gzip",
) -> bytes:
    """A bzImage by Documentation/arch/x86/boot.rst; an arm64 Image of the same code too, so both machines know it."""
    packed = payload(contents, method)
    image = bytearray(max(size, (SETUP_SIZE + len(packed) + len(contents) + 15) // 16 * 16))
    struct.pack_into("<QQ", image, 8, 0, len(image))
    image[0x38:0x3C] = b"ARM\x64"
    image[0x1F1] = 4  # setup_sects
    struct.pack_into("<I", image, 0x1F4, (len(image) - SETUP_SIZE) // 16)  # syssize, in paragraphs
    image[0x1FE:0x200] = b"\x55\xaa"
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, 0x020F)
    struct.pack_into("<H", image, 0x20E, 0x300 - 0x200)
    image[0x211] = 1  # LOADED_HIGH
    struct.pack_into("<IB", image, 0x230, 2 << 20, 1)  # kernel_alignment, relocatable_kernel
    struct.pack_into("<H", image, 0x236, 3)  # XLF_KERNEL_64, XLF_CAN_BE_LOADED_ABOVE_4G
    struct.pack_into("<I", image, 0x238, cmdline_size)
    struct.pack_into("<II", image, 0x248, 0, len(packed))
    struct.pack_into("<QI", image, 0x258, 16 << 20, 1 << 24)  # pref_address, init_size
    image[0x300 : 0x300 + len(version) + 1] = version + b"\0"
    image[SETUP_SIZE : SETUP_SIZE + len(packed)] = packed
    if len(contents) <= len(image) - SETUP_SIZE - len(packed):
        image[-len(contents) :] = contents
    return bytes(image)


def flat(arch: str, contents: bytes = code()) -> bytes:
    """An Image of arm64 or riscv64, a vmlinux.efi of loongarch64; the PE header EFI wants is there where we do, too."""
    image_size, text_offset = 64 + len(contents) + 0x1000, 0x200000
    start = {
        "aarch64": struct.pack("<IIQQ", 0, 0, 0, image_size),
        "riscv64": struct.pack("<IIQQ", 0, 0, text_offset, image_size),
        "loongarch64": struct.pack("<8sQQQ", b"MZ", 0x1000, image_size, text_offset),
    }[arch]
    magic = {"aarch64": b"ARM\x64", "riscv64": b"RSC\x05", "loongarch64": b"\xcd\x23\x82\x81"}[arch]
    head = start.ljust(56, b"\0") + magic
    if arch == "loongarch64":
        return head + struct.pack("<I4sH18x", 64, b"PE\0\0", 0x6264) + contents
    return head + bytes(4) + contents


def vmlinux(machine: int, contents: bytes = code(), *, order: str = "<", text: bytes = b"") -> bytes:
    """An ELF file with one segment of 1 MiB at 16 MiB: `text`, then `contents` as .rodata."""
    names = b"\0.text\0.rodata\0.shstrtab\0"
    start = 64 + 56
    parts = [(1, 1, start, len(text)), (7, 1, start + len(text), len(contents))]
    parts.append((15, 3, start + len(text) + len(contents), len(names)))
    body = text + contents + names
    sections = [bytes(64)] + [
        struct.pack(f"{order}IIQQQQIIQQ", name, kind, 2, 0, offset, size, 0, 0, 1, 0)
        for name, kind, offset, size in parts
    ]
    ident = b"\x7fELF\x02" + (b"\1" if order == "<" else b"\2") + b"\1" + bytes(9)
    head = struct.pack(
        f"{order}HHIQQQIHHHHHH", 2, machine, 1, 0, 64, start + len(body), 0, 64, 56, 1, 64, len(sections), 3
    )
    segment = struct.pack(f"{order}IIQQQQQQ", 1, 5, start, 0, 16 << 20, len(text + contents), 1 << 20, 1 << 16)
    return ident + head + segment + body + b"".join(sections)


def portable(sections: Sequence[tuple[str, bytes]], *, machine: int = 0x8664, certificates: bytes = b"") -> bytes:
    """A PE32+ file: its sections in order, each padded to 512 bytes, then a certificate table."""
    optional = bytearray(240)
    struct.pack_into("<H", optional, 0, 0x20B)
    struct.pack_into("<I", optional, 108, 16)
    start = (0x40 + 24 + len(optional) + 40 * len(sections) + 511) // 512 * 512
    table, body = b"", b""
    for name, contents in sections:
        padded = contents + bytes(-len(contents) % 512)
        table += struct.pack(
            "<8sIIII16x", name.encode(), len(contents), start + len(body), len(padded), start + len(body)
        )
        body += padded
    struct.pack_into("<II", optional, 112 + 8 * 4, start + len(body) if certificates else 0, len(certificates))
    coff = struct.pack("<4sHHIIIHH", b"PE\0\0", machine, len(sections), 0, 0, 0, len(optional), 0x22)
    head = b"MZ".ljust(0x3C, b"\0") + struct.pack("<I", 0x40) + coff + bytes(optional) + table
    return head.ljust(start, b"\0") + body + certificates


def zboot(inner: bytes, method: str, machine: int = 0xAA64) -> bytes:
    """An EFI zboot image by drivers/firmware/efi/libstub/zboot-header.S."""
    made = bytearray(portable([(".text", bytes(512))], machine=machine))
    packed = payload(inner, method)
    size = len(packed) - (0 if method == "gzip" else 4)
    struct.pack_into("<4sII8x32s", made, 4, b"zimg", len(made), size, method.encode())
    return bytes(made) + packed


def cpio(files: Mapping[str, bytes], *, magic: bytes = b"070701", mode: int = 0o100755) -> bytes:
    """An archive by Documentation/driver-api/early-userspace/buffer-format.rst, with its trailer."""
    made = b""
    for name, contents in [*files.items(), ("TRAILER!!!", b"")]:
        check = sum(contents) if magic == b"070702" else 0
        kind = 0 if name == "TRAILER!!!" else mode
        fields = (1, kind, 0, 0, 1, 0, len(contents), 0, 0, 0, 0, len(name) + 1, check)
        made += magic + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        made += bytes(-len(made) % 4)
        made += contents + bytes(-len(contents) % 4)
    return made


CPIO = cpio({"init": b"#!/bin/sh\n"})


def write(path: Path, contents: bytes) -> Path:
    """Put contents into a file; the file."""
    path.write_bytes(contents)
    return path
