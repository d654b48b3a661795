# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl config: what khod would refuse is found without it, in every file; each value is shown with its source."""

import json
import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import pytest

from khod import files
from khod.config import Config, list_settings, load_config
from khod.errors import ConfigError
from tests.unit.khods import NOBODY, REPOSITORY, Answer
from tests.unit.khods import cli as run_khoctl

ETC = "etc/kho"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / ETC).mkdir(parents=True)
    return tmp_path


def write(root: Path, name: str, text: str) -> Path:
    path = root / ETC / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def config(*words: str) -> Answer:
    return run_khoctl(Path("/nonexistent"), "config", *words)


def check(root: Path, *words: str) -> Answer:
    return config("check", "--root", str(root), "--json", *words)


def problems(answer: Answer, severity: str = "error") -> list[dict[str, Any]]:
    return [one for one in answer.json["problems"] if one["severity"] == severity]


FAULTS = [
    ("khod.toml", "[deadlines]\nfreez = 1\n", 2, "`deadlines.freeze`"),
    ("khod.toml", "[deadline]\nfreeze = 1\n", 1, "`deadlines`"),
    ("khod.toml", "deadlines.freez = 1\n", 1, "`deadlines.freeze`"),
    ("khod.toml", "# two\ndeadlines = { freeze = 1, lod = 2 }\n", 2, "`deadlines.load`"),
    ("khod.toml", "[ deadlines ]\n'freeze' = 'soon'\n", 2, "a number"),
    ("khod.toml.d/10-site.toml", "[policy]\nunknown_format = 'ignore'\n", 2, "refuse, warn"),
    ("producers.d/db.toml", 'prepare = ["true"]\n\ntimeot = 3\n', 3, "`timeout`"),
    ("producers.d/db.toml", "freeze = 'true'\n", 1, "a list of texts"),
    ("producers.d/db.toml", 'prepare = ["true"]\ntimeout = -1\n', 2, "positive"),
    ("vm.d/one.toml", 'timeout = 1\ncomand = ["qemu-system-x86_64"]\n', 2, "`command`"),
    ("verify.d/web.toml", 'command = ["true"]\nned = "wanted"\n', 2, "`need`"),
    ("handover.d/nightly.toml", "\n[hooks]\nbefor = ['true']\n", 3, "`hooks.before`"),
    ("fleetlock.toml", 'url = "https://lock.example"\ngrup = "workers"\n', 2, "`group`"),
]


@pytest.mark.parametrize(("name", "text", "line", "remedy"), FAULTS, ids=[f"{one[0]} {one[1]!r}" for one in FAULTS])
def test_a_fault_is_named_with_file_line_and_remedy(root: Path, name: str, text: str, line: int, remedy: str) -> None:
    path = write(root, name, text)
    for answer in (check(root), check(root, str(path))):
        assert answer.code == ConfigError.exit
        assert not answer.json["valid"]
        (found,) = problems(answer)
        assert found["where"] == f"{path}:{line}"
        assert remedy in found["remedy"]


def test_every_fault_is_found_at_once(root: Path) -> None:
    write(root, "khod.toml", "[deadlines]\nfreez = 1\nlod = 1\n[polcy]\n")
    write(root, "khod.toml.d/a.toml", "not TOML")
    write(root, "producers.d/a.toml", "prepare = 1\n")
    write(root, "producers.d/b.toml", "prepare = 2\n")
    answer = check(root)
    assert len(problems(answer)) == 6
    assert len(answer.json["files"]) == 4


def test_the_order_of_producers_and_machines_is_checked(root: Path) -> None:
    write(root, "producers.d/db.toml", 'prepare = ["true"]\nafter = ["one"]\n')
    command = '["qemu-system-x86_64", "-name", "one", "-m", "64"]'
    write(root, "vm.d/one.toml", f'command = {command}\nafter = ["db"]\n')
    (found,) = problems(check(root))
    assert "cycle" in found["what"]


def test_what_is_only_suspicious_is_a_warning(root: Path) -> None:
    write(root, "producers.d/db.toml", 'prepare = ["/nonexistent/prepare"]\n')
    write(root, "verify.d/web.toml", 'command = ["/nonexistent/look"]\n')
    write(root, "handover.d/nightly.toml", 'image = "/nonexistent/vmlinuz"\n')
    group = write(root, "khod.toml", '[access]\ngroup = "no-such-group"\n')
    answer = check(root)
    assert answer.code == 0
    assert [one["what"].count("/nonexistent") for one in problems(answer, "warning")] == [1, 1, 1]
    answer = config("check", "--json", str(group))
    (found,) = problems(answer, "warning")
    assert (answer.code, found["where"]) == (0, f"{group}:2")


SAMPLES = sorted((REPOSITORY / ETC).rglob("*.sample"))


def test_keys_are_checked(root: Path) -> None:
    """Where one file is damaged, khod takes no signature at all."""
    write(root, "khod.toml", "[images]\nrequire = 'signature'\n")
    (warning,) = problems(check(root), "warning")
    assert "no keys in /etc/kho/keys.d" in warning["what"]
    assert warning["where"] == f"{root / ETC}/khod.toml:2"
    damaged = [write(root, f"keys.d/{name}", "damaged") for name in ("a.asc", "b.gpg", "c.pub")]
    write(root, "keys.d/README", "Keys that we trust.")
    answer = check(root)
    assert [one["where"] for one in problems(answer)] == [*map(str, damaged)]
    assert problems(answer, "warning") == []
    assert [problems(check(root, str(path)))[0]["where"] for path in damaged] == [*map(str, damaged)]


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_sample_is_valid(sample: Path) -> None:
    answer = config("check", "--json", str(sample))
    assert problems(answer) == []
    assert answer.json["files"] == [str(sample)]


