# SPDX-License-Identifier: LGPL-2.1-or-later
"""The differences of two trees: by path and property, `mem` by ranges, a blob of unknown kind by offsets."""

import enum
import struct
from collections.abc import Iterator, Mapping
from itertools import groupby, islice

from khod.abi.fdt import KHO_MEM, Node
from khod.dataclass import dataclass
from khod.errors import MalformedTree
from khod.text import format_size, printable
from khod.trees.blobs import open_blob
from khod.trees.kinds import decode_property
from khod.trees.show import value_text
from khod.trees.text import format_count

MAX_SPANS = 4  # differing spans of a blob that are shown
BLOCK_BYTES = 4096  # bytes compared at once to find them


class Change(enum.Enum):
    """The kind of a difference, from left to right."""

    added = "+"
    removed = "-"
    changed = "!"
    unknown = "?"  # a kernel does not show one side completely, so it is not known


@dataclass(frozen=True)
class Difference:
    """One difference: `prop` is "" for a whole node or blob, `left` and `right` are in words.

    For an unknown one, `right` says why.
    """

    change: Change
    blob: str
    path: str
    prop: str
    left: str
    right: str


def compare_blobs(
    left: Mapping[str, bytes], right: Mapping[str, bytes], *, kernels: bool = False
) -> Iterator[Difference]:
    """Compare two trees' blobs by name; the root's name is "", shown as "root".

    With `kernels` the trees are as a kernel shows them: what it may hide or cut off is unknown, not a difference.
    """
    for name in sorted(left.keys() | right.keys()):
        shown = printable(name) or "root"
        if name not in right:
            yield Difference(Change.removed, shown, "", "", format_size(len(left[name])), "")
        elif name not in left:
            yield Difference(Change.added, shown, "", "", "", format_size(len(right[name])))
        elif left[name] != right[name]:
            yield from _compare_blob(name, shown, left[name], right[name], kernels=kernels)


def format_difference(found: Difference) -> Iterator[str]:
    """Yield one difference as diff writes it: `-` and `+` lines with the place."""
    place = ":".join(filter(None, (found.blob, found.path)))
    if found.change is Change.unknown:
        yield f"?{place} {found.right}"
        return
    name = f"{found.prop} = " if found.prop and (found.left or found.right) else found.prop
    if found.change is not Change.added:
        yield f"-{place} {name}{found.left}".rstrip()
    if found.change is not Change.removed:
        yield f"+{place} {name}{found.right}".rstrip()


def _compare_blob(name: str, shown: str, left: bytes, right: bytes, *, kernels: bool) -> Iterator[Difference]:
    try:
        before, after = open_blob(name, left), open_blob(name, right)
    except MalformedTree as error:
        if kernels and error.remedy:
            yield Difference(Change.unknown, shown, "", "", "", f"{error.what}. {error.remedy}")
            return
        spans = _differing_spans(left, right)  # there may be millions
        said = [f"{first:#x}-{last - 1:#x}" for first, last in islice(spans, MAX_SPANS)]
        others = sum(1 for _ in spans)
        at = f"differs at {', '.join(said)}{f' and {others} more' if others else ''}"
        yield Difference(
            Change.changed, shown, "", "", f"{format_size(len(left))}, {at}", f"{format_size(len(right))}, {at}"
        )
        return
    found = list(_compare_nodes(shown, "", (before, None), (after, None)))
    yield from found
    if not found:
        yield Difference(Change.changed, shown, "/", "", "the same tree", "the same tree, laid out otherwise")


def _differing_spans(left: bytes, right: bytes) -> Iterator[tuple[int, int]]:
    """Yield the spans of offsets that differ; the extra bytes of the longer one are a span too."""
    short = min(len(left), len(right))
    for start in range(0, short, BLOCK_BYTES):
        a, b = left[start : min(start + BLOCK_BYTES, short)], right[start : min(start + BLOCK_BYTES, short)]
        if a == b:
            continue
        for differs, offsets in groupby(range(len(a)), key=lambda at, a=a, b=b: a[at] != b[at]):  # type: ignore[misc]
            if differs:
                span = list(offsets)
                yield start + span[0], start + span[-1] + 1
    if len(left) != len(right):
        yield short, max(len(left), len(right))


def _compare_nodes(
    blob: str, path: str, left: tuple[Node, Node | None], right: tuple[Node, Node | None]
) -> Iterator[Difference]:
    """Compare two nodes, each given with its parent, and everything below them."""
    (before, _), (after, _) = left, right
    here = printable(path) or "/"
    for key in dict.fromkeys((*before.properties, *after.properties)):
        old, new = before.properties.get(key), after.properties.get(key)
        if old is None or new is None:
            change = Change.added if old is None else Change.removed
            yield Difference(
                change, blob, here, printable(key), _property_text(key, *left), _property_text(key, *right)
            )
        elif old != new:
            said = (_property_text(key, *left), _property_text(key, *right))
            if key == "mem":
                said = _compare_mem(old, new, *said)
            yield Difference(Change.changed, blob, here, printable(key), *said)
    olds = {child.name: child for child in before.children}
    news = {child.name: child for child in after.children}
    for name in dict.fromkeys((*olds, *news)):
        below = f"{path}/{name}"
        if name not in news:
            yield Difference(Change.removed, blob, printable(below), "", _count_nodes(olds[name]), "")
        elif name not in olds:
            yield Difference(Change.added, blob, printable(below), "", "", _count_nodes(news[name]))
        else:
            yield from _compare_nodes(blob, below, (olds[name], before), (news[name], after))


def _count_nodes(node: Node) -> str:
    found = list(node.walk())
    return f"a node ({printable(node.compatible) or 'no compatible'}, {len(found) - 1} below it)"


def _property_text(key: str, node: Node, parent: Node | None) -> str:
    if key not in node.properties:
        return ""
    return value_text(decode_property(key, node, parent), len(node.properties[key]), known=True) or "empty"


def _compare_mem(old: memoryview, new: memoryview, left: str, right: str) -> tuple[str, str]:
    """Describe how many ranges and bytes only one of the two has."""
    if len(old) % KHO_MEM.size or len(new) % KHO_MEM.size:
        return left, right
    befores, afters = ({entry for (entry,) in struct.iter_unpack(f"{KHO_MEM.size}s", raw)} for raw in (old, new))
    gone, came = (sum(KHO_MEM.unpack(entry)[1] for entry in only) for only in (befores - afters, afters - befores))
    if befores == afters:
        return f"{left}", f"{right}, the same ranges in another order or number"
    return (
        f"{left}; {format_count(len(befores - afters), 'range')}, {format_size(gone)} only here",
        f"{right}; {format_count(len(afters - befores), 'range')}, {format_size(came)} only here",
    )
