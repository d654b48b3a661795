# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the kernel's own decompressors accept of an initrd's part, which is less than the tools can make.

The sources are lib/decompress_*.c, lib/xz and usr/Kconfig, the same in every kernel from 6.16 to 7.3.
"""

from collections.abc import Callable

from khod.errors import Refused
from khod.images.compressed import MAX_WINDOW_BYTES

OPTIONS = {
    "gzip": "CONFIG_RD_GZIP",
    "bzip2": "CONFIG_RD_BZIP2",
    "lzma": "CONFIG_RD_LZMA",
    "xz": "CONFIG_RD_XZ",
    "lzo": "CONFIG_RD_LZO",
    "lz4": "CONFIG_RD_LZ4",
    "zstd": "CONFIG_RD_ZSTD",
}
"""The option that a kernel needs to unpack a part; decompress_method() says `not configured` without it."""

INITRD = "CONFIG_BLK_DEV_INITRD"
"""The option that a kernel needs to accept an initrd at all."""

# __gunzip() skips ten bytes and a name; it would unpack all other parts of a header as data.
GZIP_FLAGS, GZIP_FTEXT, GZIP_FNAME = 3, 0x01, 0x08
GZIP_FIELDS = {0x02: "a checksum of its header", 0x04: "an extra field", 0x10: "a comment"}
# dec_stream_header(), dec_block_header()
XZ_CHECK, XZ_CHECK_CRC32 = 7, 1
XZ_CHECKS = {4: "CRC64", 10: "SHA-256"}
XZ_BLOCK_FLAGS, XZ_FILTERS = 13, 14
XZ_ONE_FILTER_MORE, XZ_TOO_MANY_FILTERS, XZ_COMPRESSED_SIZE, XZ_UNCOMPRESSED_SIZE = 0x01, 0x3E, 0x40, 0x80
XZ_BCJ = {
    4: "CONFIG_XZ_DEC_X86",
    5: "CONFIG_XZ_DEC_POWERPC",
    7: "CONFIG_XZ_DEC_ARM",
    8: "CONFIG_XZ_DEC_ARMTHUMB",
    9: "CONFIG_XZ_DEC_SPARC",
    10: "CONFIG_XZ_DEC_ARM64",
    11: "CONFIG_XZ_DEC_RISCV",
}
XZ_REMEDY = "Pack it with: xz --check=crc32"


def required_options(method: str, data: memoryview, where: str) -> set[str]:
    """Return the options that a kernel needs to unpack the part at the start of `data`.

    Raises Refused if no kernel unpacks it, with any options.
    """
    if check := _CHECKS.get(method):
        return {OPTIONS[method], *check(data, where)}
    return {OPTIONS[method]}


def _gzip_options(data: memoryview, where: str) -> set[str]:
    flags = data[GZIP_FLAGS] if len(data) > GZIP_FLAGS else 0
    if odd := flags & ~(GZIP_FTEXT | GZIP_FNAME):
        fields = [name for bit, name in GZIP_FIELDS.items() if odd & bit] or ["reserved flags"]
        raise _not_taken(f"its gzip header has {' and '.join(fields)}", where, "Pack it with: gzip -n")
    return set()


def _xz_options(data: memoryview, where: str) -> set[str]:
    if len(data) > XZ_CHECK and data[XZ_CHECK] > XZ_CHECK_CRC32:
        name = XZ_CHECKS.get(data[XZ_CHECK], f"of type {data[XZ_CHECK]}")
        raise _not_taken(f"its xz check is {name}, and kernels know only CRC32", where, XZ_REMEDY)
    if len(data) <= XZ_FILTERS:
        return set()
    flags, at = data[XZ_BLOCK_FLAGS], XZ_FILTERS
    if flags & XZ_TOO_MANY_FILTERS:
        raise _not_taken("it is packed by xz with more than two filters", where, XZ_REMEDY)
    for noted in (XZ_COMPRESSED_SIZE, XZ_UNCOMPRESSED_SIZE):
        if flags & noted:  # a number, seven bits a byte
            at += next((n for n, byte in enumerate(data[at : at + 9], 1) if not byte & 0x80), 9)
    filters = bytes(data[at : at + 2])
    if not flags & XZ_ONE_FILTER_MORE or len(filters) < len(b"\4\0"):
        return set()
    if filters[0] not in XZ_BCJ or filters[1]:
        raise _not_taken(f"it is packed by xz with a filter (of type {filters[0]}) before LZMA2", where, XZ_REMEDY)
    return {XZ_BCJ[filters[0]]}


def _zstd_options(data: memoryview, where: str) -> set[str]:
    import zstandard  # noqa: PLC0415 - not needed while khod is idle

    try:
        window = zstandard.get_frame_parameters(data[:18]).window_size
    except zstandard.ZstdError:
        return set()  # unpacking it says what is wrong
    if window > MAX_WINDOW_BYTES:
        raise _not_taken(
            f"its zstd window is {window >> 20} MiB, and kernels allow {MAX_WINDOW_BYTES >> 20}",
            where,
            "Pack it without --long.",
        )
    return set()


_CHECKS: dict[str, Callable[[memoryview, str], set[str]]] = {
    "gzip": _gzip_options,
    "xz": _xz_options,
    "zstd": _zstd_options,
}


def _not_taken(why: str, where: str, remedy: str) -> Refused:
    return Refused(f"No kernel unpacks this initrd: {why}", where=where, remedy=remedy)
