# SPDX-License-Identifier: LGPL-2.1-or-later
"""Profiles: what `khoctl kexec` would be given, under the names of its options."""

import re
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from khoctl import profile, request
from khoctl.next_kernel import NextKernelOptions
from khod.errors import ConfigError, Refused, UsageError
from khod.model import TermsDeadlines
from tests.unit.khods import REPOSITORY


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of profiles."""
    monkeypatch.setenv(profile.ENVIRONMENT, str(tmp_path))
    return tmp_path


def read(directory: Path, text: str) -> profile.Profile:
    (directory / "next.toml").write_text(text)
    return profile.load_profile("next")


def load(directory: Path, text: str) -> dict[str, Any]:
    """What a profile says by its keys, less what is left out or off."""
    found = read(directory, text)
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
        profile.load_profile("nosuch")
    assert (none.value.what, none.value.where) == ("There is no profile 'nosuch'", str(tmp_path / "nosuch.toml"))
    assert str(tmp_path) in none.value.remedy
    for name in ("b", "a"):
        (tmp_path / f"{name}.toml").write_text("")
    with pytest.raises(ConfigError) as some:
        profile.load_profile("nosuch")
    assert some.value.remedy == "There are: a, b."


@pytest.mark.parametrize("name", ["", ".", "../next", "a b", "a\n", "a" * 201, "a" * 5000])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="is not a valid name of a profile") as refused:
        profile.load_profile(name)
    assert len(refused.value.what) < 120


@pytest.mark.parametrize(("target", "said"), [("nowhere", "ENOENT"), ("next.toml", "ELOOP")])
def test_a_link_that_leads_nowhere_is_said_to_be_one(tmp_path: Path, target: str, said: str) -> None:
    (tmp_path / "next.toml").symlink_to(target)
    with pytest.raises(ConfigError, match=f"The profile cannot be read: {said}"):
        profile.load_profile("next")


def test_the_sample_is_a_profile_and_shows_every_key(tmp_path: Path) -> None:
    text = (REPOSITORY / "etc/kho/handover.d/example.toml.sample").read_text()
    assert load(tmp_path, text) == {
        key: [value] if profile.KEYS[key] is list else value for key, value in tomllib.loads(text).items() if value
    }
    shown = {line.lstrip("#").partition(" = ")[0] for line in text.splitlines()}
    assert profile.KEYS.keys() | {f"[{table}]" for table in profile.TABLES} <= shown
    assert {key for keys in profile.TABLES.values() for key in keys} <= shown


def test_what_the_sample_shows_as_a_comment_is_valid_too(tmp_path: Path) -> None:
    text = (REPOSITORY / "etc/kho/handover.d/example.toml.sample").read_text()
    shown = re.sub(r"(?m)^#(?=\[?\w+(?:\]| = ))", "", text)
    values = "".join(f"{line}\n" for line in shown.splitlines() if line.partition(" = ")[0] not in ALONE)
    found = read(tmp_path, values)
    assert found.terms == {
        "require": ["my-vmm"],
        "blackout_budget": 10.0,
        "must_pass": ["kernel", "health"],
        "tolerate": ["log"],
        "deadlines": asdict(TermsDeadlines(60.0, 10.0, 60.0, 60.0, 120.0)),
    }
    assert found.window is not None
    assert found.window.describe() == "Mon,Tue,Wed,Thu,Sun 22:00-04:00 Europe/Berlin"
    assert found.before == profile.HookCommands((("/usr/local/bin/drain",),), 300.0)


ALONE = ("entry", "default", "kernel", "cmdline", "reuse_cmdline")
"""Keys of the sample that stand there instead of others."""


@pytest.mark.parametrize(
    ("text", "what", "remedy"),
    [
        ("imgae = '/x'", "`imgae` is an unknown key of a profile", "Did you mean `image`?"),
        ("[windo]", "`windo` is an unknown key of a profile", "Did you mean `window`?"),
        ("[window]\nform = '22:00'", "`window.form` is an unknown key of a profile", "Did you mean `window.from`?"),
        ("window = 'night'", "`window` is a table", "Write [window]"),
        ("[window]\nfrom = 22", "`window.from` is 22", "a text in quotes"),
        ("[window]\nfrom = '25:00'", "`window.from` is '25:00'", "a time of day"),
        ("[window]\nfrom = '24:00'", "`window.from` is '24:00'", "a time of day"),
        ("[window]\ndays = ['Mon-Funday']", "`window.days` has 'Mon-Funday'", "Mon-Fri"),
        ("[window]\ndays = []", "`window.days` has ''", "Mon-Fri"),
        ("[window]\ntimezone = 'Mars/Base'", "`window.timezone` is 'Mars/Base'", "timedatectl"),
        ("[window]\ntimezone = '../../etc/passwd'", "`window.timezone`", "timedatectl"),
        ("blackout_budget = 0", "`blackout_budget` is 0", "It must be a number of seconds, 86400 at most"),
        ("blackout_budget = nan", "`blackout_budget` is nan", "a number"),
        ("blackout_budget = '5s'", "`blackout_budget` is '5s'", "a number"),
        ("[deadlines]\nfreeze = true", "`deadlines.freeze` is True", "a number"),
        ("[deadlines]\nrollback = 5", "`deadlines.rollback` is an unknown key", "Known here: prepare"),
        ("[hooks]\nbefore = []", "`hooks.before` is []", "a list of words"),
        ("[hooks]\nbefore = '/bin/true --x'", "`hooks.before` is '/bin/true --x'", "a list of words"),
        ("[hooks]\nafter = [['a'], 'b']", "`hooks.after`", "a list of words"),
        ("[hooks]\nafter = [['a'], []]", "`hooks.after`", "a list of words"),
        ("[verify]\ntolerate = ['kernel']", "`verify.tolerate` has 'kernel'", "log, health, boot"),
        ("[verify]\nmust_pass = ['log', 'kernal']", "`verify.must_pass` has 'kernal'", "kho, kernel, tree"),
        ("[verify]\nmust_pass = ['kernel x']", "`verify.must_pass` has 'kernel x'", "kho, kernel, tree"),
        ("sha256 = ['00']", "`sha256` has '00'", "the 64 hexadecimal digits"),
        ("sha256 = 'x'", "`sha256` has 'x'", "the 64 hexadecimal digits"),
        ("[verify]\nmust_pass = [1]", "`verify.must_pass` is [1]", "a list of texts"),
        ("require = true", "`require` is True", "a list of texts"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, text: str, what: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read(tmp_path, f"hold = false\n{text}\n")
    assert what in raised.value.what
    assert remedy in raised.value.remedy
    assert raised.value.where == f"{tmp_path / 'next.toml'}:{1 + len(text.splitlines())}"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("image = '/nowhere/vmlinuz'", "`image` of profile next names /nowhere/vmlinuz"),
        ("image = '{here}'\ninitrd = ['{here}', '/nowhere/initrd']", "`initrd` of profile next names /nowhere/initrd"),
        ("image = '{here}'\n[hooks]\nbefore = ['/nowhere/drain']", "`hooks.before` of profile next names"),
        ("image = '{here}'\n[hooks]\nafter = [['true'], ['nosuch-program']]", "`hooks.after` of profile next names"),
    ],
)
def test_files_that_are_gone_are_named_by_their_key(tmp_path: Path, text: str, named: str) -> None:
    found = read(tmp_path, text.format(here=tmp_path / "next.toml"))
    with pytest.raises(ConfigError, match=named) as raised, request.open_request(NextKernelOptions(), found):
        pass
    assert raised.value.where == f"{tmp_path / 'next.toml'}:{len(text.splitlines())}"


def test_a_file_on_the_command_line_stands_in_for_one_that_is_gone(tmp_path: Path) -> None:
    found = read(tmp_path, "image = '/nowhere/vmlinuz'")
    with request.open_request(NextKernelOptions(image=str(tmp_path / "next.toml")), found) as (parameters, _):
        assert parameters["kernel"]["image_name"] == str(tmp_path / "next.toml")


def test_the_commands_of_a_hook(tmp_path: Path) -> None:
    found = read(tmp_path, "[hooks]\nbefore = ['drain']\nafter = [['a', '-x'], ['b']]\nafter_timeout = 5\n")
    assert found.before == profile.HookCommands((("drain",),))
    assert found.after == profile.HookCommands((("a", "-x"), ("b",)), 5.0)


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        (("now",), {"now": True}),
        (("now", "load_only"), {"now": True, "load_only": True}),
        (("now", "load_only", "hold"), {"now": True, "load_only": True, "hold": True}),
    ],
)
def test_a_command_takes_of_a_profile_what_it_has_options_for(
    tmp_path: Path, options: tuple[str, ...], flags: dict[str, bool]
) -> None:
    """check, plan and kexec: khod refuses a parameter that its method does not have."""
    found = read(tmp_path, "now = true\nload_only = true\nhold = true\n")
    given: dict[str, Any] = dict.fromkeys(options, False)
    with request.open_request(NextKernelOptions(), found, **given) as made:
        assert made == (flags, ())


def test_an_empty_value_on_the_command_line_wins_too(tmp_path: Path) -> None:
    image = tmp_path / "vmlinuz"
    image.write_bytes(b"x")
    found = read(tmp_path, f'image = "{image}"\ncmdline = "root=/dev/vda"\nappend = "quiet"\n')
    with request.open_request(NextKernelOptions(cmdline="", append=""), found) as (parameters, _):
        assert (parameters["kernel"]["cmdline"], parameters["kernel"]["append"]) == ("", "")


@pytest.mark.parametrize("way", ["image", "entry", "kernel"])
def test_an_empty_name_of_a_kernel_is_no_other_kernel(way: str) -> None:
    """Not the default entry, which is what a variable that is not set would come to."""
    options = NextKernelOptions(**{way: ""})  # type: ignore[arg-type]
    with pytest.raises((UsageError, Refused)), request.open_request(options, None):
        pass
