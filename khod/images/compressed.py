# SPDX-License-Identifier: LGPL-2.1-or-later
"""The compression methods of kernel builds and initrds, unpacked in bounded pieces.

scripts/Makefile.lib packs with them; lib/decompress_*.c and this module unpack them. No piece is larger than an lz4
block, and unpacking stops at `limit`, which bounds the cost of a decompression bomb.
"""

import bz2
import lzma
import mmap
import struct
import zlib
from collections.abc import Callable, Generator
from contextlib import suppress

from khod.errors import Refused

PIECE_BYTES = 1 << 20  # bytes of output at a time, and
FEED_BYTES = 1 << 18  # of input
MAX_WINDOW_BYTES = 1 << 27  # zstd -22 and xz with a 128 MiB dictionary, the most a kernel build uses
LZ4_BLOCK_BYTES = 8 << 20  # lib/decompress_unlz4.c: LZ4_DEFAULT_UNCOMPRESSED_CHUNK_SIZE
LZ4_MAGIC, LZ4_LENGTH_BYTES = 0x184C2102, 4
LZ4_MAX_PACKED_BYTES = LZ4_BLOCK_BYTES + LZ4_BLOCK_BYTES // 255 + 16  # LZ4_compressBound of it

Pieces = Generator[bytes, None, int]

MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x02\x21\x4c\x18": "lz4",
    b"BZh": "bzip2",
    b"\x5d\0\0": "lzma",
    b"\x89LZO": "lzo",  # named only: no maintained library unpacks it
}
HEAD_BYTES = max(map(len, MAGIC))
"""The number of bytes that `recognise_method` needs."""


def recognise_method(head: bytes) -> str:
    """Return the compression method by the first bytes; "" if it is none."""
    return next((name for magic, name in MAGIC.items() if head.startswith(magic)), "")


def unpack_stream(method: str, data: memoryview, limit: int, where: str) -> Pieces:
    """Unpack the stream at the start of `data` in pieces; the return value is its length in `data`.

    `limit` bounds the sum of the pieces, in bytes. Raises Refused if the stream is damaged or truncated, unpacks to
    more than `limit`, or uses a method that khod does not unpack.
    """
    if method not in METHODS:
        how = f"with {method}" if method else "in a way no kernel build uses"
        raise Refused(f"It is compressed {how}, which khod does not unpack", where=where, remedy=_ANOTHER)
    pieces, total = METHODS[method](data), 0
    while True:
        try:
            piece = next(pieces)
        except StopIteration as end:
            return int(end.value)
        except (ValueError, OSError, zlib.error, lzma.LZMAError, MemoryError) as error:
            raise damaged_error(method, error, where) from None
        total += len(piece)
        if total > limit:
            raise too_large_error(limit, where)
        yield piece


def damaged_error(method: str, error: Exception, where: str) -> Refused:
    """Return the refusal of packed data that is damaged."""
    reason = str(error) or type(error).__name__
    return Refused(
        f"What {method} packed in it is damaged: {reason}", where=where, remedy="Copy the file again, or make it again."
    )


def too_large_error(limit: int, where: str) -> Refused:
    """Return the refusal of data that unpacks to more than `limit` bytes."""
    return Refused(
        f"It unpacks to more than the {limit} bytes allowed",
        where=where,
        remedy="Raise `images.max_unpacked` in /etc/kho/khod.toml if this is meant.",
    )


_ANOTHER = "Compress it in another way."
_TRUNCATED = "it ends too early"


def _unpack_gzip(data: memoryview) -> Pieces:
    engine = zlib.decompressobj(zlib.MAX_WBITS | 16)
    at = 0
    while not engine.eof:
        if engine.unconsumed_tail:
            feed: bytes | memoryview = engine.unconsumed_tail
        else:
            feed = data[at : at + FEED_BYTES]
            at += len(feed)
        piece = engine.decompress(feed, PIECE_BYTES)
        if piece:
            yield piece
        elif not feed and not engine.eof:
            raise ValueError(_TRUNCATED)
    return at - len(engine.unused_data)


