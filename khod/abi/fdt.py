# SPDX-License-Identifier: LGPL-2.1-or-later
"""Flattened device trees as KHO writes them: chapter 5 of the devicetree specification, read strictly.

The reader does not use pylibfdt, which the tests compare it with. pylibfdt copies each value (10 MiB in a v3 tree),
raises SystemError for a name that is not ASCII, and accepts a property that is there twice.

Header, tokens and lengths are big-endian as in any FDT. KHO's own numbers inside properties are native-endian: `mem` is
an array of struct kho_mem { u64 addr; u64 len; }.
"""

import struct
from collections.abc import Iterator
from dataclasses import field

from khod.dataclass import dataclass
from khod.errors import MalformedTree
from khod.region import Region

KHO_MEM = struct.Struct("=QQ")  # struct kho_mem of the v3 series
HEADER = struct.Struct(">10I")  # struct fdt_header
RESERVATION = struct.Struct(">QQ")  # struct fdt_reserve_entry
PROP = struct.Struct(">II")  # struct fdt_property after its token: len, nameoff
U32 = struct.Struct(">I")
MAGIC = 0xD00DFEED  # libfdt.FDT_MAGIC is the same number, signed
FDT_BEGIN_NODE, FDT_END_NODE, FDT_PROP, FDT_NOP, FDT_END = 1, 2, 3, 4, 9
VERSIONS = (16, 17)
"""The versions that are read: libfdt in the kernel writes 17 (readable as 16); older ones predate kexec handover."""
V16_SIZE = 36
"""The size of a version 16 header in bytes; it ends before size_dt_struct."""
MAX_DEPTH = 64  # the kernel's own unflattening stops here (FDT_MAX_DEPTH in drivers/of/fdt.c)
MAX_ITEMS = 200_000
"""The number of nodes and properties in a tree, which bounds the memory for reading; v3 has four for each CPU."""
MAX_PATHS = 64 << 20
"""Bytes of names, and of the paths of all nodes and properties; each path repeats every name above it."""
MAX_NAME = 1024
"""Bytes of a name: the specification allows 31, but reserve_mem= takes any that fits on the command line."""


@dataclass(frozen=True)
class Node:
    """One node: its properties' raw bytes by name (views of the tree's own), and its children in order.

    Bytes of a name that are not UTF-8 become surrogates, as in a file name.
    """

    name: str
    properties: dict[str, memoryview] = field(default_factory=dict)
    children: "tuple[Node, ...]" = ()

    @property
    def compatible(self) -> str:
        """The first compatible string, "" if there is none."""
        return bytes(self.properties.get("compatible", b"")[:MAX_NAME]).split(b"\0")[0].decode(errors="replace")

    def walk(self, path: str = "") -> "Iterator[tuple[str, Node]]":
        """Yield (path, node) depth first, the root as "/"."""
        yield path or "/", self
        for child in self.children:
            yield from child.walk(f"{path}/{child.name}")


@dataclass(frozen=True)
class Fdt:
    """A whole blob: the root, and the header's and the memory reservation block's values that are not layout."""

    root: Node
    reservations: tuple[Region, ...]
    boot_cpuid_phys: int
    version: int
    totalsize: int


def missing_size(blob: bytes) -> int:
    """Return the size that the header gives if the blob has fewer bytes, else 0."""
    if len(blob) < 2 * U32.size:
        return 0
    magic, total = PROP.unpack_from(blob)
    return total if magic == MAGIC and total > len(blob) else 0


def check_fdt(blob: bytes, where: str = "") -> None:
    """Check the format of a blob; raise MalformedTree with `where`."""
    read_fdt(blob, where)


def parse_tree(blob: bytes, where: str = "") -> Node:
    """Read a whole tree and return its root; raise MalformedTree with `where`."""
    return read_fdt(blob, where).root


def read_fdt(blob: bytes, where: str = "") -> Fdt:
    """Read a blob with its header and reservations; raise MalformedTree with `where`.

    Some faults that libfdt silently accepts are refused: a property or a child of the same name twice, a property after
    a child, anything after the root. Bytes after the header's totalsize are ignored.
    """
    return _Reader(blob, where).read_fdt()


