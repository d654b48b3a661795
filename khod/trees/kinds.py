# SPDX-License-Identifier: LGPL-2.1-or-later
"""Decode the bytes of a property by the `compatible` of its node: one small table for the kernels' own producers.

The sources are include/linux/kho/abi/{kexec_handover,memblock,luo,memfd}.h and lib/test_kho.c of Linux 6.16 to 7.3, and
the v3 series of January 2024 for ftrace and `mem`. Numbers are native-endian. Versions do not matter here: names have
kept their meaning, and a value whose size does not match its name is shown raw and marked.
"""

import struct
from collections.abc import Callable, Mapping
from typing import Any

from khod.abi.fdt import KHO_MEM, Node
from khod.dataclass import dataclass
from khod.text import format_size
from khod.trees.text import format_count, format_family, format_hex

MAX_VALUES = 1 << 16
"""The number of bytes of strings, or of pairs, that are decoded: each becomes an object many times its size."""
KHO_VMALLOC = struct.Struct("=QIHH")  # struct kho_vmalloc: first, total_pages, flags, order
U32_PAIR = struct.Struct("=II")


@dataclass(frozen=True)
class PropertyKind:
    """One kind of property: `value` decodes the bytes for JSON (or raises ValueError), `text` formats it for people."""

    name: str
    value: Callable[[memoryview], Any]
    text: Callable[[Any], str]


@dataclass(frozen=True)
class Decoded:
    """A property's value: its kind, for JSON and in words; `wrong` says why it does not match its name."""

    kind: str
    value: Any
    text: str
    wrong: str = ""


def decode_strings(raw: memoryview) -> list[str]:
    """Decode NUL-terminated strings; ValueError if one is empty, has no end or is not printable."""
    if len(raw) > MAX_VALUES:
        raise ValueError(f"strings of at most {MAX_VALUES} bytes")
    *parts, rest = bytes(raw).decode("latin-1").split("\0")
    if rest or not parts or not all(part.isascii() and part.isprintable() and part for part in parts):
        raise ValueError("strings, each with its NUL")
    return parts


def _number_decoder(layout: str) -> Callable[[memoryview], int]:
    unpack = struct.Struct(f"={layout}").unpack

    def number(raw: memoryview) -> int:
        try:
            (value,) = unpack(raw)
        except struct.error:
            raise ValueError(f"{struct.calcsize(f'={layout}')} bytes") from None
        return int(value)

    return number


def _decode_pairs(raw: memoryview) -> list[dict[str, int]]:
    if len(raw) % U32_PAIR.size:
        raise ValueError(f"pairs of {U32_PAIR.size} bytes")
    if len(raw) > U32_PAIR.size * MAX_VALUES:
        raise ValueError(f"at most {MAX_VALUES} pairs")
    return [{"crc": crc, "type": kind} for crc, kind in U32_PAIR.iter_unpack(raw)]


def _pairs_text(found: list[dict[str, int]]) -> str:
    shown = ", ".join(f"{event['crc']:#010x}={event['type']}" for event in found[:4])
    return f"{format_count(len(found), 'event')}, crc=type: {shown}{' ...' if len(found) > 4 else ''}"  # noqa: PLR2004 - a line's worth


def _decode_mem(raw: memoryview) -> dict[str, int]:
    if len(raw) % KHO_MEM.size:
        raise ValueError(f"ranges of {KHO_MEM.size} bytes, and the kernel ignores all of it")
    return {"ranges": len(raw) // KHO_MEM.size, "bytes": sum(raw.cast("Q")[1::2])}


def _decode_vmalloc(raw: memoryview) -> dict[str, int]:
    if len(raw) != KHO_VMALLOC.size:
        raise ValueError(f"struct kho_vmalloc, {KHO_VMALLOC.size} bytes")
    return dict(zip(("first", "total_pages", "flags", "order"), KHO_VMALLOC.unpack(raw), strict=True))


def _vmalloc_text(found: dict[str, int]) -> str:
    return f"{format_count(found['total_pages'], 'page')} of order {found['order']}, listed from {found['first']:#x}"


U32 = PropertyKind("u32", _number_decoder("I"), str)
U64 = PropertyKind("u64", _number_decoder("Q"), str)
FLAGS = PropertyKind("u32", _number_decoder("I"), "{:#x}".format)
ADDRESS = PropertyKind("address", _number_decoder("Q"), "{:#x}".format)
SIZE = PropertyKind("size", _number_decoder("Q"), lambda size: f"{size:#x} ({format_size(size)})")
STRINGS = PropertyKind("strings", decode_strings, lambda found: ", ".join(f'"{text}"' for text in found))
EVENTS = PropertyKind("events", _decode_pairs, _pairs_text)
MEM = PropertyKind(
    "mem", _decode_mem, lambda found: f"{format_count(found['ranges'], 'range')}, {format_size(found['bytes'])}"
)
VMALLOC = PropertyKind("kho_vmalloc", _decode_vmalloc, _vmalloc_text)

ANYWHERE: Mapping[str, PropertyKind] = {"compatible": STRINGS, "mem": MEM}
FAMILIES: Mapping[str, Mapping[str, PropertyKind]] = {
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
"""The properties of a node, by its compatible without the version, or by its name if it has none."""
CHILDREN: Mapping[str, Mapping[str, PropertyKind]] = {
    "kho": {"fdt": ADDRESS, "preserved-data": ADDRESS, "blob-size": SIZE},
    "kho-test": {"nr_folios": U32, "folios_info": VMALLOC, "csum": FLAGS},
}
"""The properties of a child without a compatible, by its parent's compatible."""


def promised_kind(key: str, node: Node, parent: Node | None) -> PropertyKind | None:
    """Return the kind that a property's name and place define; None if no known kernel defines one."""
    if key in ANYWHERE:
        return ANYWHERE[key]
    own = FAMILIES.get(format_family(node.compatible or node.name), {}).get(key)
    return own or (
        CHILDREN.get(format_family(parent.compatible), {}).get(key) if parent and not node.compatible else None
    )


def decode_property(key: str, node: Node, parent: Node | None = None) -> Decoded:
    """Decode a property of `node` by its kind, else by its content: strings, a native u32 or u64, hex."""
    raw = node.properties[key]
    wrong = ""
    if kind := promised_kind(key, node, parent):
        try:
            value = kind.value(raw)
            return Decoded(kind.name, value, kind.text(value))
        except ValueError as error:
            wrong = f"malformed: {error}"
        return Decoded("bytes", bytes(raw).hex(), f"{len(raw)} bytes: {format_hex(raw)}", wrong)
    return _decode_by_looks(raw)


def _decode_by_looks(raw: memoryview) -> Decoded:
    if not raw:
        return Decoded("empty", True, "")
    try:
        return Decoded("strings", (found := decode_strings(raw)), STRINGS.text(found))
    except ValueError:
        pass
    for kind in (U32, U64):
        try:
            value = kind.value(raw)
        except ValueError:
            continue
        return Decoded(kind.name, value, f"{value:#x}")
    return Decoded("bytes", bytes(raw).hex(), format_hex(raw))
