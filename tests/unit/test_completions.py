# SPDX-License-Identifier: LGPL-2.1-or-later
"""Completion of values in bash, zsh and fish as an operator has it: keys go in, the command line that runs comes out.

`khoctl` in these shells is a script: it answers a completion as khoctl does, and prints its arguments otherwise.
"""

import os
import pty
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from khoctl import candidates
from khoctl.completion import DIRECTORIES, FILES, list_candidates
from tests.manuals import find_command
from tests.unit.images import CPIO, bzimage
from tests.unit.khods import DEADLINE, REPOSITORY, Khod, wait_readable

SCRIPTS = REPOSITORY / "packaging/completions"
LAUNCHER = """
import pathlib, sys
from khoctl import candidates
candidates.ROOT = pathlib.Path(sys.argv.pop(1))
from khoctl.app import main
main()
"""
MARK = "ARGUMENTS: "


@dataclass(frozen=True)
class Place:
    """A host with a khod, kernels, boot entries and profiles; `environment` is for the shells on it."""

    directory: Path
    environment: dict[str, str]
    run: str
    khod: Khod

    def complete(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """What khoctl answers to a shell."""
        command = [str(self.directory / "bin/khoctl"), *words]
        environment = {**self.environment, "_KHOCTL_COMPLETE": "words", **environment}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=DEADLINE)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    directory = tmp_path_factory.mktemp("place")
    for name in (
        "bin",
        "host/boot/loader/entries",
        "host/usr/lib/modules/9.9.9-test",
        "profiles",
        "root/etc/kho/producers.d",
    ):
        (directory / name).mkdir(parents=True)
    for name in ("host/boot/vmlinuz-9.9.9-test", "host/usr/lib/modules/9.9.9-test/vmlinuz"):
        (directory / name).write_bytes(bzimage())
    (directory / "host/boot/initrd.img-9.9.9-test").write_bytes(CPIO)
    (directory / "host/boot/loader/entries/my entry.conf").write_text("title The $HOME\nlinux /vmlinuz-9.9.9-test\n")
    (directory / "host/boot/loader/entries/two:one.conf").write_text("title Two\nlinux /vmlinuz-9.9.9-test\n")
    (directory / "profiles/nightly.toml").write_text("default = true\n")
    (directory / "root/etc/kho/producers.d/db.toml").write_text('prepare = ["true"]\n')
    (directory / "root/etc/kho/producers.d/web@1.toml").write_text('prepare = ["true"]\n')
    (directory / "launcher.py").write_text(LAUNCHER)
    python = shlex.join([sys.executable, str(directory / "launcher.py"), str(directory / "host")])
    script = directory / "bin/khoctl"
    script.write_text(
        f'#!/bin/sh\n[ -z "$_KHOCTL_COMPLETE" ] || exec {python} "$@"\nprintf "{MARK}"\nprintf "<%s>" "$@"\necho\n'
    )
    script.chmod(0o755)
    khod = Khod(directory)
    assert khod.khoctl("activate").code == 0
    assert khod.khoctl("abort").code == 0
    environment = {
        "PATH": f"{directory / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "KHOD_SOCKET": str(khod.socket),
        "KHO_PROFILES": str(directory / "profiles"),
        "HOME": str(directory),
        "TERM": "dumb",
        "LC_ALL": "C.UTF-8",
    }
    yield Place(
        directory, environment, khod.record.run or khod.khoctl("history", "--json").json["attempts"][0]["run"], khod
    )
    khod.close()


class Shell:
    """An interactive shell at a terminal."""

    def __init__(self, command: list[str], environment: dict[str, str], setup: str) -> None:
        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            os.execvpe(command[0], command, environment)
        self._read_until(f"{setup}; echo READ''Y\n", "READY")

    def complete(self, line: str) -> list[str]:
        """Type a line, TAB and ENTER; return the arguments with which khoctl ran."""
        said = self._read_until(f"{line}\t\n", MARK)
        return re.findall("<(.*?)>", said.rpartition(MARK)[2])

    def _read_until(self, keys: str, wanted: str) -> str:
        """Press keys, and read until a line has come with a word in it."""
        os.write(self._terminal, keys.encode())
        said = ""
        ends = time.monotonic() + DEADLINE
        while "\n" not in said.partition(wanted)[2]:
            assert wait_readable(self._terminal, max(0.0, ends - time.monotonic())), said
            said += os.read(self._terminal, 65536).decode(errors="replace")
        return said

    def close(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._terminal)


