# SPDX-License-Identifier: LGPL-2.1-or-later
"""The manual pages: made from their source, free of mandoc's complaints, complete, and with examples that work."""

import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from khod.config import Config, list_settings
from khod.daemon import parse_options
from khod.errors import UsageError
from khod.producers.configuration import check_files
from khod.producers.health import KEYS as HEALTH_KEYS
from tests.manuals import PAGES, SOURCES, find_command, format_comment, make_page
from tests.unit.khods import REPOSITORY, Khod, cli

NAMES = [source.name for source in SOURCES]
PUBLISHED = {"khoctl.8", "khod.8", "khod.toml.5", "kho-producers.7", "kho-handover.service.8", "kho.7"}
COMMON = {"--host", "--socket", "--timeout", "--json", "--help", "--no-block"}
"""Options that the page describes once for all commands."""
READING = ("status", "check", "plan", "producers", "history", "verify")
"""Commands whose examples are run: they change nothing, and end by themselves."""


def read_page(name: str) -> str:
    """A page as text of man(7) in which each typed character is itself."""
    text = (PAGES / name).read_text()
    for escape, char in ((r"\-", "-"), (r"\(dq", '"'), (r"\e", "\\"), (r"\&", ""), (r"\ ", " "), (r"\fR", "")):
        text = text.replace(escape, char)
    return re.sub(r"\\f[BI]", "", text)


def list_examples(name: str) -> Iterator[str]:
    """What a page shows as it is typed, block by block."""
    found = re.findall(r"^\.(?:EX|nf)\n(.*?)^\.(?:EE|fi)", read_page(name), re.MULTILINE | re.DOTALL)
    yield from (block for block in found if block.strip())


EXAMPLES = [(name, block) for name in NAMES for block in list_examples(name)]
FILES = [(name, block) for name, block in EXAMPLES if block.startswith("# /etc/kho/")]
LINES = [(name, line.strip()) for name, block in EXAMPLES for line in block.splitlines()]
COMMANDS = [(name, line) for name, line in LINES if line.startswith("khoctl ")]


