# SPDX-License-Identifier: LGPL-2.1-or-later
"""One connection to systemd that several tasks share: none takes another's answer, and none ends another's wait."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from jeepney import DBusAddress, new_signal

from khod.systemd import dbus
from khod.systemd.dbus import Bus, Disconnected, SharedBus
from khod.systemd.manager import MANAGER
from tests.unit.fakebus import MANAGER as FAKE_MANAGER
from tests.unit.fakebus import fake_bus, send

PROPERTIES = "org.freedesktop.DBus.Properties"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where khod looks for systemd in this test."""
    monkeypatch.setattr(dbus, "PRIVATE_SOCKET", str(tmp_path / "bus"))
    return tmp_path / "bus"


@asynccontextmanager
async def users(count: int) -> AsyncIterator[list[Bus]]:
    """Connect this many tasks side by side."""
    shared = SharedBus()
    async with AsyncExitStack() as stack:
        yield await asyncio.gather(*(stack.enter_async_context(shared.use()) for _ in range(count)))


def ping(bus: Bus, unit: str) -> asyncio.Future[str]:
    async def ask() -> str:
        return str((await bus.call_method(MANAGER, "LoadUnit", "s", unit)).body[0])

    return asyncio.ensure_future(ask())


async def test_all_who_need_it_share_a_connection_that_ends_with_the_last(place: Path) -> None:
    async with fake_bus(place) as bus:
        async with users(5) as connections:
            assert len(set(connections)) == 1
            assert bus.open == 1
            asked = [f"{number}.service" for number in range(5)]
            assert await asyncio.gather(*(ping(connections[0], name) for name in asked)) == [
                f"/unit/{name.encode().hex()}" for name in asked
            ]
        await bus.closed.wait()
        async with users(1) as connections:
            await ping(connections[0], "a.service")
        await bus.closed.wait()


async def test_a_call_that_is_cancelled_takes_no_other_s_answer(place: Path) -> None:
    async with fake_bus(place) as bus:
        answered = bus.instead["FreezeUnit"] = asyncio.Event()
        async with users(2) as (one, other):
            frozen = asyncio.ensure_future(one.call_method(MANAGER, "FreezeUnit", "s", "a.service"))
            await bus.reached.wait()
            frozen.cancel()
            answered.set()
            assert await ping(other, "b.service") == f"/unit/{b'b.service'.hex()}"


async def test_who_is_cancelled_while_it_connects_leaves_the_others_connected(place: Path) -> None:
    async with fake_bus(place) as bus:
        welcome, bus.welcome = bus.welcome, b""
        shared = SharedBus()

        async def ask() -> str:
            async with shared.use() as one:
                return await ping(one, "a.service")

        first, second = asyncio.ensure_future(ask()), asyncio.ensure_future(ask())
        while not bus.open:  # noqa: ASYNC110 - the bus has no event for it
            await asyncio.sleep(0)
        bus.welcome = welcome
        first.cancel()
        assert await second == f"/unit/{b'a.service'.hex()}"


async def test_when_systemd_hangs_up_everyone_hears_of_it_and_the_next_connects_anew(place: Path) -> None:
    async with fake_bus(place) as bus:
        shared = SharedBus()
        async with shared.use() as one, shared.use() as other:
            waiting = [asyncio.ensure_future(wait) for wait in (one.wait_job("/job/1"), other.wait_news("/unit/a"))]
            bus.instead["FreezeUnit"] = b""
            with pytest.raises(Disconnected):
                await one.call_method(MANAGER, "FreezeUnit", "s", "a.service")
            assert [type(error) for error in await asyncio.gather(*waiting, return_exceptions=True)] == [
                Disconnected
            ] * 2
            with pytest.raises(Disconnected):
                await other.call_method(MANAGER, "LoadUnit", "s", "a.service")
            async with shared.use() as again:
                assert again is not one
                await ping(again, "a.service")


async def test_each_hears_of_its_own_object(place: Path) -> None:
    async with fake_bus(place) as bus:

        def changed(path: str, **values: Any) -> None:
            about = DBusAddress(path, interface=PROPERTIES)
            body: tuple[Any, ...] = ("x", {name: ("s", value) for name, value in values.items()}, [])
            send(bus.writers[0], new_signal(about, "PropertiesChanged", "sa{sv}as", body))

        async with users(1) as (one,):
            with one.watch_object("/unit/a") as first, one.watch_object("/unit/b") as second:
                with one.watch_object("/unit/a") as later:
                    changed("/unit/c", ActiveState="failed")
                    changed("/unit/a", ActiveState="active")
                    await one.wait_news("/unit/a")
                    assert (first, second, later) == ({"ActiveState": "active"}, {}, {"ActiveState": "active"})
                changed("/unit/a", ActiveState="inactive")
                changed("/unit/b", ActiveState="failed")
                await one.wait_news("/unit/b")
                assert (first, second, later) == (
                    {"ActiveState": "inactive"},
                    {"ActiveState": "failed"},
                    {"ActiveState": "active"},
                )


async def test_the_end_of_a_job_may_come_before_it_is_awaited(place: Path) -> None:
    async with fake_bus(place) as bus, users(1) as (one,):
        send(bus.writers[0], new_signal(FAKE_MANAGER, "JobRemoved", "uoss", (7, "/job/7", "a.service", "done")))
        await ping(one, "a.service")
        assert await one.wait_job("/job/7") == "done"


async def test_calls_wait_for_room_and_one_that_is_cancelled_before_is_not_sent(place: Path) -> None:
    """Its descriptors are the caller's: they may be other files by the time there is room."""
    async with fake_bus(place) as bus, users(1) as (one,):
        transport = bus.writers[0].transport
        assert isinstance(transport, asyncio.ReadTransport)
        transport.pause_reading()
        calls = [ping(one, f"{'x' * 4000}-{number}.service") for number in range(200)]
        reader, writer = os.pipe()
        late = asyncio.ensure_future(one.call_method(MANAGER, "Ping", "h", writer))
        await asyncio.sleep(0)
        late.cancel()
        await asyncio.wait([late])
        os.close(reader)
        os.close(writer)
        transport.resume_reading()
        await asyncio.gather(*calls)
        assert len(bus.said) == 200
