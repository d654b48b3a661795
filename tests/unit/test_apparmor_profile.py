# SPDX-License-Identifier: LGPL-2.1-or-later
"""When khod enters its AppArmor profile by itself. That the kernel then confines it is shown in the lab."""

from pathlib import Path

import pytest

from khod.kernel import apparmor


class Label:
    """The attribute of a kernel that has these profiles loaded."""

    def __init__(self, text: str = "unconfined\n", loaded: tuple[str, ...] = ("khod",)) -> None:
        self.text, self.loaded = text, loaded
        self.denials = 0

    def read(self) -> str:
        return self.text.strip()

    def write(self, text: str) -> None:
        verb, name = text.split()
        assert verb == "changeprofile"
        if name not in self.loaded:
            self.denials += 1
            raise FileNotFoundError
        self.text = f"{name} (enforce)\n"


def enter(monkeypatch: pytest.MonkeyPatch, label: Label, profile: str = "khod") -> bool:
    monkeypatch.setenv(apparmor.PROFILE_VARIABLE, profile)
    monkeypatch.setattr(apparmor, "_read_label", label.read)
    monkeypatch.setattr(apparmor, "_write_label", label.write)
    return apparmor.enter_profile()


def test_a_profile_that_is_loaded_is_entered(monkeypatch: pytest.MonkeyPatch) -> None:
    label = Label()
    assert enter(monkeypatch, label)
    assert label.text == "khod (enforce)\n"


def test_a_profile_that_is_not_loaded_may_still_come(monkeypatch: pytest.MonkeyPatch) -> None:
    label = Label(loaded=())
    assert not enter(monkeypatch, label)
    label.loaded = ("khod",)
    assert enter(monkeypatch, label)


@pytest.mark.parametrize(("listed", "denials"), [("khod2 (enforce)\nkhod//child (enforce)\n", 0), (None, 1)])
def test_a_try_that_would_be_denied_is_not_made_where_that_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: str | None, denials: int
) -> None:
    """Each is an audit line, and somebody's alarm."""
    profiles = tmp_path / "profiles"
    if listed is not None:
        profiles.write_text(listed)
    monkeypatch.setattr(apparmor, "PROFILES", str(profiles))
    label = Label(loaded=())
    assert not enter(monkeypatch, label)
    assert label.denials == denials
    profiles.write_text("khod (enforce)\n")
    label.loaded = ("khod",)
    assert enter(monkeypatch, label)


def test_one_that_systemd_has_confined_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    label = Label("other (enforce)\n")
    assert enter(monkeypatch, label)
    assert label.text == "other (enforce)\n"


def test_where_the_unit_names_none_khod_stays_unconfined(monkeypatch: pytest.MonkeyPatch) -> None:
    label = Label()
    assert enter(monkeypatch, label, profile="")
    assert label.text == "unconfined\n"


def test_a_kernel_without_the_attribute_has_nothing_to_wait_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(apparmor.PROFILE_VARIABLE, "khod")
    monkeypatch.setattr(apparmor, "LABEL", str(tmp_path / "gone"))
    assert apparmor.enter_profile()
