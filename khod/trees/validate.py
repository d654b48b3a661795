"""Trees held against JSON Schema (draft 2020-12): one file for each compatible, ours and the operator's own.

A node is held against the schema of its compatible as
{"name": TEXT, "properties": {NAME: VALUE}, "children": {NAME: {"name": .., "properties": .., "children": {}}}}: its
children's properties, not its grandchildren. Values are decoded as in `khod.trees.plain` (numbers, strings as lists,
mem as {"ranges", "bytes"}); bytes that are not what their name promises come as {"raw": HEX}.
A C structure is held against the schema of its compatible, or of its blob's name where it has none.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from khod.abi import fdt
from khod.abi.fdt import Node
from khod.errors import ConfigError, MalformedTree
from khod.text import printable
from khod.trees.blobs import METADATA, opened
from khod.trees.kinds import decoded

OURS = Path(__file__).parent / "schemas"
OWN = Path("/etc/kho/schemas")
LONGEST = 200  # characters of what a schema's checker says
Schemas = Mapping[str, tuple[Path, Any]]


@dataclass(frozen=True)
class Finding:
    """One thing that was found; `fits` where it is only said, as for a compatible no schema is for."""

    path: str
    prop: str
    what: str
    fits: bool = False

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.path, self.prop, self.what)))


def schemas(own: Sequence[Path] = (OWN,)) -> Schemas:
    """Read the schemas by the compatible they are for, their files' names: ours, then each directory's over them.

    A directory that is not there has none. ConfigError names the file and the place of what is no schema.
    """
    found: dict[str, tuple[Path, Any]] = {}
    for directory in (OURS, *own):
        for path in sorted(directory.glob("*.json")):
            found[path.stem] = (path, _schema(path))
    return found


def validate(blobs: Mapping[str, bytes], known: Schemas, *, shortened: bool = False) -> Iterator[Finding]:
    """Hold each node of each blob, the root's name is "", against the schema of its compatible.

    With `shortened` a root that is cut off is let pass, as debugfs may show it.
    """
    for name, blob in blobs.items():
        place = f"{printable(name) or 'root'}:"
        try:
            root = opened(name, blob)
        except MalformedTree as error:
            unknown = bool(name) and not blob.startswith(fdt.U32.pack(fdt.MAGIC)) and name != METADATA
            yield Finding(f"{place}/", "", error.what, fits=unknown or (shortened and bool(error.remedy)))
            continue
        yield from _nodes(root, None, "", place, known)


def _nodes(node: Node, parent: Node | None, path: str, place: str, known: Schemas) -> Iterator[Finding]:
    where = f"{place}{printable(path) or '/'}"
    kind = node.compatible or (node.name if parent is None else "")
    if kind in known:
        yield from _held(instance(node, parent), where, *known[kind])
    elif kind:
        yield Finding(where, "compatible", f"there is no schema for {printable(kind)}", fits=True)
    for child in node.children:
        yield from _nodes(child, node, f"{path}/{child.name}", place, known)


def instance(node: Node, parent: Node | None = None, *, deep: bool = True) -> dict[str, Any]:
    """Give a node as schemas see it."""
    children = {child.name: instance(child, node, deep=False) for child in node.children} if deep else {}
    properties = {key: _value(key, node, parent) for key in node.properties}
    return {"name": node.name, "properties": properties, "children": children}


def _value(key: str, node: Node, parent: Node | None) -> Any:
    found = decoded(key, node, parent)
    return {"raw": found.value} if found.kind == "bytes" else found.value


def _held(held: dict[str, Any], where: str, path: Path, schema: Any) -> Iterator[Finding]:
    import jsonschema  # noqa: PLC0415 - dear to import, and only this needs it
    import referencing  # noqa: PLC0415 - comes with it

    # An empty registry: a reference out of the file is an error, and never fetched from the network.
    checker = jsonschema.Draft202012Validator(schema, registry=referencing.Registry())
    try:
        for error in checker.iter_errors(held):
            place = [str(part) for part in error.absolute_path if part not in ("properties", "children")]
            what = error.message if len(error.message) <= LONGEST else f"{error.message[:LONGEST]} ..."
            yield Finding(where, printable("/".join(place)), printable(what))
    except (re.error, RecursionError, referencing.exceptions.Unresolvable) as error:
        raise ConfigError(
            f"The schema cannot be used: {error or type(error).__name__}", where=str(path), remedy="Correct the file."
        ) from None


def _schema(path: Path) -> Any:
    import jsonschema  # noqa: PLC0415 - as above

    try:
        made = json.loads(path.read_bytes())
        jsonschema.Draft202012Validator.check_schema(made)
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"The schema cannot be read: {error}", where=str(path)) from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"This is no JSON: {error.msg}", where=f"{path}:{error.lineno}") from None
    except jsonschema.SchemaError as error:
        place = "/".join(str(part) for part in error.absolute_path)
        raise ConfigError(
            f"This is no JSON Schema: {error.message[:LONGEST]}", where=f"{path}: /{place}", remedy="Correct the file."
        ) from None
    return made
