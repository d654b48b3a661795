# SPDX-License-Identifier: LGPL-2.1-or-later
"""Profiles: what `khoctl kexec` would be given, under the names of its options."""

import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from khoctl import profile, request
from khoctl.next_kernel import NextKernelOptions
from khod.errors import ConfigError, Refused, UsageError
from tests.unit.khods import REPOSITORY


def load(directory: Path, text: str) -> dict[str, Any]:
    """What a profile says by its keys, less what is left out or off."""
    (directory / "next.toml").write_text(text)
    found = profile.load_profile("next", directory)
    said = {key: value for key, value in asdict(found.options).items() if value not in (None, False)}
    return said | dict.fromkeys(found.flags, True)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('initrd = "a"', {"initrd": ["a"]}),
        ('initrd = ["a", "b"]', {"initrd": ["a", "b"]}),
        ('remove = "quiet"\nentry = "x"', {"remove": ["quiet"], "entry": "x"}),
        ('kernel = "7.3.4"\nreuse_cmdline = true', {"kernel": "7.3.4", "reuse_cmdline": True}),
        ('default = false\nimage = "/i"\ncmdline = ""', {"image": "/i", "cmdline": ""}),
    ],
)
def test_every_key_has_its_type(tmp_path: Path, text: str, found: dict[str, Any]) -> None:
    assert load(tmp_path, text) == found


@pytest.mark.parametrize("text", ["initrd = 1", "initrd = [1]", "remove = true", "default = 'x'", "kernel = 6.12"])
def test_another_type_is_an_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=f"`{text.split(maxsplit=1)[0]}`"):
        load(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ('image = "/i"\nentry = "x"', ("image", "entry")),
        ('default = true\nkernel = "6.12"', ("default", "kernel")),
        ('cmdline = ""\nreuse_cmdline = true', ("cmdline", "reuse_cmdline")),
    ],
)
def test_keys_that_contradict_each_other_are_named(tmp_path: Path, text: str, keys: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match=f"`{keys[0]}` and `{keys[1]}`") as raised:
        load(tmp_path, text)
    assert raised.value.where == str(tmp_path / "next.toml")


def test_a_profile_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as none:
        profile.load_profile("nosuch", tmp_path)
    assert (none.value.what, none.value.where) == ("There is no profile 'nosuch'", str(tmp_path / "nosuch.toml"))
    assert str(tmp_path) in none.value.remedy
    for name in ("b", "a"):
        (tmp_path / f"{name}.toml").write_text("")
    with pytest.raises(ConfigError) as some:
        profile.load_profile("nosuch", tmp_path)
    assert some.value.remedy == "There are: a, b."


def test_the_sample_is_a_profile_and_shows_every_key(tmp_path: Path) -> None:
    text = (REPOSITORY / "etc/kho/handover.d/example.toml.sample").read_text()
    assert load(tmp_path, text) == {
        key: [value] if profile.KEYS[key] is list else value for key, value in tomllib.loads(text).items() if value
    }
    shown = {line.lstrip("#").partition(" = ")[0] for line in text.splitlines()}
    assert profile.KEYS.keys() <= shown


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        (("now",), {"now": True}),
        (("now", "load_only"), {"now": True, "load_only": True}),
        (("now", "load_only", "hold"), {"now": True, "load_only": True, "hold": True}),
    ],
)
def test_a_command_takes_of_a_profile_what_it_has_options_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], flags: dict[str, bool]
) -> None:
    """check, plan and kexec: khod refuses a parameter that its method does not have."""
    (tmp_path / "next.toml").write_text("now = true\nload_only = true\nhold = true\n")
    found = profile.load_profile("next", tmp_path)
    monkeypatch.setattr(profile, "load_profile", lambda _name: found)
    with request.open_request(NextKernelOptions(), "next", **dict.fromkeys(options, False)) as made:
        assert made == (flags, ())


def test_an_empty_value_on_the_command_line_wins_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = tmp_path / "vmlinuz"
    image.write_bytes(b"x")
    (tmp_path / "next.toml").write_text(f'image = "{image}"\ncmdline = "root=/dev/vda"\nappend = "quiet"\n')
    found = profile.load_profile("next", tmp_path)
    monkeypatch.setattr(profile, "load_profile", lambda _name: found)
    with request.open_request(NextKernelOptions(cmdline="", append=""), "next") as (parameters, _):
        assert (parameters["kernel"]["cmdline"], parameters["kernel"]["append"]) == ("", "")


@pytest.mark.parametrize("way", ["image", "entry", "kernel"])
def test_an_empty_name_of_a_kernel_is_no_other_kernel(way: str) -> None:
    """Not the default entry, which is what a variable that is not set would come to."""
    options = NextKernelOptions(**{way: ""})  # type: ignore[arg-type]
    with pytest.raises((UsageError, Refused)), request.open_request(options, None):
        pass