def test_there_is_a_page_for_whatever_an_operator_looks_up() -> None:
    assert set(NAMES) >= PUBLISHED
    assert sorted(path.name for path in PAGES.iterdir() if path.is_file()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_page_is_what_its_source_gives(name: str) -> None:
    assert (PAGES / name).read_text() == make_page(PAGES / "source" / name), "run: make manuals"


@pytest.mark.parametrize("name", NAMES)
def test_mandoc_has_no_complaint(name: str) -> None:
    ended = subprocess.run(["mandoc", "-T", "lint", name], cwd=PAGES, capture_output=True, text=True, check=False)
    assert (ended.stdout, ended.stderr, ended.returncode) == ("", "", 0)


@pytest.mark.parametrize("name", NAMES)
def test_a_reference_leads_to_a_page(name: str) -> None:
    """Of those that are ours; a system has its own others."""
    found = set(re.findall(r"^\.BR (kho\S*) \((\d)\)", read_page(name), re.MULTILINE))
    assert found
    assert {f"{page}.{section}" for page, section in found} <= set(NAMES)


def test_every_unit_is_described_and_no_other() -> None:
    page = read_page("kho-handover.service.8")
    listed = page.partition("\n.SH SYNOPSIS\n")[2].partition("\n.SH ")[0].split()[1:-1]
    units = {path.name for path in (REPOSITORY / "systemd").glob("kho[-.]*") if path.is_file()}
    assert {name.replace("@PROFILE", "@") for name in listed} == units
    section = page.partition("\n.SH DESCRIPTION\n")[2]
    for name in listed:
        assert re.search(rf"^\.(?:B|BR|BI) .*{re.escape(name.partition('@')[0])}", section, re.MULTILINE), name


# khod.toml(5)


def test_every_key_of_the_configuration_is_described_and_no_other() -> None:
    section = read_page("khod.toml.5").partition("\n.SH KEYS\n")[2].partition("\n.SH ")[0]
    found: dict[str, object] = {}
    table = ""
    for line in section.splitlines():
        if header := re.fullmatch(r"\.SS \[(\w+)\]", line):
            table = header[1]
        elif key := re.fullmatch(r'\.BR (\w+) " = (.*)"', line):
            found[f"{table}.{key[1]}"] = tomllib.loads(f"value = {key[2]}")["value"]
    assert found == json.loads(json.dumps(list_settings(Config())))


def test_a_comment_with_a_list_stays_one() -> None:
    lines = [
        "What must be known:",
        '  "none"     nothing',
        '  "digest"   it is',
        "No caller can do without.",
        "(A text.)",
    ]
    made = list(format_comment(lines))
    quoted = r"\(dqnone\(dq: nothing", r"\(dqdigest\(dq: it is"
    assert made == [
        "What must be known:",
        ".br",
        quoted[0],
        ".br",
        quoted[1],
        ".br",
        "No caller can do without. (A text.)",
    ]


def test_every_key_of_a_health_check_is_described_and_no_other() -> None:
    section = read_page("khod.toml.5").partition('\n.SH "HEALTH CHECKS"\n')[2].partition("\n.SH ")[0]
    assert tuple(re.findall(r"^\.TP\n\.BR? (\w+)", section, re.MULTILINE)) == HEALTH_KEYS


@pytest.mark.parametrize(("name", "block"), FILES, ids=[f"{name} {block.splitlines()[0]}" for name, block in FILES])
def test_an_example_of_a_file_is_read_by_khod_s_parser(tmp_path: Path, name: str, block: str) -> None:
    path = tmp_path / block.splitlines()[0].removeprefix("# /")
    path.parent.mkdir(parents=True)
    path.write_text(block)
    assert check_files(tmp_path).errors == []
    ended = cli(Path("/nonexistent"), "config", "check", "--json", path)
    assert [one for one in ended.json["problems"] if one["severity"] == "error"] == [], name
    assert ended.json["files"] == [str(path)]


def test_files_of_every_kind_have_an_example() -> None:
    kinds = {block.splitlines()[0].rpartition("/")[0].rpartition("/")[2] for _name, block in FILES}
    assert kinds >= {"khod.toml.d", "producers.d", "verify.d", "handover.d", "vm.d"}


# khoctl(8)


def list_commands(
    command: click.Command, words: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """All commands that are not hidden, each with its words."""
    if words and not command.hidden:
        yield words, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from list_commands(found, (*words, name))


ALL_COMMANDS = dict(list_commands(find_command([])))


@pytest.mark.parametrize("words", ALL_COMMANDS, ids=" ".join)
def test_every_command_and_option_is_described(words: tuple[str, ...]) -> None:
    section = read_page("khoctl.8").partition("\n.SH COMMANDS\n")[2].partition("\n.SH OPTIONS\n")[0]
    heading = rf"^\.TP\n\.BR? \"?{' '.join(words)}\b"
    command = ALL_COMMANDS[words]
    if isinstance(command, click.Group):
        assert re.search(rf"^\.BR? \"?{words[0]}\b", section, re.MULTILINE)
    elif words[-1] != "list":  # of a group: it stands with the group itself
        assert re.search(heading, section, re.MULTILINE)
    for param in command.params:
        for option in param.opts if isinstance(param, click.Option) and not param.hidden else ():
            if option.startswith("--") and option not in COMMON:
                assert re.search(rf"{option}\b", section), f"{option} of {' '.join(words)}"


def test_every_option_on_the_page_is_one() -> None:
    known = {option for command in ALL_COMMANDS.values() for param in command.params for option in param.opts}
    others = {"--list", "--version", "--help"}
    section = read_page("khoctl.8").partition("\n.SH COMMANDS\n")[2].partition("\n.SH EXAMPLES\n")[0]
    found = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", section))
    assert found
    assert found <= known | others


def test_khod_s_options_are_described_and_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_options(["--help"])
    section = read_page("khod.8").partition("\n.SH OPTIONS\n")[2].partition("\n.SH ")[0]
    options = r"--[a-z]+"
    assert set(re.findall(rf"^\.BI? \"?({options})", section, re.MULTILINE)) == set(
        re.findall(options, capsys.readouterr().out)
    )


# Commands


def parse_example(line: str) -> list[str]:
    """Parse a khoctl command line as khoctl does, short of running it; return its words."""
    words = shlex.split(line.partition("|")[0])[1:]
    command = find_command([])
    context = command.make_context("khoctl", [*words])
    while isinstance(context.command, click.Group) and (rest := [*context._protected_args, *context.args]):
        name, found, rest = context.command.resolve_command(context, rest)
        assert found is not None
        context = found.make_context(name, rest, parent=context)
    return words


@pytest.mark.parametrize(("name", "line"), COMMANDS)
def test_an_example_of_khoctl_is_a_command_line(name: str, line: str) -> None:
    assert parse_example(line), name


def test_the_parser_refuses_what_is_wrong() -> None:
    for line in ("khoctl chek", "khoctl check --no-such", "khoctl kexec --kernel", "khoctl config show a b c"):
        with pytest.raises((click.UsageError, UsageError)):
            parse_example(line)


def test_the_examples_that_only_read_run_beside_khod(tmp_path: Path) -> None:
    lines = sorted({line.partition("|")[0] for _name, line in COMMANDS})
    runnable = [words for line in lines if (words := shlex.split(line)[1:])[0] in READING]
    runnable = [words for words in runnable if words[:2] != ["producers", "test"] and "nightly" not in words]
    runnable = [words for words in runnable if "--kernel" not in words]
    assert len(runnable) >= 5
    khod = Khod(tmp_path)
    try:
        for words in runnable:
            assert khod.khoctl(*words).code == 0, words
    finally:
        khod.close()


@pytest.mark.parametrize("name", NAMES)
def test_a_unit_in_an_example_is_one_of_ours(name: str) -> None:
    units = {path.name.partition(".")[0] for path in (REPOSITORY / "systemd").glob("kho*")}
    text = "\n".join(block for page, block in EXAMPLES if page == name)
    found = re.findall(r"^(?:# )?(?:systemctl \S+|journalctl -u) ([\w-]+@?)", text, re.MULTILINE)
    assert set(found) <= units


@pytest.mark.parametrize("name", NAMES)
def test_a_method_in_an_example_is_one_of_the_interface(name: str) -> None:
    interface = (REPOSITORY / "khod/server/interface.py").read_text()
    for _page, block in (one for one in EXAMPLES if one[0] == name):
        for method in re.findall(r"io\.kho\.Handover\.([A-Z]\w+)", block):
            assert f"async def {method}(" in interface
