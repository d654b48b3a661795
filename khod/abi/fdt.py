# SPDX-License-Identifier: LGPL-2.1-or-later
"""Flattened device trees as KHO writes them: the devicetree specification's chapter 5, read strictly.

Not by pylibfdt (which tests hold this against): it copies each value, 10 MiB of them in a v3 tree, takes a name that is
no ASCII for an error of its own (SystemError), and reads past a property that is there twice.

Header, tokens and lengths are big-endian as in any FDT. KHO's own numbers inside properties are
native-endian: `mem` is an array of struct kho_mem { u64 addr; u64 len; }.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from khod.errors import MalformedTree
from khod.region import Region

KHO_MEM = struct.Struct("=QQ")  # struct kho_mem of the v3 series
HEADER = struct.Struct(">10I")  # struct fdt_header
RESERVATION = struct.Struct(">QQ")  # struct fdt_reserve_entry
PROP = struct.Struct(">II")  # struct fdt_property behind its token: len, nameoff
U32 = struct.Struct(">I")
MAGIC = 0xD00DFEED  # libfdt.FDT_MAGIC is the same number, signed
FDT_BEGIN_NODE, FDT_END_NODE, FDT_PROP, FDT_NOP, FDT_END = 1, 2, 3, 4, 9
VERSIONS = (16, 17)
"""The versions read: libfdt in the kernel writes 17 (readable as 16), older ones were gone before kexec handed over."""
V16_SIZE = 36
"""Bytes of a version 16 header, which ends before size_dt_struct."""
MAX_DEPTH = 64  # the kernel's own unflattening stops here (FDT_MAX_DEPTH in drivers/of/fdt.c)
MAX_ITEMS = 200_000
"""Nodes and properties of a tree together: what bounds the memory that reading takes. v3's has four for each CPU."""
MAX_PATHS = 64 << 20
"""Bytes of names, and of the paths of all nodes and properties: each path has every name above it in it once more."""
MAX_NAME = 1024
"""Bytes of a name. The specification knows 31; reserve_mem= takes what the command line holds."""


@dataclass(frozen=True)
class Node:
    """One node: its properties' raw bytes by name (views of the tree's own), its children in order.

    A name's bytes that are no UTF-8 stand as surrogates, as in a file name.
    """

    name: str
    properties: dict[str, memoryview] = field(default_factory=dict)
    children: "tuple[Node, ...]" = ()

    @property
    def compatible(self) -> str:
        """The first compatible string, "" where there is none."""
        return bytes(self.properties.get("compatible", b"")[:MAX_NAME]).split(b"\0")[0].decode(errors="replace")

    def walk(self, path: str = "") -> "Iterator[tuple[str, Node]]":
        """Yield (path, node) depth first, the root as "/"."""
        yield path or "/", self
        for child in self.children:
            yield from child.walk(f"{path}/{child.name}")


@dataclass(frozen=True)
class Fdt:
    """A whole blob: the root, and what of the header and the memory reservation block is no layout."""

    root: Node
    reservations: tuple[Region, ...]
    boot_cpuid_phys: int
    version: int
    totalsize: int


def missing_size(blob: bytes) -> int:
    """Give the size the header promises where there are fewer bytes, else 0."""
    if len(blob) < 2 * U32.size:
        return 0
    magic, total = PROP.unpack_from(blob)
    return total if magic == MAGIC and total > len(blob) else 0


def check_fdt(blob: bytes, where: str = "") -> None:
    """Hold a blob against the format; MalformedTree with `where`."""
    read_fdt(blob, where)


def parse_tree(blob: bytes, where: str = "") -> Node:
    """Read a whole tree; raises MalformedTree, whose `where` is the given one."""
    return read_fdt(blob, where).root


def read_fdt(blob: bytes, where: str = "") -> Fdt:
    """Read a blob with its header and reservations; raises MalformedTree, whose `where` is the given one.

    What libfdt reads past without a word is refused: a property or a child of the same name twice, a property
    behind a child, anything behind the root. Bytes behind the header's totalsize do not count.
    """
    return _Reader(blob, where).read_fdt()


class _Reader:
    """The walk over one blob: every offset is held against the block it must lie in before it is used."""

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
            if not size:  # libfdt and dtc do not ask whether the address is 0, too
                return
            self.count_node()
            yield Region(addr, size)
            at += RESERVATION.size

    def read_tree(self) -> Node:
        """Read a node behind its token, with all below it: a loop with its own stack."""
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
    """Decode the v3 `mem` property; MalformedTree where its length is no multiple of 16.

    The kernel ignores such a property without a word, so the state in it would be lost.
    """
    raw = node.properties.get("mem", b"")
    if len(raw) % KHO_MEM.size:
        raise MalformedTree(
            f"The property `mem` is {len(raw)} bytes long, no multiple of {KHO_MEM.size}", where=node.name
        )
    return [Region(addr, size) for addr, size in KHO_MEM.iter_unpack(raw)]
