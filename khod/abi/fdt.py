"""Flattened device trees as KHO writes them, read through libfdt.

Header, tokens and lengths are big-endian as in any FDT. KHO's own numbers inside properties are
native-endian: `mem` is an array of struct kho_mem { u64 addr; u64 len; }.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

import libfdt

from khod.errors import MalformedTree
from khod.model import Region

KHO_MEM = struct.Struct("=QQ")  # struct kho_mem of the v3 series
HEADER = struct.Struct(">II")  # magic, totalsize
MAGIC = 0xD00DFEED  # libfdt.FDT_MAGIC is the same number, signed
MAX_DEPTH = 64  # the kernel's own unflattening stops here (FDT_MAX_DEPTH in drivers/of/fdt.c)


@dataclass(frozen=True)
class Node:
    """One node: its properties' raw bytes by name, its children in order."""

    name: str
    properties: dict[str, bytes] = field(default_factory=dict)
    children: "tuple[Node, ...]" = ()

    @property
    def compatible(self) -> str:
        """The first compatible string, "" where there is none."""
        return self.properties.get("compatible", b"").split(b"\0")[0].decode(errors="replace")

    def walk(self, path: str = "") -> "Iterator[tuple[str, Node]]":
        """Yield (path, node) depth first, the root as "/"."""
        yield path or "/", self
        for child in self.children:
            yield from child.walk(f"{path}/{child.name}")


def check(blob: bytes, where: str = "") -> bytearray:
    """Hold a blob against the format; MalformedTree with `where`, else the blob as libfdt takes it.

    The size is held against the header first: libfdt trusts totalsize, and a header that promises
    more than there is would have it read past the buffer.
    """
    if len(blob) < HEADER.size or HEADER.unpack_from(blob)[0] != MAGIC:
        raise MalformedTree("This is no flattened device tree: its magic number is missing", where=where)
    if (total := HEADER.unpack_from(blob)[1]) > len(blob):
        raise MalformedTree(f"The tree is cut off: {len(blob)} of {total} bytes are there", where=where)
    buffer = bytearray(blob)  # the only buffer type pylibfdt's raw calls take
    if (status := libfdt.fdt_check_full(buffer, len(buffer))) != 0:
        raise MalformedTree(f"The tree is damaged: libfdt says {libfdt.strerror(status)}", where=where)
    return buffer


def parse(blob: bytes, where: str = "") -> Node:
    """Read a whole tree; raises MalformedTree, whose `where` is the given one."""
    return _node(libfdt.FdtRo(check(blob, where)), 0, 0, where)


def _node(fdt: libfdt.FdtRo, offset: int, depth: int, where: str) -> Node:
    if depth > MAX_DEPTH:
        raise MalformedTree(f"The tree is deeper than {MAX_DEPTH} levels", where=where)
    quiet = (libfdt.NOTFOUND,)
    try:
        properties = {}
        at = fdt.first_property_offset(offset, quiet)
        while at >= 0:
            prop = fdt.get_property_by_offset(at)
            properties[prop.name] = bytes(prop)
            at = fdt.next_property_offset(at, quiet)
        children = []
        at = fdt.first_subnode(offset, quiet)
        while at >= 0:
            children.append(_node(fdt, at, depth + 1, where))
            at = fdt.next_subnode(at, quiet)
        return Node(fdt.get_name(offset), properties, tuple(children))
    except (libfdt.FdtException, UnicodeDecodeError, SystemError) as error:  # SystemError: a name that is no ASCII
        raise MalformedTree(f"The tree is damaged: libfdt says {error}", where=where) from None


def mem(node: Node) -> list[Region]:
    """Decode the v3 `mem` property; MalformedTree where its length is no multiple of 16.

    The kernel ignores such a property without a word, so the state in it would be lost.
    """
    raw = node.properties.get("mem", b"")
    if len(raw) % KHO_MEM.size:
        raise MalformedTree(
            f"The property `mem` is {len(raw)} bytes long, no multiple of {KHO_MEM.size}", where=node.name
        )
    return [Region(addr, size) for addr, size in KHO_MEM.iter_unpack(raw)]
