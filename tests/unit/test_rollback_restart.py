# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod dies in the middle, and the next one finds its files broken or nobody to tell: it puts back all the same."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from khod.errors import Exit
from khod.model import Phase
from tests.unit.khods import Khod, until

WRONG = {
    "unknown key": b"[policy]\nrequire_stat = true\n",
    "not TOML": b"[policy\n",
    "wrong type": b'[deadlines]\nrollback = "soon"\n',
    "not UTF-8": b"\xff\xfe",
}


class Place:
    """A directory for khods, one after the other, with producers that are frozen while a file of theirs is there."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.hooks = directory / "root/etc/kho/producers.d"
        self.hooks.mkdir(parents=True)
        self.config = directory / "root/etc/kho/khod.toml"
        self.khods: list[Khod] = []

    def hook(self, name: str) -> Path:
        frozen = self.directory / f"{name}-frozen"
        text = f'freeze = ["touch", "{frozen}"]\nthaw = ["rm", "{frozen}"]\n'
        (self.hooks / f"{name}.toml").write_text(text)
        return frozen

    def khod(self, *, ready: bool = True) -> Khod:
        self.khods.append(Khod(self.directory, ready=ready))
        return self.khods[-1]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    for khod in made.khods:
        khod.close()


@pytest.mark.parametrize("wrong", WRONG)
def test_a_configuration_that_is_wrong_after_a_crash_keeps_nobody_frozen(place: Place, wrong: str) -> None:
    """It ends with 2, which systemd does not start again: before that, everything is put back."""
    frozen = place.hook("a")
    khod = place.khod()
    assert khod.khoctl("activate").code == Exit.done
    khod.end(signal.SIGKILL)
    place.config.write_bytes(WRONG[wrong])
    khod = place.khod(ready=False)
    assert khod.process.wait(20) == Exit.usage
    assert str(place.config) in khod.errors.read_text()
    assert not khod.active
    assert not frozen.exists()
    assert khod.record.phase is Phase.idle


def test_with_a_wrong_configuration_what_cannot_be_put_back_is_still_served(place: Place) -> None:
    """And nothing new begins until the configuration is mended."""
    place.hook("a")
    khod = place.khod()
    assert khod.khoctl("activate").code == Exit.done
    khod.end(signal.SIGKILL)
    place.config.write_bytes(WRONG["unknown key"])
    khod.kernel.set_fault("abort_errno", 16)
    khod = place.khod()
    status = khod.khoctl("status", "--json").json
    assert (status["phase"], status["left"]) == ("failed", ["activate"])
    khod.kernel.set_fault("abort_errno", None)
    assert khod.khoctl("abort").code == Exit.done
    assert not khod.active
    refused = khod.khoctl("activate")
    assert refused.code == Exit.usage
    assert "require_stat" in refused.err
    place.config.write_bytes(b"")
    khod.process.send_signal(signal.SIGHUP)
    khod.word("READY=1")
    assert khod.khoctl("activate").code == Exit.done


BROKEN = {
    "not TOML": "freeze = [",
    "unknown key": 'freez = ["true"]\n',
    "not a list": 'freeze = "true"\n',
    "two kinds": 'unit = "a.service"\nfreeze = ["true"]\n',
    "gone": None,
}


@pytest.mark.parametrize("broken", BROKEN)
def test_one_producer_s_file_that_is_broken_keeps_no_other_frozen(place: Place, broken: str) -> None:
    first, second, third = map(place.hook, ("a", "b", "c"))
    khod = place.khod()
    assert khod.khoctl("activate").code == Exit.done
    khod.end(signal.SIGKILL)
    text = BROKEN[broken]
    if text is None:
        (place.hooks / "b.toml").unlink()
    else:
        (place.hooks / "b.toml").write_text(text)
    khod = place.khod()
    assert [path.exists() for path in (first, second, third)] == [False, True, False]
    status = khod.khoctl("status", "--json").json
    assert (status["phase"], status["exit_code"]) == ("failed", Exit.not_rolled_back)
    assert {item["producer"] for item in status["not_undone"]} == {"b"}
    place.hook("b")
    assert khod.khoctl("abort").code == Exit.done
    assert not second.exists()


def test_a_file_that_makes_a_cycle_after_a_crash_keeps_nobody_frozen(place: Place) -> None:
    first, second = place.hook("a"), place.hook("b")
    khod = place.khod()
    assert khod.khoctl("activate").code == Exit.done
    khod.end(signal.SIGKILL)
    for name, other in (("a", "b"), ("b", "a")):
        path = place.hooks / f"{name}.toml"
        path.write_text(f'after = ["{other}"]\n{path.read_text()}')
    khod = place.khod()
    assert not first.exists()
    assert not second.exists()
    assert khod.khoctl("status", "--json").json["phase"] == "idle"


@pytest.mark.parametrize("how", ["abort", "stop", "start"])
def test_a_service_manager_that_does_not_hear_keeps_nobody_frozen(place: Place, how: str) -> None:
    """No descriptor is left, or the socket is gone: sd_notify(3) fails at every word."""
    frozen = place.hook("a")
    khod = place.khod()
    assert khod.khoctl("activate").code == Exit.done
    (place.directory / "notify").unlink()
    if how == "abort":
        assert khod.khoctl("abort").code == Exit.done
    elif how == "stop":
        assert khod.end(signal.SIGTERM) == Exit.done
    else:
        khod.end(signal.SIGKILL)
        khod = place.khod(ready=False)
        (place.directory / "notify").unlink()
    until(lambda: not khod.active and not frozen.exists(), khod.process if how == "start" else None)
