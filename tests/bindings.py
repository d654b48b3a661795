# SPDX-License-Identifier: LGPL-2.1-or-later
"""Write the schemas of khod/trees as device tree schemas: python -m tests.bindings, or `make bindings`.

Those in khod/trees/schemas stay the source: what they say of nodes and properties is said in the words of dt-schema,
with the type that `khod.trees.kinds` has for each property. Only a schema with a title becomes one: the others describe
C structures, which are not trees.

Numbers of KHO are in the byte order of the kernel, and dt-validate reads them as big-endian: what depends on the order
(a multiple, an upper bound) is left out, and a constant is given in both.
"""

import json
import textwrap
from collections.abc import Iterator, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

from khod.trees import kinds
from khod.trees.source import write_dts
from khod.trees.text import format_family
from khod.trees.validate import PACKAGED_SCHEMAS
from tests.unit.trees import PAGE, U32, U64, Nodes, compatible, fdt, mem

BINDINGS = Path(__file__).parents[1] / "packaging/bindings/kho"
HEADER = """# SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
# Made from khod/trees/schemas by `make bindings`.
%YAML 1.2
---
"""
MAINTAINER = "The khod maintainers <maintainers@users.noreply.r-seed-fc53fe58.example>"
TYPES = "/schemas/types.yaml#/definitions/"
PAIR = {"minItems": 2, "maxItems": 2}
KINDS: dict[str, dict[str, Any]] = {
    "u32": {"$ref": f"{TYPES}uint32"},
    "u64": {"$ref": f"{TYPES}uint64"},
    "address": {"$ref": f"{TYPES}uint64"},
    "size": {"$ref": f"{TYPES}uint64"},
    "events": {"$ref": f"{TYPES}uint32-matrix", "items": PAIR},
    "mem": {"oneOf": [{"type": "boolean"}, {"$ref": f"{TYPES}uint64-matrix", "items": PAIR}]},  # boolean: no range
    "kho_vmalloc": {"$ref": f"{TYPES}uint8-array", "minItems": 16, "maxItems": 16},
}
"""The type of dt-schema for each kind of property."""
STANDARD = ("cpu",)
"""Properties that dt-schema itself knows, with a type of the same size: it takes no second one."""
ARRAY: dict[str, Any] = compatible("ftrace,array-v1") | {
    "trace-flags": U32(0x40401),
    "cpu0": compatible("ftrace,cpu-v1") | {"cpu": U32(0), "mem": mem((0x4000, 64), (0x5000, PAGE))},
}
SESSION = compatible("luo-session-v2") | {"luo-session-header": U64(0x1041000)}
FLB = compatible("luo-flb-v1") | {"luo-flb-header": U64(0x1042000)}
REGION = compatible("reserve-mem-v1") | {"start": U64(0x8000000), "size": U64(PAGE)}
MAP = {"preserved-memory-map": U64(0x105F000)}
BLOB = {"preserved-data": U64(0x2000)}
SIZED = BLOB | {"blob-size": U64(PAGE)}
EXAMPLES: dict[str, Nodes] = {
    "kho-v1": MAP | {"memblock": {"fdt": U64(0x2000)}},
    "kho-v2": MAP | {"memblock": BLOB},
    "kho-v3": MAP | {"memblock": SIZED},
    "kho-v4": MAP | {"memblock": SIZED},
    "memblock-v1": {"trace": REGION},
    "reserve-mem-v1": REGION,
    "ftrace-v1": {"events": U32(0xBEEF) + U32(7), "global-trace": ARRAY},
    "ftrace,array-v1": ARRAY,
    "ftrace,cpu-v1": ARRAY["cpu0"],
    "luo-v1": {"liveupdate-number": U64(1), "luo-session": SESSION, "luo-flb": FLB},
    "luo-session-v1": SESSION,
    "luo-session-v2": SESSION,
    "luo-flb-v1": FLB,
    "kho-test-v1": {
        "magic": U32(0x4B484F21),
        "data": {"nr_folios": U32(512), "folios_info": kinds.KHO_VMALLOC.pack(0x80000, 1, 0, 0), "csum": U32(0xCAFE)},
    },
}
"""A node for each compatible, as a kernel writes it."""


def load_sources() -> Iterator[tuple[str, dict[str, Any]]]:
    """Return the schemas of nodes, each with its compatible."""
    for path in sorted(PACKAGED_SCHEMAS.glob("*.json")):
        schema = json.loads(path.read_text())
        if "title" in schema:
            yield path.stem, schema


def file_name(name: str) -> str:
    """Return the name of a compatible's file, as the kernel's have it."""
    return f"{name.replace(',', '-')}.yaml"