def _by_engine(engine: bz2.BZ2Decompressor | lzma.LZMADecompressor, data: memoryview) -> Pieces:
    at = 0
    while not engine.eof:
        feed = data[at : at + FEED_BYTES] if engine.needs_input else b""
        if engine.needs_input and not feed:
            raise ValueError(_TRUNCATED)
        at += len(feed)
        if piece := engine.decompress(feed, PIECE_BYTES):
            yield piece
    return at - len(engine.unused_data)


def _unpack_bzip2(data: memoryview) -> Pieces:
    return _by_engine(bz2.BZ2Decompressor(), data)


def _unpack_xz(data: memoryview) -> Pieces:
    return _by_engine(lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=2 * MAX_WINDOW_BYTES), data)


def _unpack_lzma(data: memoryview) -> Pieces:
    return _by_engine(lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=2 * MAX_WINDOW_BYTES), data)


def _unpack_zstd(data: memoryview) -> Pieces:
    import zstandard  # noqa: PLC0415 - not needed while khod is idle

    try:
        length = _zstd_frame(data)
        engine = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
        with engine.stream_reader(data[:length]) as reader:
            while piece := reader.read(PIECE_BYTES):
                yield piece
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None
    return length


def _zstd_frame(data: memoryview) -> int:
    """Return the length of a frame by its blocks (RFC 8878, 3.1.1): the library does not report it."""
    import zstandard  # noqa: PLC0415 - not needed while khod is idle

    parameters = zstandard.get_frame_parameters(data[:FEED_BYTES])
    at, last = zstandard.frame_header_size(data[:FEED_BYTES]), False
    while not last:
        header = int.from_bytes(data[at : at + 3], "little")
        last, kind, size = bool(header & 1), header >> 1 & 3, header >> 3
        at += 3 + (1 if kind == 1 else size)  # a run is one byte long
        if at > len(data):
            raise ValueError(_TRUNCATED)
    at += 4 * parameters.has_checksum
    if at > len(data):
        raise ValueError(_TRUNCATED)
    return at


def _unpack_lz4(data: memoryview) -> Pieces:
    room = make_lz4_room()
    gathered = bytearray()  # a file may have millions of one-byte blocks, and a piece costs more than that
    walk = find_lz4_blocks(data)
    while True:
        try:
            at, size = next(walk)
        except StopIteration as end:
            if gathered:
                yield bytes(gathered)
            return int(end.value)
        length = unpack_lz4_block(data[at : at + size], room)
        gathered += room[:length]
        if len(gathered) >= PIECE_BYTES:
            yield bytes(gathered)
            gathered.clear()


def find_lz4_blocks(data: memoryview) -> Generator[tuple[int, int], None, int]:
    """Yield offset and size of each block of the legacy frames at the start of `data`; ValueError if one is cut off.

    There is no end mark, so the frames end at a zero, or at the four bytes that a kernel build appends. The return
    value is the offset after the last block.
    """
    at = LZ4_LENGTH_BYTES  # the magic, which may be all there is
    while len(data) - at > LZ4_LENGTH_BYTES:
        (size,) = struct.unpack_from("<I", data, at)
        if size == 0:
            break
        at += LZ4_LENGTH_BYTES
        if size == LZ4_MAGIC:
            continue
        if size > LZ4_MAX_PACKED_BYTES:
            raise ValueError(f"a block of {size} bytes")
        if size > len(data) - at:
            raise ValueError(_TRUNCATED)
        yield at, size
        at += size
    return at


def make_lz4_room() -> memoryview:
    """Return memory for one unpacked block, in huge pages if the kernel has some.

    Page by page, its first use takes as long as unpacking into it.
    """
    memory = mmap.mmap(-1, LZ4_BLOCK_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # EINVAL: a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


def unpack_lz4_block(packed: memoryview, room: memoryview) -> int:
    """Unpack one block into `room` and return its length; ValueError if it is damaged or too large."""
    import cramjam  # noqa: PLC0415 - not needed while khod is idle

    try:
        return int(cramjam.lz4.decompress_block_into(packed, room, output_len=len(room)))
    except cramjam.DecompressionError as error:
        raise ValueError(str(error)) from None


METHODS: dict[str, Callable[[memoryview], Pieces]] = {
    "gzip": _unpack_gzip,
    "xz": _unpack_xz,
    "zstd": _unpack_zstd,
    "lz4": _unpack_lz4,
    "bzip2": _unpack_bzip2,
    "lzma": _unpack_lzma,
}