class Fish:
    """fish is asked what it would offer; the last word of the line becomes that where it is only one."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment

    def complete(self, line: str) -> list[str]:
        script = f"source {SCRIPTS / 'khoctl.fish'}; complete --escape -C $argv[1]"
        command = ["fish", "--no-config", "-c", script, line]
        ended = subprocess.run(
            command, env=self._environment, capture_output=True, text=True, check=True, timeout=DEADLINE
        )
        assert ended.stderr == ""
        found = [text.partition("\t")[0] for text in ended.stdout.splitlines()]
        before, _, last = line.rpartition(" ")
        return shlex.split(f"{before} {found[0] if len(found) == 1 else last}")[1:]

    def close(self) -> None:
        """Do nothing: no shell is left."""


def start_shell(name: str, place: Place, **more: str) -> Shell | Fish:
    environment = {**place.environment, **more}
    if name == "fish":
        return Fish(environment)
    if name == "bash":
        setup = f"bind 'set bell-style none'; bind 'set enable-bracketed-paste off'; . {SCRIPTS / 'khoctl.bash'}"
        return Shell(["bash", "--norc", "--noprofile", "-i"], environment, setup)
    functions = place.directory / "zsh"
    functions.mkdir(exist_ok=True)
    (functions / "_khoctl").write_text((SCRIPTS / "khoctl.zsh").read_text())
    setup = f"unsetopt beep zle_bracketed_paste; fpath=({functions} $fpath); autoload -Uz compinit; compinit -u -D"
    return Shell(["zsh", "-f", "-i"], environment, setup)


SHELLS = ["bash", "zsh", "fish"]


@pytest.fixture(scope="module", params=SHELLS)
def shell(place: Place, request: pytest.FixtureRequest) -> Iterator[Shell | Fish]:
    started = start_shell(request.param, place)
    yield started
    started.close()


SINGLE = [
    ("stat", ["status"]),
    ("dt exp", ["dt", "export"]),
    ("kexec --dry", ["kexec", "--dry-run"]),
    ("producers test d", ["producers", "test", "db"]),
    ("producers retry we", ["producers", "retry", "web@1"]),
    ("handover ni", ["handover", "nightly"]),
    ("plan ni", ["plan", "nightly"]),
    ("check --profile ni", ["check", "--profile", "nightly"]),
    ("kexec --kernel 9", ["kexec", "--kernel", "9.9.9-test"]),
    ("kexec --kernel=9", ["kexec", "--kernel=9.9.9-test"]),
    ("kexec --entry my", ["kexec", "--entry", "my entry.conf"]),
    ("kexec --entry two:o", ["kexec", "--entry", "two:one.conf"]),
    ("kexec --image ", ["kexec", "--image", "{host}/boot/vmlinuz-9.9.9-test"]),
    ("kexec --image {host}/boot/initr", ["kexec", "--image", "{host}/boot/initrd.img-9.9.9-test"]),
    ("history show {begin}", ["history", "show", "{run}"]),
    ("report {begin}", ["report", "{run}"]),
    ("dt show {begin}", ["dt", "show", "{run}"]),
    ("dt diff snap", ["dt", "diff", "snapshot"]),
    ("config show deadlines.fr", ["config", "show", "deadlines.freeze"]),
    ("producers test nobody", ["producers", "test", "nobody"]),
]


@pytest.mark.parametrize(("line", "wanted"), SINGLE, ids=[line for line, _wanted in SINGLE])
def test_a_value_is_completed(place: Place, shell: Shell | Fish, line: str, wanted: list[str]) -> None:
    names = {"host": place.directory / "host", "run": place.run, "begin": place.run[:6]}
    assert shell.complete(f"khoctl {line.format(**names)}") == [word.format(**names) for word in wanted]


def test_an_open_quote_stays_one(place: Place, shell: Shell | Fish) -> None:
    if isinstance(shell, Fish):
        assert place.complete("kexec", "--entry", "'my e").stdout.startswith("my entry.conf")
    else:
        assert shell.complete("khoctl kexec --entry 'my e") == ["kexec", "--entry", "my entry.conf"]


@pytest.mark.parametrize("name", SHELLS)
def test_without_khod_a_line_stays(place: Place, name: str) -> None:
    shell = start_shell(name, place, KHOD_SOCKET="/nonexistent/socket")
    try:
        for line in ("producers test d", f"history show {place.run[:6]}"):
            assert shell.complete(f"khoctl {line}") == line.split()
    finally:
        shell.close()


# What khoctl answers


def test_every_candidate_is_offered_with_a_description(place: Place) -> None:
    answer = place.complete("producers", "test", "")
    assert answer.stdout.splitlines() == ["db\thook", "web@1\thook"]
    assert place.complete("kexec", "--entry", "").stdout.splitlines() == [
        "two:one.conf\tTwo",
        "my entry.conf\tThe $HOME",
    ]
    (run,) = place.complete("history", "show", "").stdout.splitlines()
    assert run.startswith(f"{place.run}\t")
    assert run.endswith("rolled back")
    trees = place.complete("dt", "show", "").stdout.splitlines()
    assert [tree.partition("\t")[0] for tree in trees] == ["out", "in", "snapshot", place.run]


def test_runs_come_from_the_database_that_is_named(place: Place) -> None:
    database = str(place.directory / "state/history.db")
    answer = place.complete("history", "show", "--db", database, "", KHOD_SOCKET="/nonexistent/socket")
    assert answer.stdout.startswith(place.run)


@pytest.mark.parametrize(
    "words",
    [
        ("producers", "test", ""),
        ("history", "show", ""),
        ("kexec", "--profile", ""),
        ("no-such-command", ""),
        ("kexec", "--no-such-option", ""),
        ("--host", "nobody@nowhere.invalid", "producers", "test", ""),
        ("kexec", "--kernel", "\udcff"),
    ],
)
def test_whatever_goes_wrong_nothing_is_printed(place: Place, words: tuple[str, ...]) -> None:
    answer = place.complete(*words, KHOD_SOCKET="/nonexistent/socket", KHO_PROFILES="/nonexistent/profiles")
    assert (answer.stdout, answer.stderr, answer.returncode) == ("", "", 0)


@pytest.mark.parametrize("hang", ["accepts and is silent", "does not accept"])
def test_a_khod_that_hangs_is_not_waited_for(place: Place, tmp_path: Path, hang: str) -> None:
    with socket.socket(socket.AF_UNIX) as silent, socket.socket(socket.AF_UNIX) as first:
        silent.bind(str(tmp_path / "socket"))
        silent.listen(0 if hang == "does not accept" else 8)
        if hang == "does not accept":  # the queue is full: connect(2) blocks
            first.connect(str(tmp_path / "socket"))
        answer = place.complete("producers", "test", "", KHOD_SOCKET=str(tmp_path / "socket"))
    assert (answer.stdout, answer.stderr, answer.returncode) == ("", "", 0)


def test_a_name_that_moves_a_cursor_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        candidates, "list_boot", lambda *_names: iter([("/boot/a\x1b[2J", "file"), ("/boot/b", "file")])
    )
    assert list(list_candidates(find_command([]), ["kexec", "--image"], "")) == ["/boot/b\tfile"]


def test_files_are_offered_where_a_file_is_meant_only() -> None:
    root = find_command([])

    def answer(*words: str) -> list[str]:
        return list(list_candidates(root, words[:-1], words[-1]))

    assert answer("report", "--html", "") == [FILES]
    assert answer("dt", "show", "/tm") == [FILES]
    assert answer("config", "check", "") == [FILES]
    assert answer("config", "show", "--root", "") == [DIRECTORIES]
    assert answer("kexec", "--append", "") == []
    assert answer("status", "") == []


def test_every_value_that_names_something_is_completed() -> None:
    """An argument or option without a completer has a word that says why: a text, a number, a file, a host."""
    free = ("FILE", "PATH", "DIR", "NAME", "WORD", "USER@HOST", "SECONDS", "N", "ADDR+SIZE", "TEXT", "DIGEST")
    open_values = []

    def visit(command: click.Command, words: str) -> None:
        for param in command.params:
            has_value = not getattr(param, "is_flag", False) and not getattr(param, "hidden", False)
            metavar = (param.metavar or "TEXT").strip("[].") if isinstance(param, click.Option) else param.metavar or ""
            completed = getattr(param, "_custom_shell_complete", None) or isinstance(param.type, click.Choice)
            if has_value and not completed and metavar.strip("[].") not in free:
                open_values.append(f"{words} {param.name}")
        if isinstance(command, click.Group):
            for name in command.list_commands(click.Context(command)):
                found = command.get_command(click.Context(command), name)
                assert found is not None
                visit(found, f"{words} {name}")

    visit(find_command([]), "khoctl")
    assert open_values == []