def make_binding(name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the device tree schema of a compatible."""
    node = convert_node(schema, format_family(name))
    node.setdefault("properties", {})["compatible"] = {"const": name}
    made: dict[str, Any] = {
        "$id": f"http://devicetree.org/schemas/kho/{file_name(name)}#",
        "$schema": "http://devicetree.org/meta-schemas/core.yaml#",
        "title": schema["title"],
        "maintainers": [MAINTAINER],
        "description": f"{schema['description']} {schema['$comment']}",
    }
    made |= {key: node.pop(key) for key in ("properties", "patternProperties", "required") if key in node}
    if "if" in schema:  # dt-schema finds the type of a property in oneOf, and not behind a condition
        condition, one, other = (convert_node(schema[word], format_family(name)) for word in ("if", "then", "else"))
        made["oneOf"] = [{**one, "required": condition["required"]}, other]
    made["additionalProperties"] = node.get("additionalProperties", True)
    return made | {"examples": [write_example(name)]}


def convert_node(schema: Mapping[str, Any], family: str, *, is_child: bool = False) -> dict[str, Any]:
    """Return what a schema of ours says of a node: dt-schema has properties and child nodes under one name space."""
    parts = schema.get("properties", {})
    own, below = parts.get("properties", {}), parts.get("children", {})
    table = (kinds.CHILDREN if is_child else kinds.FAMILIES).get(family, {})
    properties = {
        key: convert_property(key, value, {**kinds.ANYWHERE, **table}[key].name)
        for key, value in own.get("properties", {}).items()
    }
    for key, value in below.get("properties", {}).items():
        properties[key] = convert_child(value, family)
    patterns = {key: convert_child(value, family) for key, value in below.get("patternProperties", {}).items()}
    required = [*own.get("required", []), *below.get("required", [])]
    made: dict[str, Any] = {"properties": properties, "patternProperties": patterns, "required": required}
    made = {key: value for key, value in made.items() if value}
    if isinstance(below.get("additionalProperties"), dict):
        made["additionalProperties"] = convert_child(below["additionalProperties"], family)
    elif own.get("additionalProperties") is False:
        made["additionalProperties"] = False
    return made


def convert_child(schema: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Return what a schema says of a child; one with a compatible has the schema of that."""
    named = schema.get("properties", {}).get("properties", {}).get("properties", {}).get("compatible", {})
    if "items" in named:
        return {"$ref": f"{file_name(named['items']['const'])}#"}
    return {"type": "object", **convert_node(schema, family, is_child=True)}


def convert_property(key: str, schema: Any, kind: str) -> Any:
    """Return a property in the type that dt-schema has for its kind."""
    if kind == "strings" or schema is True:
        return True
    made: dict[str, Any] = {"maxItems": 1} if key in STANDARD else {**KINDS[kind]}
    if "description" in schema:
        made["description"] = schema["description"]
    if schema.get("minimum") == 1:  # not 0, in any byte order
        made["minimum"] = 1
    if (value := schema.get("const")) is not None:
        made["enum"] = sorted({value, int.from_bytes(value.to_bytes(4, "little"), "big")})
    return made


def write_example(name: str) -> str:
    """Return a node with this compatible in the language of dtc."""
    text, _note = write_dts(fdt(compatible(name) | {k: v for k, v in EXAMPLES[name].items() if k != "compatible"}), "")
    body = text.partition("/ {\n")[2].replace("\t", "    ")
    return f"{format_family(name).replace(',', '-')} {{\n{body}".strip() + "\n"


def write_binding(name: str, schema: Mapping[str, Any]) -> str:
    """Return the text of a device tree schema."""
    from ruamel.yaml import YAML  # noqa: PLC0415 - for this only
    from ruamel.yaml.scalarstring import LiteralScalarString  # noqa: PLC0415

    made = make_binding(name, schema)
    made["description"] = LiteralScalarString("\n".join(textwrap.wrap(made["description"], 76)) + "\n")
    made["examples"] = [LiteralScalarString(text) for text in made["examples"]]
    yaml = YAML()
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.width = 4096  # descriptions are short
    out = StringIO()
    for key, value in made.items():
        yaml.dump({key: value}, out)
        out.write("\n" if key not in ("$id",) else "")
    return HEADER + out.getvalue().rstrip("\n") + "\n"


def main() -> None:
    """Write every device tree schema."""
    for name, schema in load_sources():
        (BINDINGS / file_name(name)).write_text(write_binding(name, schema))


if __name__ == "__main__":
    main()
