# SPDX-License-Identifier: LGPL-2.1-or-later
"""Trees as libfdt's sequential writer makes them, which is what the kernel's producers use; from a seed."""

import random
import string
import struct

import libfdt

NODE = string.ascii_letters + string.digits + ",._+-"
PROPERTY = NODE + "#?*"
TEXT = "".join(map(chr, range(0x20, 0x7F)))
KNOWN = ["compatible", "mem", "start", "size", "events", "cpu", "reg", "fdt", "preserved-data", "name", "phandle"]
COMPATIBLE = ["kho-v1", "kho-v4", "ftrace-v1", "ftrace,cpu-v1", "memblock-v1", "reserve-mem-v1", "luo-v1", "memfd-v2"]


def tree(seed: int) -> bytes:
    """One tree; the same for the same seed."""
    chance = random.Random(seed)
    writer = libfdt.FdtSw(1 << 18)  # room for all at once: a growing tree is copied each time
    for _ in range(chance.choice([0, 0, 0, 1, 3])):
        writer.add_reservemap_entry(chance.randrange(1 << 64), chance.randrange(1, 1 << 63))
    writer.finish_reservemap()
    _node(writer, "", chance, chance.choice([0, 1, 2, 3, 3, 5, 9]))
    made = writer.as_fdt()
    whole = bytearray(made.as_bytearray()[: made.totalsize()])
    if chance.random() < 0.05:
        struct.pack_into(">I", whole, 28, chance.randrange(1 << 31))  # boot_cpuid_phys
    return bytes(whole)


def _node(writer: libfdt.FdtSw, name: str, chance: random.Random, depth: int) -> None:
    writer.begin_node(name)
    for key in _names(chance, PROPERTY, chance.choice([0, 1, 2, 4, 8])):
        writer.property(key, _value(chance, key))
    if depth:
        for child in _names(chance, NODE, chance.choice([0, 1, 1, 2, 3])):
            _node(writer, child, chance, depth - 1)
    writer.end_node()


def _names(chance: random.Random, characters: str, count: int) -> list[str]:
    """Names that differ, and not only in a unit address: libfdt finds the first of those by either name."""
    found: dict[str, str] = {}
    for _ in range(count):
        if characters is PROPERTY and chance.random() < 0.5:
            name = chance.choice(KNOWN)
        else:
            name = "".join(chance.choices(characters, k=chance.choice([1, 3, 8, 31, 60])))
        unit = f"@{chance.randrange(1 << 32):x}" if characters is NODE and chance.random() < 0.2 else ""
        found.setdefault(name, name + unit)
    return list(found.values())


def _value(chance: random.Random, key: str) -> bytes:
    if key == "compatible":
        return chance.choice(COMPATIBLE).encode() + b"\0"
    kind = chance.randrange(8)
    if kind == 0:
        return b""
    if kind == 1:
        return b"".join(_text(chance) + b"\0" for _ in range(chance.choice([1, 1, 2, 5])))
    if kind == 2:
        return _text(chance)  # without its NUL
    if kind == 3:
        return struct.pack("=I", chance.randrange(1 << 32))
    if kind == 4:
        return struct.pack("=Q", chance.randrange(1 << 64))
    if kind == 5:
        return bytes(chance.choice([1, 2, 3, 5, 7, 16]))
    if kind == 6:
        return chance.randbytes(16 * chance.randrange(20))
    return chance.randbytes(chance.choice([1, 6, 17, 200, 5000]))


def _text(chance: random.Random) -> bytes:
    return "".join(chance.choices(TEXT, k=chance.choice([0, 1, 5, 40]))).encode()
