# SPDX-License-Identifier: LGPL-2.1-or-later
"""A payload read at places: whatever its frame, the same bytes; and damage is noticed where nobody reads."""

import random
import struct

import pytest

from khod.errors import Refused
from khod.images.compressed import LZ4_BLOCK_BYTES
from khod.images.unpacked import Blocks, Pieces, unpack_payload
from tests.unit.images import PACK

LIMIT = 1 << 30
WHOLE = random.Random(1).randbytes(1 << 20) * 30  # 3 blocks of 8 MiB, and one of 6
SAID = struct.pack("<I", len(WHOLE))
PACKED = PACK["lz4"](WHOLE) + SAID


def take(data: bytes, said: int = len(WHOLE), limit: int = LIMIT) -> Pieces | Blocks:
    return unpack_payload(memoryview(data), said, limit, "vmlinuz")


def blocks(packed: bytes) -> list[tuple[int, int]]:
    """Where the blocks of one frame lie, by hand."""
    found, at = [], 4
    while at < len(packed) - 4:
        (size,) = struct.unpack_from("<I", packed, at)
        found.append((at + 4, size))
        at += 4 + size
    return found


@pytest.mark.parametrize("method", sorted(PACK))
def test_a_place_has_the_same_bytes_in_each_packing(method: str) -> None:
    held = WHOLE if method == "lz4" else WHOLE[: 5 << 20]
    whole = take(PACK[method](held) + struct.pack("<I", len(held)))
    assert whole.size == len(held)
    chance = random.Random(method)
    spans = [(chance.randrange(len(held)), chance.randrange(1 << 20)) for _ in range(40)]
    spans += [(edge - 5, 10) for edge in range(LZ4_BLOCK_BYTES, len(held), LZ4_BLOCK_BYTES)]
    spans += [(0, len(held)), (len(held) - 1, 100), (len(held), 1), (0, 0)]
    for at, length in (*spans, *sorted(spans)):
        assert whole.read_at(at, length) == held[at : at + length]
    whole.check_rest()


def test_one_frame_is_taken_by_its_blocks_and_two_are_not() -> None:
    half = PACK["lz4"](WHOLE[: len(WHOLE) // 2])
    joined = half + PACK["lz4"](WHOLE[len(WHOLE) // 2 :]) + SAID
    for data, kind in ((PACKED, Blocks), (joined, Pieces)):
        whole = take(data)
        assert isinstance(whole, kind)
        assert whole.read_at(0, len(WHOLE)) == WHOLE


@pytest.mark.parametrize("number", range(4))
def test_a_damaged_block_is_noticed_though_nobody_reads_it(number: int) -> None:
    (at, size) = blocks(PACKED)[number]
    broken = PACKED[:at] + bytes([0xF0]) + b"\xff" * (size - 1) + PACKED[at + size :]
    with pytest.raises(Refused, match="lz4 packed in it is damaged"):
        take(broken).check_rest()


def test_a_block_that_stands_for_less_is_noticed() -> None:
    """Its size may be right by chance: the last block makes up for it."""
    short = PACK["lz4"](WHOLE[: LZ4_BLOCK_BYTES - 100])[4:]
    rest = PACK["lz4"](WHOLE[LZ4_BLOCK_BYTES:])[4:]
    data = PACKED[:4] + short + rest + SAID
    with pytest.raises(Refused, match="block 0"):
        take(data).check_rest()


def test_a_cut_frame_is_refused() -> None:
    with pytest.raises(Refused, match="too early"):
        take(PACKED[:-100])


def test_the_bound_holds_for_blocks_as_well() -> None:
    for limit in (len(WHOLE) - 1, LZ4_BLOCK_BYTES, 1):
        with pytest.raises(Refused, match=f"more than the {limit} bytes"):
            take(PACKED, limit=limit)
    assert isinstance(take(PACKED, limit=len(WHOLE)), Blocks)
