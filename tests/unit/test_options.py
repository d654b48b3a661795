# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod names parameters of its interface, khoctl its own options: nothing of khod's knows khoctl's command line.

And khoctl's options for the next kernel, which several commands have.
"""

import ast
import re
from collections.abc import Iterator

import pytest
import typer
from typer.testing import CliRunner

from khoctl.commands import handover
from khoctl.next_kernel import NAMES, NextKernelOptions
from khoctl.option_sets import spread_options
from khoctl.options import CALLS, PARAMETERS, name_options
from tests.unit.khods import REPOSITORY

OPTION = re.compile(r"(?<![\w-])--(?:[a-z][a-z-]*|\{\})")
OF_OTHERS = {
    *("--no-ask-password", "--property", "--json", "--list", "--user", "--system", "--machine", "--no-block"),
    *("--key", "--cert", "--output", "--import", "--check", "--long", "--load-preserve-context"),
    *("--status-fd", "--weak-digest", "--keyring", "--export", "--detach-sign"),
    *("--socket", "--root", "--state", "--simulate", "--version", "--rolled-back"),
}
"""Options of systemctl, systemd-analyze, sbsign, mokutil, xz, zstd, kexec, gpg, gpgv, of khod itself and of
khod-fleetlock."""


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


def test_a_command_gets_the_options_of_the_next_kernel_as_one_object() -> None:
    got = []
    app = typer.Typer()

    @app.command()
    @spread_options
    def boot(options: NextKernelOptions, fast: bool = False) -> None:
        got.append((options, fast))

    words = ["--initrd=a", "--initrd=b", "--default", "--cmdline=", "--remove=quiet", "--fast"]
    for given in ([], words):
        assert CliRunner().invoke(app, given).exit_code == 0
    assert got == [
        (NextKernelOptions(), False),
        (NextKernelOptions(initrd=["a", "b"], default=True, cmdline="", remove=["quiet"]), True),
    ]


@pytest.mark.parametrize("command", ["check", "plan", "kexec"])
def test_the_options_of_the_next_kernel_come_first(command: str) -> None:
    found = typer.main.get_group(handover.app).commands[command].params
    assert tuple(one.name for one in found)[: len(NAMES)] == NAMES
    assert {"now", "from_profile", "as_json"} <= {one.name for one in found[len(NAMES) :]}
    assert [f"--{name.replace('_', '-')}" for name in NAMES] == [one.opts[0] for one in found[: len(NAMES)]]
