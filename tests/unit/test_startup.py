# SPDX-License-Identifier: LGPL-2.1-or-later
"""When hooks may run: kho-hooks.service has started, or cannot start; and what is waited for before that."""

import asyncio
from pathlib import Path

import pytest

from khod.systemd import dbus, startup
from tests.unit.fakebus import SYSTEMD, FakeBus, Refusal, fake_bus, unit

ASKED = f"StartUnit {startup.HOOKS_UNIT} fail"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(dbus, "PRIVATE_SOCKET", str(tmp_path / "private"))
    return tmp_path / "private"


async def waited(bus: FakeBus) -> list[str]:
    await startup.wait_hooks_unit()
    return [call for call in bus.said if call.startswith("StartUnit")]


async def test_its_start_is_waited_for(place: Path) -> None:
    async with fake_bus(place, **{"kho-hooks": unit()}) as bus:
        assert await waited(bus) == [ASKED]


async def test_where_it_is_not_there_nothing_is_waited_for(place: Path) -> None:
    async with fake_bus(place) as bus:
        assert await waited(bus) == [ASKED]


async def test_a_shutdown_that_refuses_its_start_is_not_waited_for(place: Path) -> None:
    async with fake_bus(place, **{"kho-hooks": unit()}) as bus:
        bus.instead["StartUnit"] = Refusal(f"{SYSTEMD}.TransactionIsDestructive", "a shutdown is under way")
        assert await waited(bus) == [ASKED]


async def test_a_systemd_that_starts_anew_is_asked_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dbus, "RECONNECT_SECONDS", 0.0)
    async with fake_bus(place, **{"kho-hooks": unit()}) as bus:
        bus.result = None
        waiting = asyncio.ensure_future(waited(bus))
        await bus.reached.wait()
        bus.result = "done"
        bus.reexec()
        assert await waiting == [ASKED, ASKED]


async def wait_early(monkeypatch: pytest.MonkeyPatch, bus: FakeBus, *answers: bool) -> list[str]:
    """Give the jobs that were asked for, where what the unit brings is there by these answers."""
    left = [*answers]
    monkeypatch.setattr(startup, "EARLY_UNITS", {"early.mount": lambda: left.pop(0)})
    await startup.wait_early_units()
    assert left == []
    return [call for call in bus.said if call.startswith("StartUnit")]


async def test_what_is_there_already_asks_nobody(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with fake_bus(place) as bus:
        assert await wait_early(monkeypatch, bus, True) == []


async def test_what_is_not_there_is_waited_for_by_its_unit(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with fake_bus(place, early=unit()) as bus:
        assert await wait_early(monkeypatch, bus, False, True) == ["StartUnit early.mount fail"]


async def test_what_never_comes_is_named(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with fake_bus(place) as bus:
        await wait_early(monkeypatch, bus, False, False)
    assert "without what early.mount brings" in caplog.text
