# SPDX-License-Identifier: LGPL-2.1-or-later
"""A producer that could not take back what it left: what status says of it, and how it is told again."""

from pathlib import Path

import pytest

from khod.engine import Engine
from khod.errors import Exit, Failed, Refused
from khod.model import Phase
from tests.unit.scripted import Does, Scripted
from tests.unit.virtual import VirtualHost, in_virtual_time


@pytest.fixture
def host(tmp_path: Path) -> VirtualHost:
    return VirtualHost(tmp_path)


def fails_while(trouble: list[str]) -> Does:
    """Fail as long as something stands in `trouble`."""

    async def tell() -> None:
        if trouble:
            raise Failed(trouble[0])

    return tell


async def degraded(host: VirtualHost, trouble: list[str], verb: str) -> Engine:
    """A boot in which `cache` has its state again, and `db` said no to this verb."""
    Scripted(host, "cache", restores=True)
    Scripted(host, "db", restores=True).does[verb] = fails_while(trouble)
    await host.jump()
    engine = await host.started()
    await host.seen(lambda event: event.phase is Phase.degraded)
    return engine


@pytest.mark.parametrize("verb", ["restore", "finish"])
@in_virtual_time
async def test_a_producer_is_told_again_when_its_trouble_is_mended(host: VirtualHost, verb: str) -> None:
    trouble = ["cannot import: version mismatch"]
    engine = await degraded(host, trouble, verb)

    with pytest.raises(Refused, match="cannot import"):
        await engine.retry_producer("db")
    assert (await engine.queries.status()).claims == ["db"]
    with pytest.raises(Refused, match="forget"):
        await engine.activate()

    trouble.clear()
    await engine.retry_producer("db")

    status = await engine.queries.status()
    assert (status.outcome, status.claims, status.exit_code) == (Phase.verified, [], Exit.done)
    assert host.verbs[-1] == "db finish"
    assert host.verbs.count("cache restore") == 1
    assert [(found.name, found.answer) for found in status.producers if found.name == "db"] == [("db", "ready")]
    await engine.activate()


@in_virtual_time
async def test_only_what_waits_can_be_told_again(host: VirtualHost) -> None:
    engine = await degraded(host, ["no"], "restore")
    for name in ("cache", "nobody"):
        with pytest.raises(Refused, match="left nothing"):
            await engine.retry_producer(name)


@in_virtual_time
async def test_status_says_whose_state_is_missing_and_whose_is_not(host: VirtualHost) -> None:
    """Whoever reads that everything must start from scratch would throw away what has arrived."""
    status = await (await degraded(host, ["no room"], "restore")).queries.status()
    assert "db" in status.summary.partition("arrived")[0]
    assert "cache" in status.summary.partition("arrived")[2]
    assert "khoctl producers retry" in status.remedy
    assert "scratch" not in status.remedy
