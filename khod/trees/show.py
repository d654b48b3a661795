# SPDX-License-Identifier: LGPL-2.1-or-later
"""A tree as indented text."""

from collections.abc import Iterator, Mapping, Sequence

from khod.abi.fdt import Node
from khod.region import Region
from khod.text import printable
from khod.trees.blobs import open_blob
from khod.trees.draw import BLOCKS, Pen, blob_heading, describe_damage, draw_memory
from khod.trees.kinds import Decoded, decode_property, promised_kind
from khod.trees.summary import summarise_tree
from khod.trees.text import MARK, format_count


def show_blobs(
    blobs: Mapping[str, bytes], *, scratch: Sequence[Region] = (), width: int = 80, pen: Pen = BLOCKS
) -> Iterator[str]:
    """Yield a tree's blobs as indented text, line by line; the root's name is ""."""
    found = summarise_tree(blobs, scratch, width)
    for blob in found.blobs:
        yield blob_heading(blob)
        if blob.wrong:
            yield from describe_damage(blob, blobs[blob.name])
        else:
            yield from _show_node(open_blob(blob.name, blobs[blob.name]), None, 1)
    yield from draw_memory(found, pen)


def _show_node(node: Node, parent: Node | None, depth: int) -> Iterator[str]:
    indent = "  " * depth
    yield f"{indent}{printable(node.name) or '/'}"
    for key in node.properties:
        yield f"{indent}  {show_property(key, node, parent)}"
    for child in node.children:
        yield from _show_node(child, node, depth + 1)


def show_property(key: str, node: Node, parent: Node | None) -> str:
    """Format a property: its name, its value in words, its length if its kind is not known, and what is wrong."""
    found = decode_property(key, node, parent)
    text = value_text(found, len(node.properties[key]), known=promised_kind(key, node, parent) is not None)
    return f"{printable(key)}{f' = {text}' if text else ''}"


def value_text(found: Decoded, length: int, *, known: bool) -> str:
    """Format a decoded value in words."""
    if found.wrong:
        return f"{found.text} {MARK} {found.wrong}"
    return found.text if known or not found.text else f"{found.text} [{format_count(length, 'byte')}]"
