"""State trees for people: as indented text, and as device tree source that dtc turns back into the same tree."""

import struct
from collections.abc import Iterator
from typing import Any

from khod.abi import fdt
from khod.errors import MalformedTree
from khod.model import Region

HEAD = 32  # bytes shown of what cannot be decoded


def show(blobs: dict[str, bytes]) -> Iterator[str]:
    """Describe a tree's blobs, the root's name is "", a line at a time."""
    for name, blob in blobs.items():
        yield f"{name or 'root'}: {len(blob)} bytes"
        try:
            root = fdt.parse(blob, name)
        except MalformedTree as error:
            # From Linux 7.1 on a producer's blob need not be an FDT; the root must be one.
            yield f"  {error.what}" if not name else f"  {blob[:HEAD].hex(' ')}{' ...' if len(blob) > HEAD else ''}"
            continue
        for path, node in root.walk():
            depth = "  " * (1 if path == "/" else path.count("/") + 1)
            yield f"{depth}{path.rpartition('/')[2] or '/'}"
            for key, value in node.properties.items():
                yield f"{depth}  {key} = {shown(key, value, node)}"


def shown(key: str, value: bytes, node: fdt.Node) -> str:
    """Put a property in words: kho_mem arrays as a sum, strings, native u32 and u64, else hex."""
    if key == "mem":
        try:
            return sums(fdt.mem(node))
        except MalformedTree as error:
            return f"{error.what} (the kernel ignores it)"
    if text := string(value):
        return f'"{text}"'
    if len(value) in (4, 8):
        return f"{struct.unpack('=I' if len(value) == 4 else '=Q', value)[0]:#x}"  # noqa: PLR2004 - u32
    return f"{len(value)} bytes {value[:HEAD].hex(' ')}{' ...' if len(value) > HEAD else ''}"


def sums(ranges: list[Region]) -> str:
    """How many ranges, how much memory."""
    return f"{len(ranges)} ranges, {sum(region.size for region in ranges) >> 10} KiB"


def string(value: bytes) -> str:
    """A property's text, "" where it is none: printable ASCII that ends in NUL."""
    if len(value) > 1 and value.endswith(b"\0") and value[:-1].isascii():
        text = value[:-1].decode()
        return text if text.isprintable() else ""
    return ""


def plain(blobs: dict[str, bytes]) -> dict[str, Any]:
    """A tree's blobs as JSON would have them: nodes with hex properties, or the hex of what is no tree."""
    made: dict[str, Any] = {}
    for name, blob in blobs.items():
        try:
            made[name or "root"] = _node(fdt.parse(blob, name))
        except MalformedTree as error:
            made[name or "root"] = {"bytes": blob.hex(), "why": error.what}
    return made


def _node(node: fdt.Node) -> dict[str, Any]:
    return {
        "properties": {key: value.hex() for key, value in node.properties.items()},
        "children": {child.name: _node(child) for child in node.children},
    }


def dts(blob: bytes, name: str = "") -> str:
    """Write device tree source: every property that is no string as bytes, which dtc takes as they are."""
    lines = ["/dts-v1/;", ""]

    def write(node: fdt.Node, depth: int) -> None:
        tabs = "\t" * depth
        lines.append(f"{tabs}{node.name or '/'} {{")
        for key, value in node.properties.items():
            text = string(value).replace("\\", "\\\\").replace('"', '\\"')
            rendered = f' = "{text}"' if text else f" = [{value.hex(' ')}]" if value else ""
            lines.append(f"{tabs}\t{key}{rendered};")
        for child in node.children:
            write(child, depth + 1)
        lines.append(f"{tabs}}};")

    write(fdt.parse(blob, name), 0)
    return "\n".join(lines) + "\n"
