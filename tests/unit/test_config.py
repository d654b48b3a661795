# SPDX-License-Identifier: LGPL-2.1-or-later
"""Configuration: fragments in order, what is wrong named with file and line; profiles and producers too."""

import dataclasses
import json
import os
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from khoctl import profile
from khod import config
from khod.config import Config
from khod.errors import ConfigError, Exit
from khod.producers import directory
from khod.producers.children import Children
from khod.producers.directory import Directory
from khod.producers.hooks import Hook
from tests.unit.khods import REPOSITORY


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "etc/kho/khod.toml.d").mkdir(parents=True)
    (tmp_path / "etc/kho/producers.d").mkdir()
    return tmp_path


def main(root: Path, text: str) -> Path:
    path = root / "etc/kho/khod.toml"
    path.write_text(text)
    return path


def test_no_file_is_the_defaults(tmp_path: Path) -> None:
    assert config.load_config(tmp_path) == Config()


def test_fragments_come_by_name_after_the_main_file_and_the_last_wins(root: Path) -> None:
    main(root, "[deadlines]\nfreeze = 1\nload = 1\nactivate = 1\n")
    (root / "etc/kho/khod.toml.d/20-b.toml").write_text("[deadlines]\nfreeze = 3\n")
    (root / "etc/kho/khod.toml.d/10-a.toml").write_text("[deadlines]\nfreeze = 2\nload = 2.5\n")
    (root / "etc/kho/khod.toml.d/30-c.toml.disabled").write_text("[deadlines]\nfreeze = 4\n")
    deadlines = config.load_config(root).deadlines
    assert (deadlines.freeze, deadlines.load, deadlines.activate) == (3.0, 2.5, 1.0)
    assert deadlines.prepare == Config().deadlines.prepare


WRONG = [
    ("[polcy]\n", 1, "polcy"),
    ("\n\npolicy = 3\n", 3, "policy"),
    ("# a comment\n[policy]\n\nafter_daemon_dead = 'resume'\n", 4, "after_daemon_dead"),
    ("[policy]\nafter_daemon_died = 'restart'\n", 2, "after_daemon_died"),
    ("[images]\nrequire = 'signed'\n", 2, "images.require"),
    ("[images]\nrequire_initrd = ''\n", 2, "images.require_initrd"),
    ("[images]\nsha256 = '00'\n", 2, "images.sha256"),
    ("[images]\n\nsha256 = ['%s', 'sha256:00']\n" % ("0" * 64), 3, "'sha256:00'"),
    ("[policy]\nafter_daemon_died = true\n", 2, "after_daemon_died"),
    ("[policy]\nmax_failed_activations = '3'\n", 2, "max_failed_activations"),
    ("[policy]\nmax_failed_activations = true\n", 2, "max_failed_activations"),
    ("[policy]\nmax_failed_activations = 1.5\n", 2, "max_failed_activations"),
    ("[policy]\nmax_failed_activations = 0\n", 2, "max_failed_activations"),
    ("[access]\ngroup = ['kho']\n", 2, "group"),
    ("[policy]\n[deadlines]\nfreeze = -1\n", 3, "freeze"),
    ("[deadlines]\nfreeze = 0\n", 2, "freeze"),
    ("[deadlines]\nfreeze = nan\n", 2, "freeze"),
    ("[deadlines]\nfreeze = 2026-01-01\n", 2, "freeze"),
    ("[deadlines]\n'freez' = 1\n", 2, "freez"),
    ("[deadlines.freeze]\n", 1, "freeze"),
    ("[[policy]]\n", 1, "policy"),
    ("freeze = 1\n", 1, "freeze"),
    ("[deadlines]\nfreeze = \n", 2, ""),
    ("[deadlines]\nfreeze = 1\nfreeze = 2\n", 3, ""),
]


@pytest.mark.parametrize(("text", "line", "key"), WRONG, ids=[text.replace("\n", " ") for text, *_rest in WRONG])
def test_what_is_wrong_is_named_with_file_and_line(root: Path, text: str, line: int, key: str) -> None:
    path = main(root, text)
    with pytest.raises(ConfigError) as raised:
        config.load_config(root)
    assert raised.value.where == f"{path}:{line}"
    assert key in raised.value.what
    assert raised.value.exit is Exit.usage


def test_a_wrong_key_in_a_fragment_names_the_fragment(root: Path) -> None:
    main(root, "[policy]\nmax_failed_activations = 2\n")
    path = root / "etc/kho/khod.toml.d/10-local.toml"
    path.write_text("[policy]\nmax_failed = 2\n")
    with pytest.raises(ConfigError) as raised:
        config.load_config(root)
    assert raised.value.where == f"{path}:2"
    assert "max_failed_activations" in raised.value.remedy, "what is known here"


def test_files_that_cannot_be_read(root: Path) -> None:
    path = main(root, "")
    path.write_bytes(b"[policy]\n# \xff\n")
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        config.load_config(root)
    path.unlink()
    path.mkdir()
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        config.load_config(root)


@pytest.mark.parametrize("name", ["khod.toml", "khod.toml.d/10-local.toml"])
@pytest.mark.parametrize("target", ["/nonexistent", "10-local.toml", "khod.toml"])
def test_a_link_that_leads_nowhere_is_not_the_defaults(root: Path, name: str, target: str) -> None:
    path = root / "etc/kho" / name
    path.unlink(missing_ok=True)
    path.symlink_to(target)
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        config.load_config(root)


