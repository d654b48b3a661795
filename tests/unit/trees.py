# SPDX-License-Identifier: LGPL-2.1-or-later
"""State trees as the kernels' producers write them, from their sources: values by hand, written through libfdt."""

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import libfdt

U32, U64 = struct.Struct("=I").pack, struct.Struct("=Q").pack
PAGE, MIB = 4096, 1 << 20
Nodes = Mapping[str, Any]
"""A node: bytes are a property's, a mapping is a child."""


def fdt(root: Nodes) -> bytes:
    """Write a tree."""
    writer = libfdt.FdtSw(12 << 20)  # room for all at once: a growing tree is copied each time
    writer.finish_reservemap()
    _node(writer, "", root)
    made = writer.as_fdt()
    return bytes(made.as_bytearray()[: made.totalsize()])


def _node(writer: libfdt.FdtSw, name: str, node: Nodes) -> None:
    writer.begin_node(name)
    for key, value in node.items():
        if isinstance(value, bytes):
            writer.property(key, value)
    for key, value in node.items():
        if not isinstance(value, bytes):
            _node(writer, key, value)
    writer.end_node()


def compatible(name: str) -> dict[str, bytes]:
    return {"compatible": name.encode() + b"\0"}


def mem(*ranges: tuple[int, int]) -> bytes:
    """An array of struct kho_mem."""
    return b"".join(struct.pack("=QQ", *pair) for pair in ranges)


def ftrace(cpus: Sequence[bytes], *, events: bytes = struct.pack("=IIII", 0xBEEF, 7, 2, 8)) -> bytes:
    """v3's tree with a buffer's `mem` for each CPU."""
    array: dict[str, Any] = compatible("ftrace,array-v1") | {"trace-flags": U32(0x40401)}
    for number, ranges in enumerate(cpus):
        array[f"cpu{number:x}"] = compatible("ftrace,cpu-v1") | {"cpu": U32(number), "mem": ranges}
    producer: dict[str, Any] = compatible("ftrace-v1") | {"events": events, "global-trace": array}
    return fdt(compatible("kho-v1") | {"ftrace": producer})


def kho_v1(**producers: int) -> bytes:
    """The root of 6.16 to 7.0: each producer's FDT by its address."""
    children = {name: {"fdt": U64(at)} for name, at in producers.items()}
    return fdt(compatible("kho-v1") | {"preserved-memory-map": U64(0x105F000)} | children)


def kho_v4(**producers: tuple[int, int]) -> bytes:
    """The root of 7.3: each producer's blob by address and size."""
    children = {name: {"preserved-data": U64(at), "blob-size": U64(size)} for name, (at, size) in producers.items()}
    return fdt(compatible("kho-v4") | {"preserved-memory-map": U64(0x105F000)} | children)


def memblock(**regions: tuple[int, int]) -> bytes:
    """The tree of reserve_mem=."""
    nodes = {name: compatible("reserve-mem-v1") | {"start": U64(a), "size": U64(s)} for name, (a, s) in regions.items()}
    return fdt(compatible("memblock-v1") | nodes)


def memfd(version: int = 2, **other: bytes) -> bytes:
    """A memfd of 64 KiB in 16 pages, from include/linux/kho/abi/memfd.h."""
    seals = {"seals": U32(0x1), "flags": U32(0)} if version > 1 else {}
    members = {"pos": U64(0), "size": U64(0x10000), "nr_folios": U64(16)}
    folios = {"folios": struct.pack("=QIHH", 0x7F000, 1, 0, 0)}
    return fdt(compatible(f"memfd-v{version}") | members | seals | folios | other)


KEXEC_METADATA = struct.pack("=I65sI", 1, b"7.3.4-kho", 2)
LUO_V5 = struct.pack("=8sQQQ", b"luo-v5", 3, 0x1040000, 0)
LUO_V1 = fdt(
    compatible("luo-v1")
    | {"liveupdate-number": U64(1)}
    | {"luo-session": compatible("luo-session-v2") | {"luo-session-header": U64(0x1041000)}}
    | {"luo-flb": compatible("luo-flb-v1") | {"luo-flb-header": U64(0x1042000)}}
)
KHO_TEST = fdt(
    compatible("kho-test-v1")
    | {"magic": U32(0x4B484F21)}
    | {"data": {"nr_folios": U32(512), "folios_info": struct.pack("=QIHH", 0x80000, 1, 0, 0), "csum": U32(0xCAFE)}}
)
