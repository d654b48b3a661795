# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a tree is in short: what each blob has in it, and where in physical memory what they name lies."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from khod.abi.fdt import Node
from khod.errors import MalformedTree
from khod.region import Region
from khod.trees.blobs import is_broken, open_blob
from khod.trees.memory import MemoryMap, summarise_ranges
from khod.trees.text import format_family

PAIRS = {"reserve-mem": ("start", "size"), "kho": ("preserved-data", "blob-size")}
"""What names a range besides v3's `mem`: a reserve_mem= region by its own compatible, a blob by its root's."""
U64 = 8


@dataclass(frozen=True)
class Blob:
    """One blob: `bytes` of it, `mem` the lengths in bytes of these properties by path; `wrong` where it is none.

    `damaged` tells an FDT that cannot be read from what never was one.
    """

    name: str
    bytes: int
    compatible: str = ""
    nodes: int = 0
    properties: int = 0
    mem: Mapping[str, int] | None = None
    wrong: str = ""
    remedy: str = ""
    damaged: bool = False


@dataclass(frozen=True)
class Summary:
    """All of it; `cached` tells whether the memory is v3's, which its kernel merges when an image is loaded."""

    blobs: Sequence[Blob]
    memory: MemoryMap | None
    scratch: Sequence[Region]
    cached: bool


def summarise_tree(blobs: Mapping[str, bytes], scratch: Sequence[Region] = (), width: int = 80) -> Summary:
    """Sum a tree's blobs up, the root's name is ""; the memory over `width` columns."""
    found, mems, cached = [], [], False
    for name, blob in blobs.items():
        try:
            root = open_blob(name, blob)
        except MalformedTree as error:
            damaged = is_broken(name, blob)
            found.append(Blob(name, len(blob), wrong=error.what, remedy=error.remedy, damaged=damaged))
            continue
        nodes = list(root.walk())
        mem = {path: len(node.properties["mem"]) for path, node in nodes if "mem" in node.properties}
        cached = cached or bool(mem)
        mems += list(named_ranges(root))
        properties = sum(len(node.properties) for _path, node in nodes)
        found.append(Blob(name, len(blob), root.compatible, len(nodes), properties, mem))
    return Summary(found, summarise_ranges(mems, scratch, width), scratch, cached)


def named_ranges(root: Node) -> Iterator[memoryview]:
    """Yield the ranges a tree names, as `mem` has them: struct kho_mem after struct kho_mem."""
    for _path, node in root.walk():
        if "mem" in node.properties:
            yield node.properties["mem"]
        yield from _range_pair(node, format_family(node.compatible))
    for child in root.children:
        if not child.compatible:
            yield from _range_pair(child, format_family(root.compatible))


def _range_pair(node: Node, kind: str) -> Iterator[memoryview]:
    pair = [node.properties.get(key, memoryview(b"")) for key in PAIRS.get(kind, ())]
    if pair and all(len(raw) == U64 for raw in pair):
        yield memoryview(b"".join(pair))
