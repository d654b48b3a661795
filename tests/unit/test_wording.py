# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is printed is plain technical English: shapes that misled readers do not come back."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.khods import REPOSITORY

FORBIDDEN = {
    r"[Mm]end(s|ed|ing)?\b": "fix",
    r"\b[Bb]esides\b": "also, in addition to, other than",
    r"(?<!left )(?<!leave )(?<!leaves )\balone\b": "only",
    r"\blikewise\b": "also",
    r"\bcalled off\b": "aborted",
    r"(must not|may not) travel": "must not be reused",
    r"\bgo(es)? on with it\b": "continues in the background",
    r"(?<![Tt]here )\b(is|are) no(?! (longer|more)\b)(?= \w|$)": "is not a",
    r"\bis none\b": "is not one",
    r"\bis only said\b": "is only reported",
    r"\b[Hh](old|eld) (\w+ )*against\b": "compare with, validate against",
    r"(arrive|arrived|put back) whole\b": "say which part did not arrive, was not rolled back",
    r"no answer yet|not told yet": "say what the producer is doing, and for how long",
    r"(thaw|cancel|freeze|prepare): ready": "thawed, cancelled, frozen, prepared",
    r"refuses to (prepare|freeze)": "say what the producer did or did not answer",
    r"[Ss]omebody drives|Nobody else is at work": "name what uses KHO or kexec",
    r"[Mm]ake room\b": "free some space",
    r"are free in\b": "SIZE free in DIRECTORY",
    r"takes? over nothing": "no state is taken over",
    r"insists? on that": "requires",
    r"There are: none": "None is installed",
    r"come?s? back (from the jump|with an errno)": "name the call that failed and its error",
    r"died at\b": "stopped unexpectedly while",
    r"is not there, no\b": "NAME: not available",
    r"not what its name promises": "malformed: expected",
    r"this is no damage": "this is expected",
    r"It takes a\b": "It must be a",
    r"verb out of|Help these": "remove the command from the file",
    r"There is no `": "name it in words",
    r"[Pp]roducer \S+ left$": "disconnected: `left` is what a producer hands over",
    r"\[Errno|JSONDecodeError": "say it in words: errno_text()",
}
"""A shape, and what is written in its place."""

PAGES = (
    "README.md",
    *(f"packaging/man/{path.name}" for path in sorted((REPOSITORY / "packaging/man/source").iterdir())),
    *(f"etc/kho/{name}" for name in ("khod.toml", "producers.d/example.toml.sample", "handover.d/example.toml.sample")),
)


def printed(path: Path) -> Iterator[tuple[int, str]]:
    """The texts in a module that may be printed: its strings, and of the docstrings those that are a command's help."""
    tree = ast.parse(path.read_text())
    prose = set[ast.AST]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            prose.add(node.value)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and any(".command" in ast.unparse(by) for by in node.decorator_list):
            prose -= {node.body[0].value} if isinstance(node.body[0], ast.Expr) else set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in prose:
            yield node.lineno, " ".join(node.value.split())


def found(texts: Iterator[tuple[int, str]]) -> list[str]:
    return [
        f"{line}: {match[0]!r} in {text!r}: {better}"
        for line, text in texts
        for shape, better in FORBIDDEN.items()
        if (match := re.search(shape, text))
    ]


MODULES = sorted(path for name in ("khod", "khoctl") for path in (REPOSITORY / name).rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_what_a_module_prints_is_plain(path: Path) -> None:
    assert found(printed(path)) == []


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_plain(name: str) -> None:
    paragraphs = re.sub(r"\\(.)", r"\1", (REPOSITORY / name).read_text()).split("\n\n")
    texts = (
        (number, " ".join(re.sub(r"(?m)^(#|\.[A-Z]+) ?", "", text).split()))
        for number, text in enumerate(paragraphs, 1)
    )
    assert found(texts) == []


def test_a_shape_is_found(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(
        '"""Mend."""\n# mended\nA = f"{1} mended"\n@app.command()\ndef f():\n    """Mend."""\n'
    )
    assert [line.partition(":")[0] for line in found(printed(tmp_path / "x.py"))] == ["3", "6"]