def test_the_shipped_file_has_every_key_with_its_default_and_a_sentence() -> None:
    text = (REPOSITORY / "etc/kho/khod.toml").read_text()
    sections = {field.name for field in dataclasses.fields(Config)}
    keys: dict[str, dict[str, object]] = {}
    section, explained = "", False
    for line in text.splitlines():
        if header := re.fullmatch(r"\[(\w+)\]", line.strip()):
            section = header[1]
            keys[section] = {}
            explained = False
        elif setting := re.fullmatch(r"#?\s?(\w+ = \S.*)", line.strip()):
            assert explained, f"{line} has no sentence above it"
            keys[section] |= tomllib.loads(setting[1])
        else:
            explained = line.startswith("#") or (explained and bool(line.strip()))
    assert keys.keys() == sections
    assert keys == json.loads(json.dumps(dataclasses.asdict(Config())))


def test_a_producer_is_read_with_all_its_keys(root: Path) -> None:
    (root / "etc/kho/producers.d/vm.toml").write_text(
        'prepare = ["/bin/a", "b c"]\nthaw = ["/bin/t"]\ntimeout = 3\nafter = ["net"]\nbefore = ["disk"]\n'
    )
    (hook,) = directory.load_directory(root, Children())
    assert (hook.name, hook.timeout, hook.after, hook.before) == ("vm", 3.0, ("net",), ("disk",))
    assert isinstance(hook, Hook)
    assert hook.commands == {"prepare": ["/bin/a", "b c"], "thaw": ["/bin/t"]}


def test_a_producer_s_file_is_read_again_when_it_has_changed(root: Path) -> None:
    found, path = Directory(root, Children()), root / "etc/kho/producers.d/vm.toml"
    assert found.load_producers() == []
    path.write_text("timeout = 3\n")
    assert [producer.timeout for producer in found.load_producers()] == [3.0]
    assert found.load_producers()[0] is found.load_producers()[0], "nothing has changed"
    path.write_text("timeout = 30\n")
    assert [producer.timeout for producer in found.load_producers()] == [30.0]
    path.write_text("timeout = 0\n")
    for _again in range(2):
        with pytest.raises(ConfigError):
            found.load_producers()
    path.unlink()
    assert found.load_producers() == []


WRONG_PRODUCERS = [
    'prepare = "/bin/a"\n',
    "prepare = []\n",
    "prepare = [1]\n",
    'prepare = [""]\n',
    'prepair = ["/bin/a"]\n',
    'timeout = "3"\n',
    "timeout = 0\n",
    "timeout = nan\n",
    "timeout = true\n",
    'after = "net"\n',
    'thaw = ["/bin/echo", "a\\u0000b"]\n',
    'after = ["a\\u0000b"]\n',
    "timeout = inf\n",
    f"timeout = 1{'0' * 400}\n",
    f"timeout = 1{'0' * 5000}\n",
    f"after = {'[' * 5000}\n",
    "#" * ((1 << 20) + 1),
    "= 3\n",
]


@pytest.mark.parametrize("text", WRONG_PRODUCERS)
def test_a_wrong_producer_names_its_file(root: Path, text: str) -> None:
    path = root / "etc/kho/producers.d/vm.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        directory.load_directory(root, Children())
    assert raised.value.where.startswith(str(path))


@pytest.mark.timeout(30)
def test_a_producer_s_file_that_is_none_names_itself(root: Path) -> None:
    """A FIFO would hold whoever opens it, for ever."""
    path = root / "etc/kho/producers.d/vm.toml"
    for make in (os.mkfifo, Path.mkdir):
        make(path)
        with pytest.raises(ConfigError) as raised:
            directory.load_directory(root, Children())
        assert raised.value.where == str(path)
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize("name", ["v m", "ä", "x" * 65, "systemd", ".x", "-x"])
def test_a_producer_s_name_is_plain(root: Path, name: str) -> None:
    (root / f"etc/kho/producers.d/{name}.toml").write_text("")
    with pytest.raises(ConfigError):
        directory.load_directory(root, Children())


@pytest.mark.parametrize("name", ["nowhere", "../secret", "a/b"])
def test_a_profile_is_a_name_in_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "handover.d").mkdir()
    monkeypatch.setenv(profile.ENVIRONMENT, str(tmp_path / "handover.d"))
    (tmp_path / "secret.toml").write_text('image = "/x"\n')
    with pytest.raises(ConfigError):
        profile.load_profile(name)


def test_a_configuration_that_would_never_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "etc/kho").mkdir(parents=True)
    os.mkfifo(tmp_path / "etc/kho/khod.toml")
    with pytest.raises(ConfigError, match="FIFO") as raised:
        config.load_config(tmp_path)
    assert raised.value.where == str(tmp_path / "etc/kho/khod.toml")


LOADERS = [config.load_config, lambda root: directory.load_directory(root, Children())]


@pytest.mark.parametrize("load", LOADERS)
def test_a_directory_of_files_that_is_none_is_named(root: Path, load: Callable[[Path], object]) -> None:
    for name in ("khod.toml.d", "producers.d"):
        (root / "etc/kho" / name).rmdir()
        (root / "etc/kho" / name).write_text("a file")
    with pytest.raises(ConfigError, match="cannot be read: ENOTDIR"):
        load(root)


@pytest.mark.parametrize("load", LOADERS)
def test_an_editor_s_lock_is_no_file_of_a_directory(root: Path, load: Callable[[Path], object]) -> None:
    for name in ("khod.toml.d", "producers.d"):
        (root / "etc/kho" / name / ".#x.toml").symlink_to("user@host.4711:1700000000")
    load(root)
