# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a kernel's payload unpacks to, as far as it is looked at: all of it kept, or of lz4's blocks one at a time.

Memory that is touched for the first time costs more than lz4 does, so its blocks share one room: what nobody reads is
unpacked, which proves that it is whole, and gone. Both are read at places, as a file is.
"""

from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate, islice, pairwise

from khod.images import compressed


def unpack_payload(data: memoryview, said: int, limit: int, where: str) -> "Pieces | Blocks":
    """Unpack what `data` begins with, to `limit` bytes at most.

    `said` is the size, modulo 2^32, that a build noted: where one lz4 frame has it, it is taken by its blocks. Refused
    where it is damaged, too large, or packed in a way that nothing here unpacks.
    """
    method = compressed.recognise_method(bytes(data[: compressed.HEAD_BYTES]))
    if method == "lz4" and (spans := _single_frame(data, limit // compressed.LZ4_BLOCK_BYTES + 1)):
        blocks = Blocks(data, spans, where)
        if blocks.size & 0xFFFFFFFF == said and blocks.size <= limit:
            return blocks
    return Pieces(compressed.unpack_stream(method, data, limit, where))


def _single_frame(data: memoryview, most: int) -> list[tuple[int, int]]:
    """The blocks of a single frame, where there are no more than `most`; none where it is cut, or several frames."""
    try:
        spans = list(islice(compressed.find_lz4_blocks(data), most + 1))
    except ValueError:
        return []
    joined = all(before + size + compressed.LZ4_LENGTH_BYTES == at for (before, size), (at, _) in pairwise(spans))
    return spans if joined and len(spans) <= most else []


class Pieces:
    """All of it: `size` in bytes, and what lies where."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = list(pieces)
        self._ends = list(accumulate(map(len, self._pieces)))
        self.size = self._ends[-1] if self._ends else 0

    def read_at(self, at: int, length: int) -> bytes:
        """Give what is there, less at the end."""
        first = bisect_right(self._ends, at)
        last = bisect_right(self._ends, at + length - 1)
        wanted, parts = at - (self._ends[first - 1] if first else 0), []
        for piece in self._pieces[first : last + 1]:
            parts.append(memoryview(piece)[wanted : wanted + length])
            wanted, length = 0, length - len(parts[-1])
        return b"".join(parts)

    def check_rest(self) -> None:
        """All of it has been unpacked."""


class Blocks:
    """An lz4 frame's blocks, of which all but the last stand for 8 MiB and each for itself; best read front to back."""

    def __init__(self, data: memoryview, spans: list[tuple[int, int]], where: str) -> None:
        """`spans` as `compressed.find_lz4_blocks` finds them, at least one; Refused where the last is damaged."""
        self._data, self._spans, self._where = data, spans, where
        self._room = bytearray(compressed.LZ4_BLOCK_BYTES)
        self._last = bytes(self._unpack_block(len(spans) - 1))  # kept: a vmlinux ends in the table of its sections
        self._held = self._done = -1  # the block in `_room`; all up to `_done` were there
        self.size = (len(spans) - 1) * compressed.LZ4_BLOCK_BYTES + len(self._last)

    def read_at(self, at: int, length: int) -> bytes:
        """Give what is there, less at the end; Refused where it is damaged."""
        parts = bytearray()
        end = min(at + length, self.size)
        while at < end:
            number, offset = divmod(at, compressed.LZ4_BLOCK_BYTES)
            part = self._block(number)[offset : offset + end - at]
            if len(part) == end - at and not parts:
                return bytes(part)
            parts += part
            at += len(part)
        return bytes(parts)

    def check_rest(self) -> None:
        """Unpack what nobody has read; Refused where it is damaged."""
        while self._done < len(self._spans) - 2:
            self._unpack_next()

    def _block(self, number: int) -> memoryview:
        if number == len(self._spans) - 1:
            return memoryview(self._last)
        while self._done < number:
            self._unpack_next()
        if self._held != number:
            self._unpack_block(number)
            self._held = number
        return memoryview(self._room)

    def _unpack_next(self) -> None:
        self._unpack_block(self._done + 1)
        self._held = self._done = self._done + 1

    def _unpack_block(self, number: int) -> memoryview:
        at, size = self._spans[number]
        try:
            length = compressed.unpack_lz4_block(self._data[at : at + size], self._room)
            if length != compressed.LZ4_BLOCK_BYTES and number < len(self._spans) - 1:
                raise ValueError(f"block {number} has {length} bytes")
        except ValueError as error:
            raise compressed.damaged_error("lz4", error, self._where) from None
        return memoryview(self._room)[:length]
