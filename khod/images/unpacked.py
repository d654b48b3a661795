# SPDX-License-Identifier: LGPL-2.1-or-later
"""A kernel's unpacked payload, as far as it is read: all of it kept, or one lz4 block at a time.

Memory touched for the first time costs more than lz4 itself, so the blocks share two buffers. Blocks that nothing reads
are unpacked, which proves that they are complete, and dropped. While one block is searched, a thread unpacks the next:
lz4 does not hold the interpreter's lock. Both classes are read by offset, as a file is.
"""

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable
from itertools import accumulate, islice, pairwise

from khod.images import compressed


def unpack_payload(data: memoryview, said: int, limit: int, where: str) -> "Pieces | Blocks":
    """Unpack the start of `data`, to at most `limit` bytes.

    `said` is the size, modulo 2^32, that the build recorded; a single lz4 frame of that size is read by blocks. Raises
    Refused if the payload is damaged, too large, or packed with a method that khod does not unpack.
    """
    method = compressed.recognise_method(bytes(data[: compressed.HEAD_BYTES]))
    if method == "lz4" and (spans := _single_frame(data, limit // compressed.LZ4_BLOCK_BYTES + 1)):
        blocks = Blocks(data, spans, where)
        if blocks.size & 0xFFFFFFFF == said and blocks.size <= limit:
            return blocks
    return Pieces(compressed.unpack_stream(method, data, limit, where))


def _single_frame(data: memoryview, most: int) -> list[tuple[int, int]]:
    """Return the blocks of a single frame, at most `most`; none if there are more, or the frame is cut off.

    The result is also empty for several frames.
    """
    try:
        spans = list(islice(compressed.find_lz4_blocks(data), most + 1))
    except ValueError:
        return []
    joined = all(before + size + compressed.LZ4_LENGTH_BYTES == at for (before, size), (at, _) in pairwise(spans))
    return spans if joined and len(spans) <= most else []


class Pieces:
    """A payload that is kept completely; `size` is in bytes."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = list(pieces)
        self._ends = list(accumulate(map(len, self._pieces)))
        self.size = self._ends[-1] if self._ends else 0

    def read_at(self, at: int, length: int) -> bytes:
        """Return the bytes at an offset, fewer at the end."""
        first = bisect_right(self._ends, at)
        last = bisect_right(self._ends, at + length - 1)
        wanted, parts = at - (self._ends[first - 1] if first else 0), []
        for piece in self._pieces[first : last + 1]:
            parts.append(memoryview(piece)[wanted : wanted + length])
            wanted, length = 0, length - len(parts[-1])
        return b"".join(parts)

    def check_rest(self) -> None:
        """Do nothing: everything has been unpacked."""


class Blocks:
    """The blocks of an lz4 frame; each except the last is 8 MiB and independent. Reading front to back is fastest."""

    def __init__(self, data: memoryview, spans: list[tuple[int, int]], where: str) -> None:
        """Take `spans` from `compressed.find_lz4_blocks`, at least one; raise Refused if the last block is damaged."""
        self._data, self._spans, self._where = data, spans, where
        self._room, self._spare = compressed.make_lz4_room(), compressed.make_lz4_room()
        last = len(spans) - 1
        self._coming = _Unpacking(self._unpack_block, 0, self._spare) if last else None
        """The block after `_done`, which is unpacked into `_spare`."""
        self._last = bytes(self._room[: self._unpack_block(last, self._room)])  # a vmlinux has its section table there
        self._held = self._done = -1  # the block in `_room`; the last block unpacked in order
        self.size = (len(spans) - 1) * compressed.LZ4_BLOCK_BYTES + len(self._last)

    def read_at(self, at: int, length: int) -> bytes:
        """Return the bytes at an offset, fewer at the end; raise Refused if they are damaged."""
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
        """Unpack what was not read; raise Refused if it is damaged."""
        while self._done < len(self._spans) - 2:
            self._unpack_next()

    def _block(self, number: int) -> memoryview:
        if number == len(self._spans) - 1:
            return memoryview(self._last)
        while self._done < number:
            self._unpack_next()
        if self._held != number:
            self._unpack_block(number, self._room)
            self._held = number
        return self._room

    def _unpack_next(self) -> None:
        """Wait for the block after `_done`, and have the one after that unpacked meanwhile."""
        number = self._done + 1
        coming = self._coming or _Unpacking(self._unpack_block, number, self._spare)
        self._coming = None
        coming.wait()
        self._room, self._spare = self._spare, self._room
        self._held = self._done = number
        if number + 1 < len(self._spans) - 1:
            self._coming = _Unpacking(self._unpack_block, number + 1, self._spare)

    def _unpack_block(self, number: int, room: memoryview) -> int:
        """Unpack a block into `room` and return its length; raise Refused if it is damaged."""
        at, size = self._spans[number]
        try:
            length = compressed.unpack_lz4_block(self._data[at : at + size], room)
            if length != compressed.LZ4_BLOCK_BYTES and number < len(self._spans) - 1:
                raise ValueError(f"block {number} has {length} bytes")
        except ValueError as error:
            raise compressed.damaged_error("lz4", error, self._where) from None
        return length


class _Unpacking:
    """A block that a thread of its own unpacks."""

    def __init__(self, unpack: Callable[[int, memoryview], int], number: int, room: memoryview) -> None:
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(unpack, number, room), daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # no thread is left (TasksMax=)
            self._run(unpack, number, room)

    def _run(self, unpack: Callable[[int, memoryview], int], number: int, room: memoryview) -> None:
        try:
            unpack(number, room)
        except BaseException as error:  # noqa: BLE001 - it is raised where the block is waited for
            self._error = error

    def wait(self) -> None:
        """Wait for its end; raise what it raised."""
        if self._thread.ident is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error
