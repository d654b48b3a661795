# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who is asking: the groups of [access], looked up where nobody waits for them."""

import asyncio
import grp
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from khod.config import Access
from khod.engine import Engine
from khod.server import access
from khod.server.access import Caller, Groups, Standing
from khod.server.server import Server
from khod.server.sockets import Sockets
from khod.wire import INTERFACE
from tests.unit.harness import Host

ALICE = 1000

# Groups


class Nss:
    """Stands for the name service: `answers` is set when it does, and it knows these groups."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **groups: int) -> None:
        self.groups = groups
        self.answers = threading.Event()
        self.threads: set[int] = set()
        monkeypatch.setattr(grp, "getgrnam", self._getgrnam)
        monkeypatch.setattr(access, "peer_credentials", lambda _sock: (1, ALICE, ALICE))
        monkeypatch.setattr(access, "peer_groups", lambda _sock: (7, 8))

    def _getgrnam(self, name: str) -> grp.struct_group:
        self.threads.add(threading.get_ident())
        assert self.answers.wait(20)
        return grp.struct_group((name, "x", self.groups[name], []))


async def test_groups_are_looked_up_once_and_never_in_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    nss = Nss(monkeypatch, kho=7, makers=8)
    nss.answers.set()
    settings = Access("kho", "makers")
    groups, caller = Groups(lambda: settings), Caller(socket.socket())
    await groups.wait_lookup()
    for _ in range(10):
        assert groups.standing_of(caller) is Standing.operator
    assert len(nss.threads) == 1
    assert threading.get_ident() not in nss.threads


@pytest.mark.parametrize(
    ("named", "standing"),
    [
        (Access("kho", "makers"), Standing.operator),
        (Access("", "makers"), Standing.producer),
        (Access("strangers", "makers"), Standing.producer),
        (Access("strangers", ""), Standing.other),
        (Access("unknown", "unknown"), Standing.other),
        (Access("", ""), Standing.other),
    ],
    ids=str,
)
async def test_what_a_caller_is_by_its_groups(
    monkeypatch: pytest.MonkeyPatch, named: Access, standing: Standing
) -> None:
    nss = Nss(monkeypatch, kho=7, makers=8, strangers=9)
    nss.answers.set()
    groups, caller = Groups(lambda: named), Caller(socket.socket())
    await groups.wait_lookup()
    assert groups.standing_of(caller) is standing


async def test_a_reload_counts_at_once_and_a_new_group_when_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    nss = Nss(monkeypatch, kho=7, more=8)
    nss.answers.set()
    settings = Access("kho", "")
    groups, caller = Groups(lambda: settings), Caller(socket.socket())
    await groups.wait_lookup()
    assert groups.standing_of(caller) is Standing.operator
    nss.answers.clear()
    settings = Access("more", "")
    assert groups.standing_of(caller) is Standing.other
    assert groups.is_pending
    before = groups.count_changes
    nss.answers.set()
    await groups.wait_lookup()
    assert groups.count_changes > before, "connections that are there ask again"
    assert groups.standing_of(caller) is Standing.operator


async def test_a_group_that_is_made_later_is_found_when_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    nss = Nss(monkeypatch)
    nss.answers.set()
    settings = Access("kho", "")
    groups, caller = Groups(lambda: settings), Caller(socket.socket())
    await groups.wait_lookup()
    nss.groups["kho"] = 7
    assert "kho" in groups.refusal_error(caller, "activate").remedy
    assert not groups.is_pending, "not at every refusal: anyone can have as many as he likes"
    monkeypatch.setattr(access, "RETRY_SECONDS", 0.0)
    groups.refusal_error(caller, "activate")
    await groups.wait_lookup()
    assert groups.standing_of(caller) is Standing.operator


@asynccontextmanager
async def served(host: Host) -> AsyncIterator[tuple[Engine, Callable[[], socket.socket]]]:
    """A khod in this event loop, and how to connect to it."""
    engine = host.engine()
    path, sock = str(host.directory / "socket"), socket.socket(socket.AF_UNIX)
    sock.bind(path)
    listening = Sockets([sock], lambda sockets: Server(engine, sockets, lambda: engine.settings.current.access))
    await engine.start()
    clients: list[socket.socket] = []

    def connect() -> socket.socket:
        clients.append(socket.socket(socket.AF_UNIX))
        clients[-1].setblocking(False)
        clients[-1].connect(path)
        return clients[-1]

    try:
        yield engine, connect
    finally:
        await listening.close(0)
        for client in clients:
            client.close()


async def ask(client: socket.socket, method: str, **parameters: object) -> dict[str, Any]:
    """Make a call in this event loop; its reply."""
    loop, text = asyncio.get_running_loop(), b""
    call = {"method": method, "parameters": parameters}
    await loop.sock_sendall(client, json.dumps(call).encode() + b"\0")
    while not text.endswith(b"\0"):
        piece = await loop.sock_recv(client, 1 << 16)
        assert piece, "khod hung up"
        text += piece
    found: dict[str, Any] = json.loads(text[:-1])
    return found


async def test_a_name_service_that_hangs_is_waited_for_by_those_alone_who_need_it(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    nss = Nss(monkeypatch, kho=7)
    monkeypatch.setattr(access, "LOOKUP_WAIT_SECONDS", 0.2)
    async with served(host) as (_engine, connect):
        operator, other = connect(), connect()
        refused = await ask(operator, f"{INTERFACE}.Activate")
        assert refused["error"] == f"{INTERFACE}.Refused"
        waits = asyncio.ensure_future(ask(operator, f"{INTERFACE}.Activate"))
        assert (await ask(other, f"{INTERFACE}.Status"))["parameters"]["status"]["phase"] == "idle"
        nss.answers.set()
        answer = await waits
        if "error" in answer:  # it had waited long enough before
            answer = await ask(operator, f"{INTERFACE}.Activate")
        assert answer["parameters"]["status"]["phase"] == "active"
        assert threading.get_ident() not in nss.threads


@pytest.mark.parametrize("name_service", ["answers", "hangs"])
async def test_a_reload_takes_rights_from_the_connections_that_are_there(
    host: Host, monkeypatch: pytest.MonkeyPatch, name_service: str
) -> None:
    """Nobody else need come for it, and no lookup need end."""
    nss = Nss(monkeypatch, kho=7)
    nss.answers.set()
    async with served(host) as (engine, connect):
        operator = connect()
        assert "error" not in await ask(operator, f"{INTERFACE}.Activate")
        assert "error" not in await ask(operator, f"{INTERFACE}.Abort")
        if name_service == "hangs":
            monkeypatch.setattr(access, "LOOKUP_WAIT_SECONDS", 0.2)
            nss.answers.clear()
            engine.settings.current = replace(engine.settings.current, access=Access("kho", ""))
            assert "error" not in await ask(operator, f"{INTERFACE}.Activate")
            assert "error" not in await ask(operator, f"{INTERFACE}.Abort")
        engine.settings.current = replace(engine.settings.current, access=Access("", ""))
        refused = await ask(operator, f"{INTERFACE}.Activate")
        nss.answers.set()
        assert refused["error"] == f"{INTERFACE}.Refused"
