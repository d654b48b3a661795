# SPDX-License-Identifier: LGPL-2.1-or-later
"""Validate trees with JSON Schemas (draft 2020-12): one file for each compatible, khod's and the operator's own.

A node is validated with the schema of its compatible, in the form {"name": TEXT, "properties": {NAME: VALUE},
"children": {NAME: {"name": .., "properties": .., "children": {}}}}: with its children's properties, but not its
grandchildren. Values are decoded as in `khod.trees.as_json` (numbers, strings as lists, mem as {"ranges", "bytes"});
bytes that do not match their name are given as {"raw": HEX}.

A C structure is validated with the schema of its compatible, or of its blob's name if it has none.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from khod.abi import fdt
from khod.abi.fdt import Node
from khod.dataclass import dataclass
from khod.errors import ConfigError, MalformedTree
from khod.text import printable, shorten
from khod.trees.blobs import METADATA, open_blob
from khod.trees.kinds import decode_property
from khod.trees.text import format_hex

PACKAGED_SCHEMAS = Path(__file__).parent / "schemas"
OPERATOR_SCHEMAS = Path("/etc/kho/schemas")
MAX_VALUE_CHARACTERS = 200  # maximum length of a finding in characters
PARTS = {"properties": "property", "children": "child node"}
"""The parts of a node's instance, and the name of an item in each."""
COUNTED = ("Items", "Length", "Properties")
TYPES = {
    "integer": "a whole number",
    "number": "a number",
    "string": "a text",
    "array": "a list",
    "object": "an object",
    "boolean": "true or false",
}
SIZES = {f"min{what}": "at least" for what in COUNTED} | {f"max{what}": "at most" for what in COUNTED}
RULES = {
    "type": "",
    "const": "",
    "enum": "one of ",
    "minimum": "at least ",
    "maximum": "at most ",
    "exclusiveMinimum": "more than ",
    "exclusiveMaximum": "less than ",
    "multipleOf": "a multiple of ",
    "pattern": "a text like ",
}
"""The rules of JSON Schema, in words."""
Schemas = Mapping[str, tuple[Path, Any]]


@dataclass(frozen=True)
class SchemaFinding:
    """One finding; `fits` is True if it is only reported, such as a compatible without a schema."""

    path: str
    prop: str
    what: str
    fits: bool = False

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.path, self.prop, self.what)))


def load_schemas(own: Sequence[Path] = (OPERATOR_SCHEMAS,)) -> Schemas:
    """Read the schemas by their file's name, which is the compatible; a later directory replaces khod's own.

    A directory may be missing. Raises ConfigError, with the file and the place, for a schema that is not valid.
    """
    found: dict[str, tuple[Path, Any]] = {}
    for directory in (PACKAGED_SCHEMAS, *own):
        for path in sorted(directory.glob("*.json")):
            found[path.stem] = (path, _load_schema(path))
    return found


def validate_blobs(blobs: Mapping[str, bytes], known: Schemas, *, shortened: bool = False) -> Iterator[SchemaFinding]:
    """Validate each node of each blob with the schema of its compatible; the root's name is "".

    With `shortened` a root that is cut off is accepted, as debugfs may show it.
    """
    for name, blob in blobs.items():
        place = f"{printable(name) or 'root'}:"
        try:
            root = open_blob(name, blob)
        except MalformedTree as error:
            unknown = bool(name) and not blob.startswith(fdt.U32.pack(fdt.MAGIC)) and name != METADATA
            yield SchemaFinding(f"{place}/", "", error.what, fits=unknown or (shortened and bool(error.remedy)))
            continue
        yield from _validate_nodes(root, None, "", place, known)


