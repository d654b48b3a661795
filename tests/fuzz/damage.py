# SPDX-License-Identifier: LGPL-2.1-or-later
"""Damage done to bytes, which only chance decides: the same for the same chance."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

Order = Literal["little", "big"]
LARGEST = 1 << 17
"""Bytes of a case: what takes more is a test of its own, with a name."""
EDGES = (0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 63, 64, 127, 128, 255, 256, 4095, 4096, 0x7FFF, 0x8000, 0xFFFF)
WIDE = tuple((1 << bit) + more for bit in (16, 24, 31, 32, 63, 64) for more in (-16, -4, -1, 0, 1))
BYTES = (0, 1, 0x0A, 0x20, 0x2F, 0x30, 0x7F, 0x80, 0xC3, 0xFF)
HEADERS = 640
"""Bytes at a file's beginning in which half of the damage is done: most headers are over there."""


@dataclass(frozen=True)
class Field:
    """A number in a file: its offset, its length in bytes, its byte order; `digits` where it is written as such."""

    at: int
    size: int
    order: Order
    digits: bool = False


def damaged(data: bytes, fields: Sequence[Field], other: bytes, chance: Random) -> bytes:
    """Do one to five things to `data`, many of them to a field; `other` is a file that parts are taken from."""
    doing = _Damage(bytearray(data), other, chance)
    for _ in range(chance.choice((1, 1, 1, 2, 2, 3, 5))):
        if fields and chance.random() < 0.4:
            doing.number(chance.choice(fields))
        else:
            chance.choice(doing.ways)()
    return bytes(doing.made[:LARGEST])


def edge(size: int, length: int, chance: Random) -> int:
    """A number of `size` bytes that is the last of its kind, or the first of another; `length` is the file's."""
    near = (length - 1, length, length + 1, length // 2)
    return chance.choice((*EDGES, *WIDE, *near, chance.getrandbits(8 * size))) % (1 << 8 * size)


class _Damage:
    def __init__(self, made: bytearray, other: bytes, chance: Random) -> None:
        self.made, self.other, self.chance = made, other, chance
        self.ways = (
            *(self.flip, self.flip, self.byte, self.byte, self.anywhere, self.anywhere, self.same, self.again),
            *(self.cut, self.longer, self.gone, self.swapped, self.spliced, self.replaced),
        )

    def number(self, field: Field) -> None:
        """Change a number to one from the edges, or by one, or in one bit."""
        place = slice(field.at, field.at + field.size)
        if field.at + field.size > len(self.made):
            return
        if field.digits:
            self.made[place] = b"%0*X" % (field.size, edge(field.size // 2, len(self.made), self.chance))
            return
        old, bit = int.from_bytes(self.made[place], field.order), 1 << self.chance.randrange(8 * field.size)
        new = self.chance.choice((edge(field.size, len(self.made), self.chance), old + 1, old - 1, old ^ bit))
        self.made[place] = (new % (1 << 8 * field.size)).to_bytes(field.size, field.order)

    def anywhere(self) -> None:
        self.number(Field(self._at(), self.chance.choice((2, 4, 8)), self.chance.choice(("little", "big"))))

    def flip(self) -> None:
        if self.made:
            self.made[self._at()] ^= 1 << self.chance.randrange(8)

    def byte(self) -> None:
        if self.made:
            self.made[self._at()] = self.chance.choice(BYTES)

    def same(self) -> None:
        part = self._part()
        self.made[part] = self.chance.choice((b"\0", b"\xff")) * len(self.made[part])

    def cut(self) -> None:
        del self.made[self.chance.randrange(len(self.made) + 1) :]

    def longer(self) -> None:
        self.made += self.chance.choice(
            (bytes(self._length()), self.chance.randbytes(self._length()), bytes(self.made))
        )

    def again(self) -> None:
        part = self._part()
        self.made[part.start : part.start] = self.made[part] * self.chance.choice((1, 1, 1, 2, 70))

    def gone(self) -> None:
        del self.made[self._part()]

    def swapped(self) -> None:
        one, two = self._part(), self._part()
        first, second = self.made[one], self.made[two]
        if len(first) == len(second):
            self.made[one], self.made[two] = second, first

    def spliced(self) -> None:
        self.made[self._at() :] = self.other[self.chance.randrange(len(self.other) + 1) :]

    def replaced(self) -> None:
        part, there = self._part(), self.chance.randrange(len(self.other) + 1)
        self.made[part] = self.other[there : there + part.stop - part.start]

    def _at(self) -> int:
        """An offset, half of them aligned as numbers are."""
        if not self.made:
            return 0
        at = self.chance.randrange(min(len(self.made), self.chance.choice((HEADERS, LARGEST))))
        return at & ~3 if self.chance.random() < 0.5 else at

    def _length(self) -> int:
        return self.chance.choice((1, 2, 4, 4, 8, 8, 12, 16, 40, 64, 512))

    def _part(self) -> slice:
        at = self._at()
        return slice(at, at + self._length())
