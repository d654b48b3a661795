# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who blocks a shutdown: asked of logind once for everyone, and in words that are fit for a terminal."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from khod.systemd import logind as inhibitors
from khod.systemd.logind import Inhibitor
from tests.unit.fakebus import FakeBus, fake_bus
from tests.unit.harness import Host

CHECKS = 64  # access.max_connections_per_user: as many as one user may ask at a time
WHY = "x\x1b[2J\x1b]0;owned\x07\x1b[8m)\npass  signature  vmlinuz is signed"


def blocks(who: str, why: str = "", what: str = "shutdown:sleep", mode: str = "block") -> tuple[Any, ...]:
    return (what, who, why, mode, 1000, 1)


@asynccontextmanager
async def logind(path: Path, monkeypatch: pytest.MonkeyPatch, *listed: tuple[Any, ...]) -> AsyncIterator[FakeBus]:
    """A bus with a logind that lists these, as the system's."""
    monkeypatch.setattr(inhibitors, "KEPT", str(path))
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={path / 'bus'}")
    async with fake_bus(path / "bus") as bus:
        bus.inhibitors = list(listed)
        yield bus


async def test_who_blocks_a_shutdown_is_told_and_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = blocks("delays", mode="delay"), blocks("sleeps", what="sleep:idle")
    async with logind(tmp_path, monkeypatch, blocks("apt", "upgrading"), *others):
        assert await inhibitors.shutdown_inhibitors() == [Inhibitor("apt", "upgrading")]


async def test_a_shutdown_that_logind_has_taken_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for programs with `delay` locks, and systemd knows nothing of it yet."""
    assert not await inhibitors.is_shutting_down(), "there is no logind"
    async with logind(tmp_path, monkeypatch) as bus:
        bus.instead["Get"] = "v", (("b", False),)
        assert not await inhibitors.is_shutting_down()
        bus.instead["Get"] = "v", (("b", True),)
        assert await inhibitors.is_shutting_down()
        bus.instead["Get"] = asyncio.Event()
        monkeypatch.setattr(inhibitors, "ASKING", 0.05)
        assert await inhibitors.is_shutting_down() is None, "it does not answer"


async def test_many_checks_at_a_time_are_one_connection_to_the_bus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any user may have checks made; the bus bounds root's connections, and units are thawed over it."""
    (tmp_path / "host").mkdir()
    host = Host(tmp_path / "host")
    engine = await host.started()
    monkeypatch.setattr(engine, "_inhibitors", inhibitors.shutdown_inhibitors)
    async with logind(tmp_path, monkeypatch, blocks("apt")) as bus:
        goes_on = asyncio.Event()
        bus.instead["ListInhibitors"] = goes_on
        checks = [asyncio.ensure_future(engine.queries.check()) for _ in range(CHECKS)]
        await bus.reached.wait()
        assert bus.open == 1
        goes_on.set()
        for answer in await asyncio.gather(*checks):
            assert any("apt" in check.evidence for check in answer if check.name == "inhibitors")
        assert bus.said.count("ListInhibitors") == 1


async def test_an_answer_counts_for_a_moment_and_no_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with logind(tmp_path, monkeypatch) as bus:
        for _ in range(2):
            assert await inhibitors.shutdown_inhibitors() == []
        assert bus.said.count("ListInhibitors") == 1
        monkeypatch.setattr(inhibitors, "CACHE_SECONDS", 0.0)
        bus.inhibitors = [blocks("apt")]
        assert await inhibitors.shutdown_inhibitors() == [Inhibitor("apt", "")]


async def test_whoever_gives_up_waiting_does_not_end_the_question_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with logind(tmp_path, monkeypatch, blocks("apt")) as bus:
        goes_on = asyncio.Event()
        bus.instead["ListInhibitors"] = goes_on
        first, second = (asyncio.ensure_future(inhibitors.shutdown_inhibitors()) for _ in range(2))
        await bus.reached.wait()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        goes_on.set()
        assert await second == [Inhibitor("apt", "")]


async def test_an_inhibitors_words_are_one_line_that_is_fit_for_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any user of an active session may block, and names himself."""
    async with logind(tmp_path, monkeypatch, blocks("mallory\x1b[2J", WHY)):
        found = await inhibitors.shutdown_inhibitors()
    assert found is not None
    assert all(text.isprintable() for inhibitor in found for text in (inhibitor.who, inhibitor.why))
    assert "signature" in found[0].why, "it is made fit, not left out"


async def test_how_many_are_told_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with logind(tmp_path, monkeypatch, *(blocks(f"user-{number}", "x" * 1000) for number in range(1000))):
        found = await inhibitors.shutdown_inhibitors()
    assert found is not None
    assert len(found) == inhibitors.MAX_INHIBITORS
    assert sum(len(inhibitor.why) for inhibitor in found) < 1000 * inhibitors.MAX_INHIBITORS
