# SPDX-License-Identifier: LGPL-2.1-or-later
"""A tree as JSON.

    {"root": NODE, "memblock": NODE, "other": {"bytes": HEX, "why": TEXT}}
    NODE = {"compatible": TEXT, "properties": {NAME: VALUE}, "children": {NAME: NODE}}
    VALUE = {"raw": HEX, "length": N, "kind": KIND, "value": ANY, "wrong": TEXT}

`raw` has all bytes; `value` is their meaning in the `kind` they were decoded as (`khod.trees.kinds`), null for bytes of
unknown meaning; `wrong` is only there if the bytes do not match the property's name. The root of a blob that is an FDT
also has "fdt": {"version", "boot_cpuid_phys", "reservations": [{"addr", "size"}]}. Everything in the blob can be made
again from this, except the order in which libfdt laid it out.
"""

from collections.abc import Mapping
from typing import Any

from khod.abi import fdt
from khod.abi.fdt import Node
from khod.errors import MalformedTree
from khod.trees.blobs import open_blob
from khod.trees.kinds import decode_property


def tree_as_json(blobs: Mapping[str, bytes]) -> dict[str, Any]:
    """Return a tree's blobs for JSON, the root under "root"; what is not a tree is given in hex, with the reason."""
    made: dict[str, Any] = {}
    for name, blob in blobs.items():
        try:
            made[name or "root"] = node_as_json(open_blob(name, blob)) | _layout_of(blob)
        except MalformedTree as error:
            made[name or "root"] = {"bytes": blob.hex(), "why": error.what}
    return made


def node_as_json(found: Node, parent: Node | None = None) -> dict[str, Any]:
    """Return one node, with everything below it, for JSON."""
    return {
        "compatible": found.compatible,
        "properties": {key: property_as_json(key, found, parent) for key in found.properties},
        "children": {child.name: node_as_json(child, found) for child in found.children},
    }


def property_as_json(key: str, found: Node, parent: Node | None) -> dict[str, Any]:
    """Return one property for JSON."""
    raw, meaning = found.properties[key], decode_property(key, found, parent)
    known = None if meaning.kind == "bytes" else meaning.value
    wrong = {"wrong": meaning.wrong} if meaning.wrong else {}
    return {"raw": bytes(raw).hex(), "length": len(raw), "kind": meaning.kind, "value": known} | wrong


def _layout_of(blob: bytes) -> dict[str, Any]:
    if not blob.startswith(fdt.U32.pack(fdt.MAGIC)):
        return {}
    head = fdt.read_fdt(blob)
    reservations = [{"addr": region.addr, "size": region.size} for region in head.reservations]
    return {
        "fdt": {"version": head.version, "boot_cpuid_phys": head.boot_cpuid_phys, "reservations": reservations},
    }
