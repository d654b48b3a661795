"""A tree as indented text."""

from collections.abc import Iterator, Mapping, Sequence

from khod.abi.fdt import Node
from khod.region import Region
from khod.text import printable
from khod.trees.blobs import opened
from khod.trees.draw import BLOCKS, Pen, head, memory, wrong
from khod.trees.kinds import Decoded, decoded, promised
from khod.trees.summary import summary
from khod.trees.text import MARK, counted


def show(
    blobs: Mapping[str, bytes], *, scratch: Sequence[Region] = (), width: int = 80, pen: Pen = BLOCKS
) -> Iterator[str]:
    """Describe a tree's blobs, the root's name is "", a line at a time."""
    found = summary(blobs, scratch, width)
    for blob in found.blobs:
        yield head(blob)
        if blob.wrong:
            yield from wrong(blob, blobs[blob.name])
        else:
            yield from _node(opened(blob.name, blobs[blob.name]), None, 1)
    yield from memory(found, pen)


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
    return found.text if known or not found.text else f"{found.text} [{counted(length, 'byte')}]"
