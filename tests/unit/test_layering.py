# SPDX-License-Identifier: LGPL-2.1-or-later
"""The layers of HACKING.md, held by looking at every import statement; a new module must be given its place here."""

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from khod.model import Generation
from tests.unit.khods import REPOSITORY

# A folder imports only from folders below it, in this order from the bottom up; within a layer nothing goes in circles.
LAYERS = [
    {
        "__init__",
        "model",
        "errors",
        "config",
        "region",
        "text",
        "wire",
        "values",
        "files",
        "dataclass",
        "deferred",
        "concurrency",
    },  # the vocabulary
    {"abi"},
    {"kernel", "images", "systemd"},
    {"producers", "target", "handover", "provenance"},
    {"quiesce", "early"},
    {"preflight"},
    {"engine"},
    {"metrics"},
    {"server"},
    {"daemon", "__main__"},  # the composition root
]
VOCABULARY = LAYERS[0]
# What stands beside the layers, and what it may import.
BESIDE = {
    "client": VOCABULARY | {"client", "history"},
    "producer": VOCABULARY | {"client"},
    "history": VOCABULARY - {"config", "concurrency"} | {"history"},
    "trees": VOCABULARY | {"abi.fdt", "trees"},
    "simulated": VOCABULARY | {"abi", "kernel", "simulated"},
    "vm": VOCABULARY | {"vm", "producer", "abi", "systemd.notification", "systemd.notifier"},
    "fleetlock": VOCABULARY | {"fleetlock", "client"},
}
SEEN_BY = {
    "client": {"producer", "fleetlock"},
    "simulated": {"daemon"},
    "vm": {"producers"},
    "fleetlock": {"producers"},
    "history": {
        *("client", "kernel", "systemd", "preflight", "engine", "server", "metrics", "daemon"),
        *("provenance", "target"),
    },
}
"""Who of khod imports what stands beside; khoctl and producers do besides."""
KHOCTL_MAY = VOCABULARY - {"concurrency"} | {"client", "history", "trees", "images.pe", "producers.configuration"}
HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}
MODULES = sorted((REPOSITORY / "khod").rglob("*.py"))


def imports(path: Path, package: str) -> Iterator[str]:
    """Every module of `package` that a file imports, anywhere in it, without the package's name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports by a relative name"
            base = node.module or ""
            names = [resolved(base, alias.name) for alias in node.names]
        else:
            continue
        for name in names:
            if name == package or name.startswith(f"{package}."):
                yield name.removeprefix(package).lstrip(".") or "__init__"


def resolved(base: str, name: str) -> str:
    """`from base import name` means a module where there is one by that name."""
    below = REPOSITORY / f"{base}.{name}".replace(".", "/")
    return f"{base}.{name}" if below.with_suffix(".py").exists() or below.is_dir() else base


def top(module: str) -> str:
    return module.partition(".")[0]


def name(path: Path) -> str:
    """A file of khod as a dotted name."""
    dotted = str(path.relative_to(REPOSITORY / "khod").with_suffix("")).replace("/", ".")
    return dotted.removesuffix(".__init__")


def test_every_module_has_its_place() -> None:
    assert MODULES
    assert {top(name(path)) for path in MODULES} == HEIGHT.keys() | BESIDE.keys()


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_a_module_imports_only_from_its_layer_and_below(path: Path) -> None:
    module = name(path)
    for imported in imports(path, "khod"):
        if seen_from := BESIDE.get(top(module)):
            assert imported in seen_from or top(imported) in seen_from, f"{module} -> {imported}"
        elif top(imported) in BESIDE:
            assert top(module) in SEEN_BY.get(top(imported), ()), f"{module} -> {imported}"
        else:
            assert HEIGHT[top(imported)] <= HEIGHT[top(module)], f"{module} -> {imported}"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_khod_does_not_know_khoctl(path: Path) -> None:
    assert not set(imports(path, "khoctl"))


@pytest.mark.parametrize("path", sorted((REPOSITORY / "khoctl").rglob("*.py")), ids=lambda path: path.name)
def test_khoctl_imports_the_client_side_only(path: Path) -> None:
    assert all(imported in KHOCTL_MAY or top(imported) in KHOCTL_MAY for imported in imports(path, "khod"))


LEAVES = {"khod.text", "khod.dataclass"}
LOWEST: dict[str, set[str]] = {"model": LEAVES, "region": LEAVES, "errors": LEAVES, "text": set(), "dataclass": set()}


@pytest.mark.parametrize("module", LOWEST)
def test_the_lowest_layer_needs_nothing_but_the_standard_library(module: str) -> None:
    """And of khod no more than `text` and `dataclass`, which need nothing but that either."""
    tree = ast.parse((REPOSITORY / f"khod/{module}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert all(alias.name in sys.stdlib_module_names for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert top(node.module or "") in sys.stdlib_module_names or node.module in LOWEST[module]


@pytest.mark.parametrize("path", sorted((REPOSITORY / "khod/abi").glob("*.py")), ids=lambda path: path.stem)
def test_the_abi_knows_no_policy(path: Path) -> None:
    """A value comes back or OSError is raised; of the errors above only a malformed tree has its name here."""
    tree = ast.parse(path.read_text())
    named = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "khod.errors"
        for alias in node.names
    }
    assert named <= {"MalformedTree"}


def test_nothing_above_the_kernel_asks_which_generation_it_is() -> None:
    """Behind one protocol and its traits: the generations and their classes have their names in khod/kernel alone."""
    classes = {"SysfsKho", "Finalize", "FinalizeNoAbort", "Stateless"}
    for path in MODULES:
        if top(name(path)) == "kernel":
            continue
        tree = ast.parse(path.read_text())
        words = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert not words & classes, name(path)
        if name(path) == "model":
            continue
        asked = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert asked & {f"Generation.{generation.value}" for generation in Generation} <= {"Generation.none"}, name(
            path
        )


def test_within_a_layer_nothing_goes_in_circles() -> None:
    sorter: TopologicalSorter[str] = TopologicalSorter()
    for path in MODULES:
        sorter.add(name(path), *(imported for imported in imports(path, "khod") if imported != name(path)))
    assert list(sorter.static_order())  # a CycleError names the circle
