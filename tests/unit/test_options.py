# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod names parameters of its interface, khoctl its own options: nothing of khod's knows khoctl's command line."""

import ast
import re
from collections.abc import Iterator

import pytest

from khoctl.options import CALLS, PARAMETERS, name_options
from tests.unit.khods import REPOSITORY

OPTION = re.compile(r"(?<![\w-])--(?:[a-z][a-z-]*|\{\})")
OF_OTHERS = {
    *("--no-ask-password", "--property", "--json", "--list", "--user", "--system", "--machine"),
    *("--key", "--cert", "--output", "--import", "--check", "--long", "--load-preserve-context"),
    *("--socket", "--root", "--state", "--simulate", "--version"),
}
"""Options of systemctl, systemd-analyze, sbsign, mokutil, xz, zstd, kexec and of khod itself."""


def strings() -> Iterator[tuple[str, str]]:
    """Each string in khod's code that is no docstring, with the file it stands in."""
    for path in sorted((REPOSITORY / "khod").rglob("*.py")):
        tree = ast.parse(path.read_text())
        documents = {
            id(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
                yield str(path.relative_to(REPOSITORY)), "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documents:
                yield str(path.relative_to(REPOSITORY)), node.value


def test_no_message_of_khod_s_names_an_option_of_khoctl_s() -> None:
    named = {(path, option) for path, text in strings() for option in OPTION.findall(text)}
    assert named
    assert {(path, option) for path, option in named if option not in OF_OTHERS} == set()


def test_every_parameter_that_a_message_names_has_an_option() -> None:
    token = re.compile(r"`((?:Abort|Kexec)\(\w+\)|kernel\.\w+|kernel|now|force|hold|load_only|format)[`=]")
    named = {name for _, text in strings() for name in token.findall(text)}
    assert {"Abort(force)", "Kexec(now)", "kernel.append", "now"} <= named
    assert named <= CALLS.keys() | PARAMETERS.keys()


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("To put it back: `Abort(force)`", "To put it back: khoctl abort --force"),
        ("Switch it on: `kernel.append=kho=on`", "Switch it on: --append kho=on"),
        ("for instance with: khoctl check `kernel=7.3.4`", "for instance with: khoctl check --kernel 7.3.4"),
        ("unknown key `x`, `prepare`", "unknown key `x`, `prepare`"),
        ("Use `format=dtb` or `format=json`.", "Use --format dtb or --format json."),
        ("Jump with `now`, or add `kernel.image`.", "Jump with --now, or add --image."),
    ],
)
def test_khoctl_names_its_options(said: str, shown: str) -> None:
    assert name_options(said) == shown