def _validate_nodes(node: Node, parent: Node | None, path: str, place: str, known: Schemas) -> Iterator[SchemaFinding]:
    where = f"{place}{printable(path) or '/'}"
    kind = node.compatible or (node.name if parent is None else "")
    if kind in known:
        yield from _validate_held(node_instance(node, parent), where, *known[kind])
    elif kind:
        yield SchemaFinding(where, "compatible", f"there is no schema for {printable(kind)}", fits=True)
    elif parent is None:  # the root's compatible says what the tree is; another producer's blob may lack one
        yield SchemaFinding(where, "compatible", "missing: nothing says what this is", fits=place != "root:")
    for child in node.children:
        yield from _validate_nodes(child, node, f"{path}/{child.name}", place, known)


def node_instance(node: Node, parent: Node | None = None, *, deep: bool = True) -> dict[str, Any]:
    """Return a node in the form that schemas validate."""
    children = {child.name: node_instance(child, node, deep=False) for child in node.children} if deep else {}
    properties = {key: _property_instance(key, node, parent) for key in node.properties}
    return {"name": node.name, "properties": properties, "children": children}


def _property_instance(key: str, node: Node, parent: Node | None) -> Any:
    found = decode_property(key, node, parent)
    return {"raw": found.value} if found.kind == "bytes" else found.value


def _validate_held(held: dict[str, Any], where: str, path: Path, schema: Any) -> Iterator[SchemaFinding]:
    import jsonschema  # noqa: PLC0415 - slow to import, and only used here
    import referencing  # noqa: PLC0415 - comes with it

    # An empty registry: a reference out of the file is an error, and is never fetched from the network.
    checker = jsonschema.Draft202012Validator(schema, registry=referencing.Registry())
    found = dict[SchemaFinding, None]()  # each once: malformed bytes may break several rules
    try:
        for error in checker.iter_errors(held):
            place = [str(part) for part in error.absolute_path if part not in PARTS]
            found[
                SchemaFinding(
                    where,
                    printable("/".join(place)),
                    shorten(printable(_schema_error_text(error)), MAX_VALUE_CHARACTERS),
                )
            ] = None
    except (re.error, RecursionError, referencing.exceptions.Unresolvable) as error:
        raise ConfigError(
            f"The schema cannot be used: {error or type(error).__name__}", where=str(path), remedy="Correct the file."
        ) from None
    yield from found


def _schema_error_text(error: Any) -> str:
    """Describe what a value is and what the schema requires."""
    value, wanted, rule = error.instance, error.validator_value, error.validator
    path = list(error.absolute_path)
    part = PARTS.get(path[-1], "value") if path else "value"
    if isinstance(value, dict) and [*value] == ["raw"] and part == "value":
        return f"malformed: {format_hex(bytes.fromhex(value['raw']))}"
    if rule == "required":
        return f"missing {part}: {', '.join(name for name in wanted if name not in value)}"
    if rule == "additionalProperties":
        patterns = error.schema.get("patternProperties", {})
        known = error.schema.get("properties", {})
        names = (name for name in value if name not in known and not any(re.search(one, name) for one in patterns))
        return f"unexpected {part}: {', '.join(names)}"
    if rule in SIZES:
        return f"must have {SIZES[rule]} {wanted}, has {len(value)}"
    if rule == "type":
        kinds = [wanted] if isinstance(wanted, str) else wanted
        wanted = " or ".join(TYPES.get(kind, str(kind)) for kind in kinds)
    else:
        wanted = json.dumps(wanted)
    if rule not in RULES:
        return f"does not fit the schema: {rule} {wanted}"
    return f"must be {RULES[rule]}{wanted}, is {json.dumps(value)}"


def _load_schema(path: Path) -> Any:
    import jsonschema  # noqa: PLC0415 - as above

    try:
        made = json.loads(path.read_bytes())
        jsonschema.Draft202012Validator.check_schema(made)
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"The schema cannot be read: {error}", where=str(path)) from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"This is not valid JSON: {error.msg}", where=f"{path}:{error.lineno}") from None
    except jsonschema.SchemaError as error:
        place = "/".join(str(part) for part in error.absolute_path)
        raise ConfigError(
            f"This is not a JSON Schema: {error.message[:MAX_VALUE_CHARACTERS]}",
            where=f"{path}: /{place}",
            remedy="Correct the file.",
        ) from None
    return made
