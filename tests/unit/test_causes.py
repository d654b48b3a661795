# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a rollback says afterwards: what began it, and who was not there any more to hear of it."""

import asyncio
from pathlib import Path

import pytest

from khod.engine import Engine
from khod.errors import Failed, NotRolledBack
from khod.handover.directory import FILE_NAME
from khod.handover.record import Owner
from khod.model import Phase
from khod.producers.conversation import Answer, AnswerWord
from khod.producers.peer import Peer, Registration
from tests.unit.harness import ACTIVE, Host, Living
from tests.unit.scripted import Scripted, raises
from tests.unit.virtual import VirtualHost, in_virtual_time


@in_virtual_time
async def test_the_first_cause_outlives_a_rollback_that_fails_more_than_once(tmp_path: Path) -> None:
    host = VirtualHost(tmp_path)
    stuck = Scripted(host, "lb", cancel=raises(Failed("stuck")))
    Scripted(host, "db", after=("lb",), prepare=raises(Failed("no luck")))
    engine = await host.started()
    with pytest.raises(NotRolledBack):
        await engine.activate()
    for _again in range(2):
        for words in ("db", "no luck", "lb", "stuck"):
            assert words in (await engine.queries.status()).last_error
        with pytest.raises(NotRolledBack):
            await engine.abort()
    assert (await engine.queries.status()).last_error.count("stuck") == 1
    stuck.does.clear()
    await engine.abort()
    assert "no luck" in (await engine.queries.status()).last_error


async def answers(peer: Peer) -> None:
    """Say yes to everything."""
    answer = None
    while True:
        command = await peer.conversation.exchange_answer(answer)
        answer = Answer(command.serial, AnswerWord.ready)


async def frozen(engine: Engine, name: str, living: Living) -> Peer:
    peer = await engine.register_producer(name, Owner(0, f"{name}.service"), living.identity, Registration())
    serving = asyncio.ensure_future(answers(peer))
    await engine.activate()
    serving.cancel()
    return peer


async def test_who_went_away_frozen_is_named_and_did_not_answer(tmp_path: Path) -> None:
    """Its state went with it: to be told `thaw: ready` would send the operator to bed."""
    host = Host(tmp_path)
    engine = await host.started()
    living = Living()
    peer = await frozen(engine, "vm", living)
    living.end()
    engine.registry.peers.remove_peer(peer)
    await host.seen(lambda event: event.phase is Phase.idle and "Rolled back" in event.message)
    heard = [event for event in host.events if event.producer and event.producer.phase in ("thaw", "cancel")]
    assert heard
    assert all(event.producer and event.producer.answer != "ready" for event in heard)
    assert "vm" in host.events[-1].message


@in_virtual_time
async def test_a_contradiction_names_both_facts_and_who_is_frozen(tmp_path: Path) -> None:
    host = VirtualHost(tmp_path)
    Scripted(host, "vm")
    engine = await host.started()
    await engine.activate()
    host.kernel.echo_to(ACTIVE, "0")
    status = await engine.queries.status()
    assert status.phase is Phase.inconsistent
    for words in ("left the host at active", "inactive with no image", "vm"):
        assert words in status.summary
    assert "`Abort(force)`" in status.remedy
    await engine.abort(force=True)


@in_virtual_time
async def test_a_damaged_record_is_no_contradiction(tmp_path: Path) -> None:
    host = VirtualHost(tmp_path)
    host.store.directory.mkdir(exist_ok=True)
    (host.store.directory / FILE_NAME).write_text('{"vers')
    status = await (await host.started()).queries.status()
    assert status.phase is Phase.inconsistent
    assert "record" in status.summary
    assert "somebody else" not in status.summary
