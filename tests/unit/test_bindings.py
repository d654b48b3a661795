# SPDX-License-Identifier: LGPL-2.1-or-later
"""The device tree schemas that kernel maintainers could take, by the programs that these use: dtc and dtschema's."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from khod.abi.fdt import MAGIC, U32
from khod.simulated.kernel import build_tree
from khod.trees.validate import PACKAGED_SCHEMAS
from tests.bindings import BINDINGS, EXAMPLES, STANDARD, file_name, load_sources, write_binding, write_example
from tests.unit.test_trees_validate import OTHERWISE, WRITTEN
from tests.unit.trees import Nodes, compatible, fdt

SOURCES = dict(load_sources())
STRUCTURES = {"kexec-metadata", "luo-v5", "memfd-v1", "memfd-v2"}
"""What a kernel writes as a C structure: dt-schema is for trees."""
NOT_JUDGED = ("multiple of", "seals", "compatible")
"""Findings of ours that dt-schema cannot have: it knows no byte order, no parity, and nothing of what has no schema."""


def run_tool(name: str, *arguments: str | Path) -> str:
    """Run one of dtschema's programs and return all that it says; their exit code is 0 in any case."""
    program = Path(sys.executable).with_name(name)
    ended = subprocess.run([program, *arguments], capture_output=True, text=True, check=True)
    return ended.stdout + ended.stderr


def validate(directory: Path, blobs: Mapping[str, bytes]) -> dict[str, str]:
    """Return what dt-validate says of each tree, for those of which it says anything."""
    for name, blob in blobs.items():
        (directory / f"{name}.dtb").write_bytes(blob)
    said = run_tool("dt-validate", "-s", BINDINGS.parent, "-l", "schemas/kho/", *sorted(directory.glob("*.dtb")))
    return {name: said for name in blobs if f"/{name}.dtb:" in said}


def is_tree(blob: bytes) -> bool:
    return blob.startswith(U32.pack(MAGIC))


def written() -> Iterator[tuple[str, bytes]]:
    """Whatever our own code writes as a tree."""
    yield from ((f"simulated-{count}", build_tree(count)) for count in (0, 1, 4))
    yield from ((f"written-{number}", blob) for number, (_name, blob) in enumerate(WRITTEN) if is_tree(blob))
    yield from ((f"example-{name}", fdt(compatible(name) | dict(node))) for name, node in EXAMPLES.items())


def broken() -> Iterator[tuple[str, bytes]]:
    """Trees of our tests that do not fit; and each example without one of its members, or with another member."""
    for number, (_name, blob, _where, said) in enumerate(OTHERWISE):
        if is_tree(blob) and not any(word in said or word in _where for word in NOT_JUDGED):
            yield f"otherwise-{number}", blob
    for name, node in EXAMPLES.items():
        whole: Nodes = compatible(name) | dict(node)
        yield f"{name}-more", fdt({**whole, "unknown": b"\1"})
        for key, value in node.items():
            if key == "compatible" or key in OPTIONAL.get(name, ()):
                continue
            yield f"{name}-without-{key}", fdt({other: kept for other, kept in whole.items() if other != key})
            if isinstance(value, bytes) and key not in STANDARD:  # of these dt-schema takes any length
                yield f"{name}-short-{key}", fdt({**whole, key: value[:-1]})


OPTIONAL = {
    "kho-v1": ("memblock", "preserved-memory-map"),  # without the map it is a tree of v3's
    **dict.fromkeys(("kho-v2", "kho-v3", "kho-v4"), ("memblock",)),
    "memblock-v1": ("trace",),
    "ftrace-v1": ("global-trace",),
    "ftrace,array-v1": ("cpu0",),
    "luo-v1": ("luo-flb",),
}
"""Members that a tree may lack."""


def test_every_schema_of_a_tree_has_one_and_no_other() -> None:
    assert {path.stem for path in PACKAGED_SCHEMAS.glob("*.json")} - SOURCES.keys() == STRUCTURES
    assert {path.name for path in BINDINGS.iterdir()} == {file_name(name) for name in SOURCES}
    assert EXAMPLES.keys() == SOURCES.keys()


@pytest.mark.parametrize("name", SOURCES)
def test_it_is_what_its_source_gives(name: str) -> None:
    assert (BINDINGS / file_name(name)).read_text() == write_binding(name, SOURCES[name]), "run: make bindings"


@pytest.mark.parametrize("name", SOURCES)
def test_every_property_is_described(name: str) -> None:
    text = json.dumps(SOURCES[name])
    assert SOURCES[name]["description"]
    assert text.count('"description"') > 1 or name == "memblock-v1"


def test_dtschema_takes_them() -> None:
    assert run_tool("dt-doc-validate", BINDINGS.parent) == ""


def test_what_our_code_writes_fits(tmp_path: Path) -> None:
    assert validate(tmp_path, dict(written())) == {}


def test_what_is_broken_does_not(tmp_path: Path) -> None:
    trees = dict(broken())
    assert len(trees) >= 3 * len(SOURCES)
    assert trees.keys() - validate(tmp_path, trees).keys() == set()


def test_the_examples_compile_and_fit(tmp_path: Path) -> None:
    """All in one tree, below nodes that match nothing."""
    nodes = "".join(f"example-{number} {{ {write_example(name)} }};\n" for number, name in enumerate(SOURCES))
    (tmp_path / "examples.dts").write_text(f"/dts-v1/;\n/ {{ {nodes} }};\n")
    command = ["dtc", "-q", "-I", "dts", "-O", "dtb", "-o", "examples.dtb", "examples.dts"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60)
    blob = (tmp_path / "examples.dtb").read_bytes()
    assert validate(tmp_path, {"examples": blob}) == {}
    assert validate(tmp_path, {"examples": blob.replace(b"luo-flb-header", b"luo-flb-hunger")}).keys() == {"examples"}