class _Reader:
    """Reads one blob; every offset is checked against its block before it is used."""

    def __init__(self, blob: bytes, where: str) -> None:
        self.where = where
        if len(blob) < U32.size or U32.unpack_from(blob)[0] != MAGIC:
            raise self.malformed("This is not a flattened device tree: its magic number is missing")
        if (total := missing_size(blob)) or len(blob) < V16_SIZE:
            raise self.malformed(f"The tree is cut off: {len(blob)} of {max(total, V16_SIZE)} bytes are there")
        _magic, self.total, struct_at, strings_at, self.reserve_at, self.version, last, self.boot_cpu = (
            HEADER.unpack_from(blob.ljust(HEADER.size, b"\0") if len(blob) < HEADER.size else blob)[:8]
        )
        if self.version < VERSIONS[0] or last > VERSIONS[-1] or last > self.version:
            raise self.malformed(f"The tree has version {self.version} (readable as {last}), not {VERSIONS[-1]}")
        size = HEADER.size if self.version >= VERSIONS[-1] else V16_SIZE
        if not size <= self.total:
            raise self.malformed(f"The tree is damaged: it ends within its header, at {self.total}")
        strings = U32.unpack_from(blob, 32)[0]
        length = U32.unpack_from(blob, V16_SIZE)[0] if size == HEADER.size else self.total - struct_at
        for at, bytes_, block in ((struct_at, length, "structure"), (strings_at, strings, "strings")):
            if not size <= at <= at + bytes_ <= self.total:
                raise self.malformed(f"The tree is damaged: its {block} block lies outside of it")
        self.blob, self.view = blob, memoryview(blob)
        self.at, self.end = struct_at, struct_at + length
        self.strings_at, self.strings_end = strings_at, strings_at + strings
        self.header_size = size
        self.names: dict[int, str] = {}
        self.items = self.path = self.paths = 0

    def malformed(self, what: str) -> MalformedTree:
        return MalformedTree(what, where=self.where)

    def read_fdt(self) -> Fdt:
        reservations = tuple(self.read_reservations())
        if self.read_token() != FDT_BEGIN_NODE:
            raise self.malformed("The tree is damaged: it does not begin with a node")
        root = self.read_tree()
        if root.name:
            raise self.malformed(f"The tree is damaged: its root has a name, {root.name!r}")
        if self.read_token() != FDT_END:
            raise self.malformed("The tree is damaged: something stands behind its root")
        return Fdt(root, reservations, self.boot_cpu, self.version, self.total)

    def read_reservations(self) -> Iterator[Region]:
        at = self.reserve_at
        while True:
            if not self.header_size <= at <= self.total - RESERVATION.size:
                raise self.malformed("The tree is damaged: its memory reservation block does not end within it")
            addr, size = RESERVATION.unpack_from(self.blob, at)
            if not size:  # libfdt and dtc do not require that the address is 0, too
                return
            self.count_node()
            yield Region(addr, size)
            at += RESERVATION.size

    def read_tree(self) -> Node:
        """Read a node after its token, with everything below it, in a loop with its own stack."""
        open_nodes: list[tuple[str, dict[str, memoryview], dict[str, Node]]] = []
        open_nodes.append((self.node_name(), {}, {}))
        while True:
            token = self.read_token()
            name, properties, children = open_nodes[-1]
            if token == FDT_PROP:
                key, value = self.read_property()
                if children or key in properties:
                    why = "stands behind a child of its node" if children else "is there twice"
                    raise self.malformed(f"The tree is damaged: the property {key!r} {why}")
                properties[key] = value
            elif token == FDT_BEGIN_NODE:
                if len(open_nodes) > MAX_DEPTH:
                    raise self.malformed(f"The tree is deeper than {MAX_DEPTH} levels")
                open_nodes.append((self.node_name(), {}, {}))
            elif token == FDT_END_NODE:
                open_nodes.pop()
                self.path -= len(name) + 1
                made = Node(name, properties, tuple(children.values()))
                if not open_nodes:
                    return made
                if name in open_nodes[-1][2]:
                    raise self.malformed(f"The tree is damaged: the node {name!r} is there twice")
                open_nodes[-1][2][name] = made
            else:
                raise self.malformed(f"The tree is damaged: token {token:#x} within a node")

    def read_token(self) -> int:
        token = FDT_NOP
        while token == FDT_NOP:
            if self.at + U32.size > self.end:
                raise self.malformed("The tree is damaged: its structure block has no end")
            (token,) = U32.unpack_from(self.blob, self.at)
            self.at += U32.size
        return token

    def read_property(self) -> tuple[str, memoryview]:
        self.count_node()
        if self.at + PROP.size > self.end:
            raise self.malformed("The tree is damaged: a property is cut off")
        length, nameoff = PROP.unpack_from(self.blob, self.at)
        value = self.at + PROP.size
        if value + length > self.end:
            raise self.malformed("The tree is damaged: a property is longer than the tree")
        self.at = value + (length + 3 & ~3)
        if nameoff not in self.names:
            self.names[nameoff] = self.string_at(self.strings_at + nameoff, self.strings_end)
            self.paths += len(self.names[nameoff])
        return self.names[nameoff], self.view[value : value + length]

    def node_name(self) -> str:
        name = self.string_at(self.at, self.end)
        self.path += len(name) + 1
        self.count_node()
        self.at += len(name.encode(errors="surrogateescape")) + 4 & ~3
        return name

    def string_at(self, at: int, end: int) -> str:
        if (stop := self.blob.find(b"\0", at, min(end, at + MAX_NAME + 1))) < 0:
            raise self.malformed("The tree is damaged: a name has no end")
        return self.blob[at:stop].decode(errors="surrogateescape")

    def count_node(self) -> None:
        self.items += 1
        self.paths += self.path
        if self.items > MAX_ITEMS:
            raise self.malformed(f"The tree has more than {MAX_ITEMS} nodes and properties")
        if self.paths > MAX_PATHS:
            raise self.malformed(f"The names and paths of the tree have more than {MAX_PATHS >> 20} MiB")


def decode_mem(node: Node) -> list[Region]:
    """Decode the v3 `mem` property; raise MalformedTree if its length is not a multiple of 16.

    The kernel silently ignores such a property, so the state in it would be lost.
    """
    raw = node.properties.get("mem", b"")
    if len(raw) % KHO_MEM.size:
        raise MalformedTree(
            f"The property `mem` is {len(raw)} bytes long, no multiple of {KHO_MEM.size}", where=node.name
        )
    return [Region(addr, size) for addr, size in KHO_MEM.iter_unpack(raw)]
