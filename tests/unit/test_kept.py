# SPDX-License-Identifier: LGPL-2.1-or-later
"""A VM that is to be kept: khod has systemd start its khod-vm, and no handover goes without it."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from khod.engine import Engine
from khod.errors import Refused
from khod.handover.record import Owner
from khod.model import Phase
from khod.producers.kept import KeptVm
from khod.producers.transient import TransientUnits
from khod.systemd import dbus
from tests.unit.fakebus import Refusal, fake_bus, unit
from tests.unit.luo import LuoHost
from tests.unit.test_sessions import holding

UNIT = "khod-vm@kv.service"
STARTED = f"StartUnit {UNIT} fail"


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LuoHost]:
    """A host whose VM `kv` is to be kept, and whose systemd is at `tmp_path`/bus."""
    monkeypatch.setattr(dbus, "PRIVATE_SOCKET", str(tmp_path / "bus"))
    made = LuoHost(tmp_path)
    made.hooks.append(KeptVm("kv", runner=TransientUnits()))
    yield made
    while made.fdstore.kept:
        os.close(made.fdstore.kept.popitem()[1])


async def activate(engine: Engine) -> str:
    """Activate; the reason where that is refused."""
    try:
        await engine.activate()
    except Refused as error:
        return error.what
    return ""


async def test_a_handover_has_its_khod_vm_started_and_waits_for_it(host: LuoHost, tmp_path: Path) -> None:
    engine = await host.started()
    async with fake_bus(tmp_path / "bus", **{"khod-vm@kv": unit()}) as bus:
        waiting = asyncio.ensure_future(host.seen(lambda event: "waiting for khod-vm" in event.message))
        activating = asyncio.ensure_future(activate(engine))
        await waiting
        assert STARTED in bus.said
        async with holding(engine, Owner(0, UNIT)) as holder:
            assert await activating == ""
            assert engine.machine.phase is Phase.active
            assert holder.told[:2] == ["prepare", "freeze"]
            assert await engine.registry.start_supervisors() == [], "it is there"
            await engine.abort()


async def test_a_khod_vm_that_systemd_does_not_start_is_named(host: LuoHost, tmp_path: Path) -> None:
    engine = await host.started()
    async with fake_bus(tmp_path / "bus") as bus:
        bus.instead["StartUnit"] = Refusal("org.freedesktop.systemd1.NoSuchUnit", "Unit not found.")
        assert "khod-vm is not there: kv" in await activate(engine)
    assert "khod-vm is not there: kv" in await activate(engine), "nor is systemd"
    (shown,) = await engine.queries.producers()
    assert (shown.kind, shown.answer) == ("vm", f"{UNIT} is not there")