EARLIER = (REPOSITORY / "tests/unit/corpus/config-keys.txt").read_text().split()


def test_a_key_that_was_known_once_is_known_or_has_a_word_of_its_own() -> None:
    """At a release, the keys of that version are added to the file."""
    assert EARLIER
    assert set(EARLIER) <= list_settings(Config()).keys() | {key for subject, key in files.FORMER_KEYS if not subject}


def test_a_directory_that_may_not_be_read_is_named(root: Path) -> None:
    """In a process of another user; root reads everything."""
    (root / ETC / "producers.d").mkdir()
    (root / ETC).chmod(0o700)
    for directory in (root, root / "etc"):
        directory.chmod(0o755)
    code = (
        "import os, sys; from khoctl.app import app; import khoctl.commands.config, tomllib, difflib\n"
        f"os.setuid({NOBODY}); app(['config', 'check', '--json', '--root', sys.argv[1]])"
    )
    with tempfile.TemporaryDirectory() as reachable:
        os.chmod(reachable, 0o755)
        place = Path(reachable, "root")
        (root).rename(place)
        ended = subprocess.run(
            [sys.executable, "-c", code, place], cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60
        )
    assert ended.returncode == ConfigError.exit, ended.stderr
    assert "EACCES" in json.loads(ended.stdout)["problems"][0]["what"]


def test_a_file_that_is_not_there_is_an_error(root: Path) -> None:
    answer = check(root, str(root / "none.toml"))
    assert answer.code == ConfigError.exit
    assert "ENOENT" in problems(answer)[0]["what"]


def test_without_files_what_is_built_in_is_valid(root: Path) -> None:
    answer = config("check", "--root", str(root))
    assert answer.code == 0
    assert "built in" in answer.out


@pytest.mark.parametrize("subject", ["", "a producer"])
def test_a_key_of_an_earlier_khod_is_told_apart(root: Path, monkeypatch: pytest.MonkeyPatch, subject: str) -> None:
    key = "deadlines.frozen" if subject == "" else "frozen"
    monkeypatch.setitem(files.FORMER_KEYS, (subject, key), "Write `freeze`.")
    if subject:
        write(root, "producers.d/db.toml", "frozen = 1\n")
    else:
        write(root, "khod.toml", "[deadlines]\nfrozen = 1\n")
    (found,) = problems(check(root))
    assert "earlier khod" in found["what"]
    assert found["remedy"] == "Write `freeze`."


def test_khod_refuses_what_the_check_refuses(root: Path) -> None:
    """And in the same words: it is one parser."""
    write(root, "khod.toml", "[deadlines]\nfreez = 1\n")
    command = [
        sys.executable,
        "-m",
        "khod",
        f"--root={root}",
        f"--state={root / 'state'}",
        f"--socket={root / 'socket'}",
    ]
    command.append(f"--simulate={root / 'kernel'}")
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60)
    answer = config("check", "--root", str(root))
    assert ended.returncode == answer.code == ConfigError.exit
    assert answer.out.splitlines()[0].removeprefix("FAIL  ") in ended.stderr


# show


def test_each_value_has_its_source(root: Path) -> None:
    main = write(root, "khod.toml", "[deadlines]\nfreeze = 1\nload = 2\n")
    write(root, "khod.toml.d/10-a.toml", "[deadlines]\nfreeze = 2\n")
    last = write(root, "khod.toml.d/20-b.toml", "# the last one wins\ndeadlines.freeze = 3\n")
    found = {one["key"]: one for one in config("show", "--root", str(root), "--json").json}
    assert found["deadlines.freeze"] == {
        "key": "deadlines.freeze",
        "value": 3.0,
        "default": 10.0,
        "where": f"{last}:2",
    }
    assert found["deadlines.load"]["where"] == f"{main}:3"
    assert found["deadlines.prepare"]["where"] == "built in"
    assert found.keys() == list_settings(Config()).keys()


def test_the_page_is_toml_that_means_the_same(root: Path) -> None:
    write(root, "khod.toml", '[quiesce]\nkeep = ["a\\"b.service", "naïve.service"]\n[policy]\nrequire_state = true\n')
    before = load_config(root)
    page = config("show", "--root", str(root)).out
    assert tomllib.loads(page)["quiesce"]["keep"] == list(before.quiesce.keep)
    write(root, "khod.toml", page)
    assert load_config(root) == before


def test_one_table_or_key(root: Path) -> None:
    write(root, "khod.toml", "")
    assert tomllib.loads(config("show", "deadlines.freeze", "--root", str(root)).out) == {"deadlines": {"freeze": 10.0}}
    assert tomllib.loads(config("show", "guard", "--root", str(root)).out).keys() == {"guard"}
    answer = config("show", "deadlines.freez", "--root", str(root))
    assert answer.code == 2
    assert "deadlines.freez" in answer.err


def test_show_refuses_what_khod_refuses(root: Path) -> None:
    path = write(root, "khod.toml", "[deadlines]\nfreez = 1\n")
    answer = config("show", "--root", str(root), "--json")
    assert answer.code == ConfigError.exit
    assert json.loads(answer.out)["where"] == f"{path}:2"
