# SPDX-License-Identifier: LGPL-2.1-or-later
"""The summary of a tree: what each blob contains, and where in physical memory the state lies."""

from collections.abc import Iterator, Mapping, Sequence

from khod.abi.fdt import Node
from khod.dataclass import dataclass
from khod.errors import MalformedTree
from khod.region import Region
from khod.trees.blobs import is_broken, open_blob
from khod.trees.memory import MemoryMap, summarise_ranges
from khod.trees.text import format_family

PAIRS = {"reserve-mem": ("start", "size"), "kho": ("preserved-data", "blob-size")}
"""The properties that name a range, other than v3's `mem`.

They are found by a node's own compatible in a reserve_mem= region, and by the root's compatible for a blob.
"""
U64 = 8


@dataclass(frozen=True)
class Blob:
    """One blob: `bytes` is its size, `mem` the lengths of these properties by path, `wrong` why it cannot be read.

    `damaged` distinguishes an FDT that cannot be read from a blob that never was one.
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
    """The summary; `cached` tells whether the memory is v3's, whose kernel merges it when an image is loaded."""

    blobs: Sequence[Blob]
    memory: MemoryMap | None
    scratch: Sequence[Region]
    cached: bool


def summarise_tree(blobs: Mapping[str, bytes], scratch: Sequence[Region] = (), width: int = 80) -> Summary:
    """Summarise a tree's blobs, with the memory over `width` columns; the root's name is ""."""
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
    """Yield the ranges in a tree, in the form of `mem`: an array of struct kho_mem."""
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
