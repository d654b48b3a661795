# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the house must look like, held by reading the code; the layers stand in test_layering."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.khods import REPOSITORY

Function = ast.FunctionDef | ast.AsyncFunctionDef

ROOT_FILES = 14
ONE_WORD_SHARE = 0.45
MAX_LINES, MAX_METHODS = 250, 20
REASON = "One class of this size: "
PUBLIC = {"khod/producer.py", "khod/server/interface.py", "khod/server/producer_interface.py"}
"""The producers' library and the wire have names of their own; the model's are the wire's, too."""
PROSE = re.compile(r"\b(what|reason|message|remedy|why|evidence|summary|sentence)$")
READERS = {"startswith", "endswith", "split", "partition", "rpartition", "find", "index"}


def files(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (REPOSITORY / package).rglob("*.py"))


def classes(*packages: str) -> Iterator[tuple[str, ast.ClassDef]]:
    for path in files(*packages):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                yield str(path.relative_to(REPOSITORY)), node


def test_the_root_of_khod_is_small() -> None:
    assert 0 < len(list((REPOSITORY / "khod").glob("*.py"))) <= ROOT_FILES


@pytest.mark.parametrize("path", files("khod", "khoctl", "tests"), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_file_names_its_license(path: Path) -> None:
    assert "# SPDX-License-Identifier: LGPL-2.1-or-later" in path.read_text().split("\n")[:2]


def test_no_class_has_another_s_name() -> None:
    named = defaultdict(list)
    for path, node in classes("khod", "khoctl"):
        if path not in PUBLIC:
            named[node.name].append(path)
    assert len(named) > 100
    assert {name: paths for name, paths in named.items() if len(paths) > 1} == {}


def test_most_functions_are_a_verb_and_what_it_acts_on() -> None:
    names = [
        node.name
        for path in files("khod", "khoctl")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, Function) and not node.name.startswith("__")
    ]
    assert sum("_" not in name.strip("_") for name in names) <= ONE_WORD_SHARE * len(names)


def test_a_large_class_says_why_it_is_one() -> None:
    for path, node in classes("khod", "khoctl"):
        lines = (node.end_lineno or 0) - node.lineno + 1
        methods = sum(isinstance(child, Function) for child in node.body)
        if lines > MAX_LINES or methods > MAX_METHODS:
            assert REASON in (ast.get_docstring(node) or ""), f"{path}: {node.name}, {lines} lines, {methods} methods"


def test_nobody_but_the_transaction_writes_its_fields() -> None:
    """Every way around the machine's table stands in one file."""
    for path in files("khod"):
        if path.name == "transaction.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets:
                if isinstance(target, ast.Attribute):
                    owner = ast.unparse(target.value)
                    assert not owner.endswith("transaction"), f"{path}: {ast.unparse(target)} is written"


def test_no_code_reads_a_sentence() -> None:
    """What is for people is rendered from fields, and never taken apart: neither by its beginning nor by a word."""
    for path in files("khod", "khoctl"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in READERS:
                read = ast.unparse(node.func.value)
            elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn):
                read = ast.unparse(node.comparators[0])
            else:
                continue
            assert not ("." in read and PROSE.search(read)), f"{path}:{node.lineno}: {ast.unparse(node)}"


def test_nobody_waits_with_select() -> None:
    """select(2) takes no descriptor above 1023, and khod has more; so has a process that runs thousands of tests."""
    for path in files("khod", "khoctl", "tests/unit"):
        assert "select.select" + "(" not in path.read_text(), path


def test_nobody_sends_with_python_s_lock_held() -> None:
    """systemd.daemon.notify() and systemd.journal.send() hold it while the other side does not read."""
    for path in files("khod", "khoctl"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("systemd.daemon", "systemd.journal"):
                assert node.attr not in ("notify", "send", "stream"), f"{path}:{node.lineno}"
