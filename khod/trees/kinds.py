"""What the bytes of a property mean, by the `compatible` of its node: the kernels' own producers, one small table.

Sources: include/linux/kho/abi/{kexec_handover,memblock,luo,memfd}.h and lib/test_kho.c of Linux 6.16 to 7.3, the v3
series of January 2024 for ftrace and `mem`. Numbers are native-endian. A version says nothing here: names have kept
their meaning from one to the next, and a value that has not the size its name promises is shown raw and marked.
"""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from khod.abi.fdt import KHO_MEM, Node
from khod.text import format_size
from khod.trees.text import counted, family, hexadecimal

MOST = 1 << 16
"""Bytes of strings, and pairs, that are taken apart: each of them becomes an object many times its size."""
KHO_VMALLOC = struct.Struct("=QIHH")  # struct kho_vmalloc: first, total_pages, flags, order
U32_PAIR = struct.Struct("=II")


@dataclass(frozen=True)
class Kind:
    """One meaning: `value` makes of the bytes what JSON holds (ValueError where they cannot), `text` words."""

    name: str
    value: Callable[[memoryview], Any]
    text: Callable[[Any], str]


@dataclass(frozen=True)
class Decoded:
    """A property's value: its kind, as JSON and in words; `wrong` says why it is not what its name promises."""

    kind: str
    value: Any
    text: str
    wrong: str = ""


def strings(raw: memoryview) -> list[str]:
    """Decode NUL-terminated strings; ValueError where one is empty, has no end or is not printable."""
    if len(raw) > MOST:
        raise ValueError(f"strings of at most {MOST} bytes")
    *parts, rest = bytes(raw).decode("latin-1").split("\0")
    if rest or not parts or not all(part.isascii() and part.isprintable() and part for part in parts):
        raise ValueError("strings, each with its NUL")
    return parts


def _number(layout: str) -> Callable[[memoryview], int]:
    unpack = struct.Struct(f"={layout}").unpack

    def number(raw: memoryview) -> int:
        try:
            (value,) = unpack(raw)
        except struct.error:
            raise ValueError(f"{struct.calcsize(f'={layout}')} bytes") from None
        return int(value)

    return number


def _pairs(raw: memoryview) -> list[dict[str, int]]:
    if len(raw) % U32_PAIR.size:
        raise ValueError(f"pairs of {U32_PAIR.size} bytes")
    if len(raw) > U32_PAIR.size * MOST:
        raise ValueError(f"at most {MOST} pairs")
    return [{"crc": crc, "type": kind} for crc, kind in U32_PAIR.iter_unpack(raw)]


def _pairs_text(found: list[dict[str, int]]) -> str:
    shown = ", ".join(f"{event['crc']:#010x}={event['type']}" for event in found[:4])
    return f"{counted(len(found), 'event')}, crc=type: {shown}{' ...' if len(found) > 4 else ''}"  # noqa: PLR2004 - a line's worth


def _mem(raw: memoryview) -> dict[str, int]:
    if len(raw) % KHO_MEM.size:
        raise ValueError(f"ranges of {KHO_MEM.size} bytes, and the kernel ignores all of it")
    return {"ranges": len(raw) // KHO_MEM.size, "bytes": sum(raw.cast("Q")[1::2])}


def _vmalloc(raw: memoryview) -> dict[str, int]:
    if len(raw) != KHO_VMALLOC.size:
        raise ValueError(f"struct kho_vmalloc, {KHO_VMALLOC.size} bytes")
    return dict(zip(("first", "total_pages", "flags", "order"), KHO_VMALLOC.unpack(raw), strict=True))


def _vmalloc_text(found: dict[str, int]) -> str:
    return f"{counted(found['total_pages'], 'page')} of order {found['order']}, listed from {found['first']:#x}"


U32 = Kind("u32", _number("I"), str)
U64 = Kind("u64", _number("Q"), str)
FLAGS = Kind("u32", _number("I"), "{:#x}".format)
ADDRESS = Kind("address", _number("Q"), "{:#x}".format)
SIZE = Kind("size", _number("Q"), lambda size: f"{size:#x} ({format_size(size)})")
STRINGS = Kind("strings", strings, lambda found: ", ".join(f'"{text}"' for text in found))
EVENTS = Kind("events", _pairs, _pairs_text)
MEM = Kind("mem", _mem, lambda found: f"{counted(found['ranges'], 'range')}, {format_size(found['bytes'])}")
VMALLOC = Kind("kho_vmalloc", _vmalloc, _vmalloc_text)

ANYWHERE: Mapping[str, Kind] = {"compatible": STRINGS, "mem": MEM}
FAMILIES: Mapping[str, Mapping[str, Kind]] = {
    "kho": {"preserved-memory-map": ADDRESS},
    "ftrace": {"events": EVENTS},
    "ftrace,array": {"trace-flags": FLAGS},
    "ftrace,cpu": {"cpu": U32},
    "reserve-mem": {"start": ADDRESS, "size": SIZE},
    "luo": {
        "liveupdate-number": U64,
        "luo-abi-header": ADDRESS,
        "liveupdate_num": U64,
        "sessions_pa": ADDRESS,
        "flbs_pa": ADDRESS,
    },
    "luo-session": {"luo-session-header": ADDRESS},
    "luo-flb": {"luo-flb-header": ADDRESS},
    "memfd": {"pos": U64, "size": SIZE, "nr_folios": U64, "folios": VMALLOC, "seals": FLAGS, "flags": FLAGS},
    "kho-test": {"magic": FLAGS},
    "kexec-metadata": {"version": U32, "previous_release": STRINGS, "kexec_count": U32},
}
"""The properties of a node, by its compatible without the version, or by its name where it has none."""
CHILDREN: Mapping[str, Mapping[str, Kind]] = {
    "kho": {"fdt": ADDRESS, "preserved-data": ADDRESS, "blob-size": SIZE},
    "kho-test": {"nr_folios": U32, "folios_info": VMALLOC, "csum": FLAGS},
}
"""The properties of a child that has no compatible, by its parent's."""


def promised(key: str, node: Node, parent: Node | None) -> Kind | None:
    """Give the kind a property's name and place promise; None where no kernel we know promises anything."""
    if key in ANYWHERE:
        return ANYWHERE[key]
    own = FAMILIES.get(family(node.compatible or node.name), {}).get(key)
    return own or (CHILDREN.get(family(parent.compatible), {}).get(key) if parent and not node.compatible else None)


def decoded(key: str, node: Node, parent: Node | None = None) -> Decoded:
    """Decode a property of `node` as promised, else by its looks: strings, a native u32 or u64, hex."""
    raw = node.properties[key]
    wrong = ""
    if kind := promised(key, node, parent):
        try:
            value = kind.value(raw)
            return Decoded(kind.name, value, kind.text(value))
        except ValueError as error:
            wrong = f"malformed: {error}"
        return Decoded("bytes", bytes(raw).hex(), f"{len(raw)} bytes: {hexadecimal(raw)}", wrong)
    return _looks(raw)


def _looks(raw: memoryview) -> Decoded:
    if not raw:
        return Decoded("empty", True, "")
    try:
        return Decoded("strings", (found := strings(raw)), STRINGS.text(found))
    except ValueError:
        pass
    for kind in (U32, U64):
        try:
            value = kind.value(raw)
        except ValueError:
            continue
        return Decoded(kind.name, value, f"{value:#x}")
    return Decoded("bytes", bytes(raw).hex(), hexadecimal(raw))
