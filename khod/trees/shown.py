"""A tree as indented text, with a strip that draws where in physical memory what it hands over lies."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from khod.abi.fdt import KHO_MEM, Node
from khod.errors import MalformedTree
from khod.region import Region
from khod.trees.blobs import opened
from khod.trees.kinds import Decoded, decoded, hexadecimal, human, promised
from khod.trees.memory import Memory, summarise

MARK = "(!)"
"""Stands in every line about something that is not as it should be."""


@dataclass(frozen=True)
class Pen:
    """The characters a strip is drawn with: `levels` from empty to full, scratch, and memory over scratch."""

    levels: str
    scratch: str
    clash: str


BLOCKS = Pen(" ▁▂▃▄▅▆▇█", "░", "▒")
ASCII = Pen(" .:-=+*#@", "s", "X")


def show(
    blobs: Mapping[str, bytes],
    *,
    scratch: Sequence[Region] = (),
    width: int = 80,
    pen: Pen = BLOCKS,
    summary: bool = False,
) -> Iterator[str]:
    """Describe a tree's blobs, the root's name is "", a line at a time; with `summary` without nodes and properties."""
    mems: list[memoryview] = []
    for name, blob in blobs.items():
        yield f"{printable(name) or 'root'}: {human(len(blob))}{f' ({len(blob)} bytes)' if len(blob) >> 10 else ''}"
        try:
            root = opened(name, blob)
        except MalformedTree as error:
            mark = MARK if not name or blob.startswith(b"\xd0\x0d\xfe\xed") else ""
            remedy = f". {error.remedy}" if error.remedy else ""
            yield f"  {error.what}{remedy} {mark}".rstrip()
            yield f"  {hexadecimal(blob)}"
            continue
        mems += [node.properties["mem"] for _path, node in root.walk() if "mem" in node.properties]
        yield from _counted(root) if summary else _node(root, None, 1)
    if (found := summarise(mems, scratch, width)) is not None:
        yield from memory(found, scratch, pen)


def printable(name: str) -> str:
    """A name as it may stand on a terminal: what is not printable is escaped."""
    return name if name.isprintable() else ascii(name)[1:-1]


def _counted(root: Node) -> Iterator[str]:
    nodes = list(root.walk())
    properties = sum(len(node.properties) for _path, node in nodes)
    compatible = f'"{printable(root.compatible)}", ' if root.compatible else ""
    yield f"  {compatible}{len(nodes)} nodes, {properties} properties"
    for path, node in nodes:
        if "mem" in node.properties:
            length = len(node.properties["mem"])
            yield f"  {printable(path)} mem: {ranges(length)}"


def ranges(length: int) -> str:
    """How many ranges a `mem` of `length` bytes has."""
    if length % KHO_MEM.size:
        return f"{length} bytes, no multiple of {KHO_MEM.size}: the kernel ignores it {MARK}"
    return f"{length // KHO_MEM.size} ranges"


def _node(node: Node, parent: Node | None, depth: int) -> Iterator[str]:
    indent = "  " * depth
    yield f"{indent}{printable(node.name) or '/'}"
    for key in node.properties:
        yield f"{indent}  {line(key, node, parent)}"
    for child in node.children:
        yield from _node(child, node, depth + 1)


def line(key: str, node: Node, parent: Node | None) -> str:
    """One property: its name, its value in words, its length where nothing promises one, and what is wrong with it."""
    found = decoded(key, node, parent)
    text = words(found, len(node.properties[key]), known=promised(key, node, parent) is not None)
    return f"{printable(key)}{f' = {text}' if text else ''}"


def words(found: Decoded, length: int, *, known: bool) -> str:
    """A decoded value in words."""
    if found.wrong:
        return f"{found.text} {MARK} {found.wrong}"
    return found.text if known or not found.text else f"{found.text} [{length} bytes]"


def memory(found: Memory, scratch: Sequence[Region], pen: Pen) -> Iterator[str]:
    """The sum of all `mem`, and the strip."""
    yield f"memory: {found.ranges} ranges, {human(found.bytes)}"
    yield f"  merged as the kernel's mem cache: {found.merged} ranges, {human(found.merged_bytes)} in whole pages"
    if found.hole:
        yield f"  largest hole: {human(found.hole.size)} from {found.hole.addr:#x}"
    if found.beyond:
        yield f"  {found.beyond} ranges run past the end of the address space {MARK}"
    for region in scratch:
        yield f"  scratch: {human(region.size)} from {region.addr:#x}"
    if found.in_scratch:
        yield f"  {human(found.in_scratch)} of it lie in scratch: the kernel refuses to load an image with this {MARK}"
    fullest = max(found.density)
    columns = zip(found.density, found.scratch, strict=True)
    yield f"|{''.join(_column(density / (fullest or 1), at, pen) for density, at in columns)}|"
    first, last = f"{found.start:#x}", f"{found.end - 1:#x}"
    legend = f"{pen.levels[-1]} {fullest:.0%} used" + (f", {pen.scratch} scratch" if scratch else "")
    room = len(found.density) + 2 - len(first) - len(last)  # the bars stand before the first column and after the last
    yield f"{first}{legend:^{max(len(legend) + 2, room)}}{last}"


def _column(density: float, in_scratch: bool, pen: Pen) -> str:
    if in_scratch:
        return pen.clash if density else pen.scratch
    top = len(pen.levels) - 1
    return pen.levels[max(1, min(top, round(density * top)))] if density else pen.levels[0]
