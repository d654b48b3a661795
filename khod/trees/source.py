# SPDX-License-Identifier: LGPL-2.1-or-later
"""Device tree source, and the exact bytes that dtc makes of it.

dtc lays a blob out in one way: the header, the reservations at the next multiple of 8, the nodes, then the names in
order of their first use; a name that is the end of another one shares its bytes. libfdt's sequential writer, which the
kernel's producers use, lays out the same tree differently: reservations at a multiple of 16, so at 48 and not at 40,
and the names from last to first. No option of dtc changes that. So `dtc` turns the source into the blob's own bytes if
dtc (or a program with the same layout) made the blob. Otherwise it makes the same tree in dtc's layout: the bytes of
`dtc -I dtb -O dtb BLOB`.

`compile_tree` computes these bytes without dtc, and the second line of the source says which of the two cases it is.
"""

import re
from collections.abc import Iterator

from khod.abi.fdt import (
    FDT_BEGIN_NODE,
    FDT_END,
    FDT_END_NODE,
    FDT_PROP,
    HEADER,
    MAGIC,
    PROP,
    RESERVATION,
    U32,
    V16_SIZE,
    VERSIONS,
    Fdt,
    Node,
    read_fdt,
)
from khod.errors import UsageError
from khod.trees.kinds import decode_strings

WRITABLE = re.compile(r"[0-9A-Za-z,._+*#?@-]+")  # PROPNODECHAR of dtc's lexer
NODE = re.compile(r"[0-9A-Za-z,._+-]+(@[0-9A-Za-z,._+-]*)?")  # accepted by dtc's checks without an option
PROPERTY = re.compile(r"[0-9A-Za-z,._+*#?-]+")
CHECKED = ("phandle", "linux,phandle")
"""Properties whose values dtc checks."""
ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"'})
MAX_NAMES = 1000
"""The number of property names: producers have a dozen; each new one is searched for in all before it, as in dtc."""
OTHER_FORMS = "Use `format=dtb` or `format=json`."
NO_NAME_CHECK = ("-E", "no-name_is_string")  # this also switches off name_properties, which depends on it


def write_dts(blob: bytes, name: str = "") -> tuple[str, str]:
    """Write a blob as source for dtc; return it, and how dtc's result would differ from the blob ("" if it does not).

    The second line is a comment with the command. Raises MalformedTree, and UsageError if a name has characters that
    the source language cannot write, or there are too many names.
    """
    tree = read_fdt(blob, name)
    asked = dtc_options(tree, name)
    made, note = compile_tree(tree), ""
    if pad_blob(made, len(blob)) != blob:
        note = (
            "dtc will produce an equivalent tree, but not the identical bytes: it produces "
            f"those of `{' '.join(('dtc -I dtb -O dtb', *asked))}` of the blob"
        )
    elif made != blob:
        asked += ("-S", str(len(blob)))
    command = " ".join(("dtc -I dts -O dtb", *asked))
    says = f"/* `{command}`: {note}. */" if note else f"/* `{command}` makes the same bytes of this again. */"
    lines = ["/dts-v1/;", says]
    lines += [f"/memreserve/ {region.addr:#x} {region.size:#x};" for region in tree.reservations]
    return "\n".join([*lines, "/ {", *_write_body(tree.root, "\t", name), "};\n"]), note


def _write_body(node: Node, tabs: str, where: str) -> Iterator[str]:
    for key, value in node.properties.items():
        yield f"{tabs}{_require_writable(key, where)}{_write_value(value)};"
    for child in node.children:
        yield f"{tabs}{_require_writable(child.name, where)} {{"
        yield from _write_body(child, f"{tabs}\t", where)
        yield f"{tabs}}};"


def _require_writable(name: str, where: str) -> str:
    if not WRITABLE.fullmatch(name):
        raise UsageError(
            f"Device tree source has no way to write the name {name!a}",
            where=where,
            remedy=OTHER_FORMS,
        )
    return name


def _write_value(raw: memoryview) -> str:
    """Write strings as strings and all else as bytes, which dtc copies."""
    if not raw:
        return ""
    try:
        return " = " + ", ".join(f'"{text.translate(ESCAPES)}"' for text in decode_strings(raw))
    except ValueError:
        return f" = [{raw.hex(' ')}]"


def dtc_options(tree: Fdt, where: str = "") -> tuple[str, ...]:
    """Return the options that dtc needs with -I and -O: for values that are not in the source, and checks to overrule.

    Raises UsageError with `where` if there are more than MAX_NAMES names of properties.
    """
    nodes = [node for _path, node in tree.root.walk()]
    keys = {key for node in nodes for key in node.properties}
    if len(keys) > MAX_NAMES:
        raise UsageError(
            f"The properties have more than {MAX_NAMES} names, which dtc is not made for",
            where=where,
            remedy=OTHER_FORMS,
        )
    odd = any(not NODE.fullmatch(node.name) for node in nodes[1:]) or any(not PROPERTY.fullmatch(key) for key in keys)
    asked: tuple[str, ...] = ("-f",) if odd or keys & set(CHECKED) else ()
    if "name" in keys:
        asked += NO_NAME_CHECK  # if its value is the node's name, dtc removes it as redundant
    if tree.boot_cpuid_phys or any(child.name == "cpus" for child in tree.root.children):
        asked += ("-b", str(tree.boot_cpuid_phys))  # otherwise it is 0, or the first reg of /cpus
    if tree.version < VERSIONS[-1]:  # dtc writes no later version
        asked += ("-V", str(tree.version))
    return asked


def pad_blob(made: bytes, size: int) -> bytes:
    """Return a blob padded with zeros to `size` bytes, as by dtc's -S; unchanged if it is already that long."""
    if size <= len(made):
        return made
    return made[:4] + U32.pack(size) + made[8:].ljust(size - 8, b"\0")


def compile_tree(tree: Fdt) -> bytes:
    """Return the bytes that dtc makes of `write_dts` with `dtc_options`."""
    names = bytearray()
    nodes = bytearray()
    _write_node(tree.root, nodes, names, {})
    nodes += U32.pack(FDT_END)
    reservations = b"".join(RESERVATION.pack(region.addr, region.size) for region in tree.reservations)
    reserve_at = 40  # the next multiple of 8 after either header
    nodes_at = reserve_at + len(reservations) + RESERVATION.size
    names_at = nodes_at + len(nodes)
    total = names_at + len(names)
    header = HEADER.pack(
        MAGIC,
        total,
        nodes_at,
        names_at,
        reserve_at,
        min(tree.version, VERSIONS[-1]),
        VERSIONS[0],
        tree.boot_cpuid_phys,
        len(names),
        len(nodes),
    )
    if tree.version == VERSIONS[0]:
        header = header[:V16_SIZE].ljust(reserve_at, b"\0")
    return b"".join((header, reservations, bytes(RESERVATION.size), nodes, names))


def _write_node(node: Node, nodes: bytearray, names: bytearray, known: dict[str, int]) -> None:
    name = node.name.encode(errors="surrogateescape")
    nodes += U32.pack(FDT_BEGIN_NODE) + name.ljust(len(name) + 4 & ~3, b"\0")
    for key, value in node.properties.items():
        if key not in known:
            word = key.encode(errors="surrogateescape") + b"\0"
            if (at := names.find(word)) < 0:
                at = len(names)
                names += word
            known[key] = at
        nodes += U32.pack(FDT_PROP) + PROP.pack(len(value), known[key])
        nodes += value
        nodes += bytes(-len(value) & 3)
    for child in node.children:
        _write_node(child, nodes, names, known)
    nodes += U32.pack(FDT_END_NODE)
