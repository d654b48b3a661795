# SPDX-License-Identifier: LGPL-2.1-or-later
"""The maintainer scripts of the Debian package, as dpkg calls them, on the state of a host below another root."""

import json
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from khoctl.profile_hooks import ENVIRONMENT, lock_runs
from khoctl.render import phase_name
from khod.handover.machine import RESTING
from khod.handover.record import Record, Store
from khod.history import tables
from khod.history.opening import open_database
from khod.model import Phase
from khod.values import encode_value
from tests.unit.khods import REPOSITORY, Khod

PACKAGING = REPOSITORY / "packaging"
ALLOWED = RESTING | {Phase.failed, Phase.foreign, Phase.inconsistent}
"""khod has nothing under way, or does not go on by itself: it may be the new version that can."""
UPGRADE = (("prerm", "upgrade", "2"), ("prerm", "failed-upgrade", "1", "2"), ("preinst", "upgrade", "1", "2"))
REMOVAL = ("prerm", "remove")


@cache
def guard() -> str:
    return subprocess.check_output([PACKAGING / "write-guard"], text=True)


class Root:
    """A root with khod's state in it, whose maintainer scripts can be run."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.state = directory / "var/lib/khod"
        self.state.mkdir(parents=True)

    def write(self, record: Record) -> None:
        Store(self.state).write(record)

    def run(self, script: str, *words: str, force: str = "0", before: Sequence[str] = ()) -> tuple[int, str]:
        """Run a script as dpkg does, by a command that runs another one `before`; its exit code, and what it prints."""
        text = (PACKAGING / f"debian/khod.{script}").read_text().replace("#GUARD#", guard())
        environment = {"PATH": os.environ["PATH"], "DPKG_ROOT": str(self.directory), "KHOD_FORCE": force}
        ended = subprocess.run(
            [*before, "sh", "-s", "--", *words],
            input=text,
            env=environment,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        return ended.returncode, ended.stdout + ended.stderr

    def refuses(self, *call: str) -> str:
        """Expect that a call is refused; what it says."""
        code, said = self.run(*call)
        assert code == 1, said
        assert "Nothing was changed" in said
        return said


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path)


@pytest.mark.parametrize("call", [*UPGRADE, REMOVAL], ids=" ".join)
@pytest.mark.parametrize("phase", [phase for phase in Phase if phase not in ALLOWED])
def test_nothing_cuts_a_handover_short(root: Root, phase: Phase, call: tuple[str, ...]) -> None:
    root.write(replace(Record(), phase=phase))
    said = root.refuses(*call)
    assert f"a handover is under way ({phase_name(phase)})" in said
    assert "khoctl wait" in said or "khoctl abort" in said
    assert root.run(*call, force="1") == (0, "")


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase in ALLOWED])
def test_a_host_without_a_handover_may_be_upgraded(root: Root, phase: Phase) -> None:
    root.write(replace(Record(), phase=phase, run="prepared", last_error='"phase": "active"\n"phase": "active"'))
    for call in (*UPGRADE, REMOVAL):
        assert root.run(*call) == (0, "")


def test_a_khod_with_a_handover_is_found_by_its_own_record(tmp_path: Path) -> None:
    with closing(Khod(tmp_path)) as khod:
        root = Root(tmp_path)
        root.state.rmdir()
        root.state.symlink_to(tmp_path / "state")
        assert root.run(*REMOVAL) == (0, "")
        assert khod.khoctl("activate").code == 0
        for call in (*UPGRADE, REMOVAL):
            assert "(active)" in root.refuses(*call)
        assert khod.khoctl("abort").code == 0
        assert root.run(*REMOVAL) == (0, "")


def test_a_record_of_one_line_is_read_too(root: Root) -> None:
    values = encode_value(replace(Record(), phase=Phase.loaded, last_error='"phase": "idle", "version": 9'))
    Store(root.state).record_path.write_text(json.dumps(values, default=encode_value))
    assert "(loaded)" in root.refuses(*REMOVAL)
    assert root.run("preinst", "install", "1") == (0, "")


def test_a_damaged_record_is_no_reason_to_refuse(root: Root) -> None:
    Store(root.state).record_path.write_bytes(b'\xff\x00{"phase')
    for call in (*UPGRADE, REMOVAL, ("preinst", "install", "1")):
        assert root.run(*call) == (0, "")


def test_the_first_installation_finds_no_record(root: Root) -> None:
    shutil.rmtree(root.state)
    assert root.run("preinst", "install") == (0, "")
    assert root.run("postinst", "configure", "") == (0, "")


def test_the_installed_version_takes_a_refused_upgrade_back(root: Root) -> None:
    root.write(replace(Record(), phase=Phase.active))
    assert root.run("postinst", "abort-upgrade", "2") == (0, "")
    assert root.run("postinst", "abort-remove") == (0, "")


def test_a_profile_is_not_cut_short_before_its_handover_begins(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = root.directory / "var/lib/kho-profiles"
    monkeypatch.setenv(ENVIRONMENT, str(runs))
    with lock_runs():
        assert "the run of a profile is under way" in root.refuses("preinst", "upgrade", "1", "2")
    assert root.run("preinst", "upgrade", "1", "2") == (0, "")


@contextmanager
def history(root: Root) -> Iterator[sqlite3.Connection]:
    open_database(root.state / "history.db")[0].close()
    with closing(sqlite3.connect(root.state / "history.db")) as connection:
        yield connection


@pytest.mark.parametrize("call", [("install", "2"), ("upgrade", "2", "1")], ids=" ".join)
def test_an_older_version_refuses_a_newer_record_and_a_newer_history(root: Root, call: tuple[str, ...]) -> None:
    root.write(Record())
    with history(root) as connection:
        assert root.run("preinst", *call) == (0, "")
        connection.execute(f"PRAGMA user_version = {tables.VERSION + 1}")
        connection.commit()
    assert "history.db has version 2" in root.refuses("preinst", *call)
    root.write(replace(Record(), version=2))
    assert "handover.json has version 2" in root.refuses("preinst", *call)
    assert root.run("preinst", *call, force="1") == (0, "")


def test_what_is_not_the_history_of_khod_refuses_nothing(root: Root) -> None:
    (root.state / "history.db").write_bytes(b"\xff" * 4096)
    assert root.run("preinst", "upgrade", "2", "1") == (0, "")


def test_a_purge_leaves_nothing(root: Root) -> None:
    lines = {"passwd": "root:x:0:0::/root:/bin/sh\n", "group": "root:x:0:\n", "shadow": "", "gshadow": ""}
    ours = {
        "passwd": "kho-sessions:x:990:990::/:/bin/false\n",
        "group": "kho:x:1:\nkho-producers:x:2:\nkho-sessions:x:990:\n",
    }
    (root.directory / "etc/kho/producers.d").mkdir(parents=True)
    (root.directory / "etc/kho/producers.d/mine.toml").write_text("")
    for name, text in lines.items():
        (root.directory / "etc" / name).write_text(text + ours.get(name, ""))
    root.write(Record())
    assert root.run("postrm", "remove")[0] == 0
    assert root.state.is_dir()
    assert root.run("postrm", "purge")[0] == 0
    assert not root.state.exists()
    assert not (root.directory / "etc/kho").exists()
    assert {name: (root.directory / "etc" / name).read_text() for name in lines} == lines


def test_a_purge_removes_nothing_of_another_file_system(root: Root) -> None:
    """Neither an operator's file on a disk that is mounted there, nor does the package stay half purged for it."""
    mounted = root.state / "snapshots"
    mounted.mkdir()
    root.write(Record())
    around = f'mount -t tmpfs none {mounted}; touch {mounted}/theirs; "$@"; echo $?; ls {mounted}'
    in_namespace = ["unshare", "--map-root-user", "--mount", "sh", "-c", around, "sh"]
    _, said = root.run("postrm", "purge", before=in_namespace)
    assert said.split()[:2] == ["0", "theirs"]
    assert "Unmount it" in said
    assert os.listdir(root.state) == ["snapshots"]


@pytest.mark.parametrize(
    ("khoctl", "restarts"),
    [("exit 0", True), ("echo 'khod.toml:3: no such key' >&2; exit 2", False), ("exit 1", True)],
    ids=["right", "refused", "not to be asked"],
)
def test_a_configuration_that_the_new_version_refuses_keeps_the_old_one_running(
    root: Root, khoctl: str, restarts: bool
) -> None:
    programs = root.directory / "bin"
    programs.mkdir()
    (programs / "khoctl").write_text(f"#!/bin/sh\n{khoctl}\n")
    (programs / "khoctl").chmod(0o755)
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "DPKG_ROOT": str(root.directory)}
    ended = subprocess.run(
        ["sh", "-ec", f"{guard()}\nif may_restart; then echo restarts; fi"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    assert (ended.stdout == "restarts\n") is restarts
    assert ("khod.toml:3" in ended.stderr and "goes on" in ended.stderr) is not restarts
