# SPDX-License-Identifier: LGPL-2.1-or-later
"""A peer that was told something and is not connected: what it was told is undone, or it is named."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from khod.engine import Engine
from khod.engine.rollback import bound_seconds
from khod.errors import Failed, NotRolledBack, Refused, Unreachable
from khod.handover.record import Owner, Process
from khod.model import Phase
from khod.producers.barrier import write_verb
from khod.producers.conversation import Answer, AnswerWord
from khod.producers.identity import is_alive, process_of
from khod.producers.peer import Peer, Registration
from tests.unit.harness import Living
from tests.unit.scripted import Scripted
from tests.unit.virtual import VirtualHost, in_virtual_time, now

OWNER = Owner(1000, "kv.service")


@pytest.fixture
def host(tmp_path: Path) -> VirtualHost:
    made = VirtualHost(tmp_path)
    made.registrations = tmp_path / "registrations"
    Scripted(made, "a")
    return made


@pytest.fixture
def start() -> Iterator[Callable[[], Living]]:
    made: list[Living] = []

    def living() -> Living:
        made.append(Living())
        return made[-1]

    yield living
    for each in made:
        each.end()


async def register(engine: Engine, process: Process, owner: Owner = OWNER) -> Peer:
    return await engine.register_producer("kv", owner, process, Registration())


@asynccontextmanager
async def serving(engine: Engine, process: Process, owner: Owner = OWNER) -> AsyncIterator[list[str]]:
    """A peer that says yes to everything, and what it has heard; at the end it loses its connection and lives on."""
    peer = await register(engine, process, owner)
    heard = [f"registered: {write_verb(peer.claim.told)}"]

    async def serve() -> None:
        answer = None
        with suppress(Unreachable):
            while True:
                command = await peer.conversation.exchange_answer(answer)
                heard.append(command.verb.value)
                answer = Answer(command.serial, AnswerWord.ready)

    task = asyncio.ensure_future(serve())
    try:
        yield heard
    finally:
        engine.registry.peers.remove_peer(peer)
        await task


async def rests(host: VirtualHost, engine: Engine, *phases: Phase) -> None:
    while engine.machine.phase not in phases:
        await host.seen(lambda _event: True)


async def frozen(host: VirtualHost, process: Process) -> Engine:
    """A khod whose frozen producer has just lost its connection."""
    engine = await host.started()
    async with serving(engine, process):
        await engine.activate()
    return engine


@in_virtual_time
async def test_one_that_lives_and_does_not_come_back_is_not_undone(
    host: VirtualHost, start: Callable[[], Living]
) -> None:
    process = start()
    engine = await frozen(host, process.identity)
    began, bound = now(), bound_seconds(engine.settings.current.deadlines, engine.registry.all_producers())
    await rests(host, engine, Phase.failed, Phase.idle)
    assert engine.machine.phase is Phase.failed
    assert now() - began <= bound
    assert host.verbs[-2:] == ["a thaw", "a cancel"], "it holds nobody else up"
    (item,) = [item for item in engine.record.not_undone if item.producer == "kv"]
    assert f"process {process.identity.pid} is frozen, alive and not connected" in item.why
    with pytest.raises(Refused, match=r"kv\.service"):
        await register(engine, start().identity, Owner(1000, "other.service"))
    with pytest.raises(Refused, match=f"Process {process.identity.pid}") as refused:
        await register(engine, start().identity)
    assert "khoctl producers forget kv" in refused.value.remedy
    engine = await host.started()
    with pytest.raises(NotRolledBack, match="kv"):
        await engine.abort()
    process.end()
    await engine.abort()
    assert engine.machine.phase is Phase.idle


@in_virtual_time
async def test_one_that_comes_back_in_time_is_told(host: VirtualHost, start: Callable[[], Living]) -> None:
    process = start().identity
    engine = await frozen(host, process)
    await host.seen(lambda event: event.phase is Phase.rolling_back)
    async with serving(engine, process) as heard:
        await rests(host, engine, Phase.failed, Phase.idle)
        assert engine.machine.phase is Phase.idle
        assert heard == ["registered: freeze", "thaw", "cancel"]


async def hung_up_at(engine: Engine, process: Process, verb: str) -> None:
    """Have a peer serve, and lose its connection where it is told this verb, which it does not answer."""
    peer, answer = await register(engine, process), None
    while (command := await peer.conversation.exchange_answer(answer)).verb.value != verb:
        answer = Answer(command.serial, AnswerWord.ready)
    engine.registry.peers.remove_peer(peer)


@pytest.mark.parametrize("verb", ["thaw", "cancel"])
@in_virtual_time
async def test_one_that_hangs_up_at_an_undo_and_comes_back_is_told_it_again(
    host: VirtualHost, start: Callable[[], Living], verb: str
) -> None:
    process = start().identity
    engine = await host.started()
    hanging_up = asyncio.ensure_future(hung_up_at(engine, process, verb))
    await asyncio.sleep(0.1)
    await engine.activate()
    aborting = asyncio.ensure_future(engine.abort())
    await hanging_up
    await asyncio.sleep(3)
    assert not aborting.done()
    async with serving(engine, process) as heard:
        await aborting
        counts_on = {"thaw": "freeze", "cancel": "prepare"}[verb]
        assert heard == [f"registered: {counts_on}", *["thaw", "cancel"][verb == "cancel" :]]
    assert engine.machine.phase is Phase.idle


@pytest.mark.parametrize("ends", [True, False], ids=["ends", "lives on"])
@in_virtual_time
async def test_one_that_hangs_up_at_its_thaw_is_waited_for_until_it_has_ended(
    host: VirtualHost, start: Callable[[], Living], *, ends: bool
) -> None:
    process = start()
    engine = await host.started()
    hanging_up = asyncio.ensure_future(hung_up_at(engine, process.identity, "thaw"))
    await asyncio.sleep(0.1)
    await engine.activate()
    began, aborting = now(), asyncio.ensure_future(engine.abort())
    await hanging_up
    await asyncio.sleep(3)
    assert not aborting.done()
    if ends:
        process.end()
        await aborting
        assert engine.machine.phase is Phase.idle
        assert "could not be told: kv" in host.events[-1].message
        return
    with pytest.raises(NotRolledBack, match=f"process {process.identity.pid} is frozen, alive and not connected"):
        await aborting
    assert now() - began <= bound_seconds(engine.settings.current.deadlines, engine.registry.all_producers())
    assert host.verbs[-2:] == ["a thaw", "a cancel"]


@in_virtual_time
async def test_one_that_has_ended_is_said_to_be_gone(host: VirtualHost, start: Callable[[], Living]) -> None:
    process = start()
    engine = await host.started()
    async with serving(engine, process.identity):
        await engine.activate()
        process.end()
    await rests(host, engine, Phase.failed, Phase.idle)
    assert engine.machine.phase is Phase.idle
    assert "could not be told: kv" in host.events[-1].message


@in_virtual_time
async def test_one_that_an_operator_gives_up_is_not_waited_for(host: VirtualHost, start: Callable[[], Living]) -> None:
    engine = await frozen(host, start().identity)
    await rests(host, engine, Phase.failed)
    await engine.forget_producer("kv")
    async with serving(engine, start().identity) as heard:
        await engine.abort()
        assert heard == ["registered: freeze", "thaw", "cancel"]
    assert engine.machine.phase is Phase.idle


async def restarted(host: VirtualHost) -> tuple[Engine, "asyncio.Future[None]"]:
    """A khod that was killed, started again as far as its rollback; and its start, which goes on."""
    engine = host.engine()
    starting = asyncio.ensure_future(engine.start())
    await host.seen(lambda event: event.phase is Phase.rolling_back)
    return engine, starting


async def is_rolled_back(engine: Engine, process: Process, starting: "asyncio.Future[None]") -> None:
    """The frozen producer connects again, and is told both undos."""
    async with serving(engine, process) as heard:
        with pytest.raises(Failed, match="khod stopped unexpectedly"):
            await starting
        assert heard == ["registered: freeze", "thaw", "cancel"]


@in_virtual_time
async def test_after_a_restart_of_khod_nobody_takes_the_place_of_one_that_lives(
    host: VirtualHost, start: Callable[[], Living]
) -> None:
    """Stopped by SIGSTOP, it cannot connect; a second process of its unit would be thawed in its stead."""
    process = start().identity
    engine = await host.started()
    async with serving(engine, process):
        await engine.activate()
        engine, starting = await restarted(host)
        with pytest.raises(Refused, match=f"Process {process.pid}"):
            await register(engine, start().identity)
        await is_rolled_back(engine, process, starting)


@in_virtual_time
async def test_a_verb_of_the_record_that_khod_does_not_know_counts_as_a_freeze(
    host: VirtualHost, start: Callable[[], Living]
) -> None:
    process = start().identity
    engine = await host.started()
    async with serving(engine, process):
        await engine.activate()
        record = host.store.record_path.read_text()
        host.store.record_path.write_text(record.replace('"told": "freeze"', '"told": "later"'))
        engine, starting = await restarted(host)
        await is_rolled_back(engine, process, starting)


@in_virtual_time
async def test_nor_at_rest_before_it_has_ended_or_was_given_up(host: VirtualHost, start: Callable[[], Living]) -> None:
    for given_up in (False, True):
        process = start()
        engine = await host.started()
        await register(engine, process.identity)
        engine.registry.peers.stop_remembering()
        engine = await host.started()
        with pytest.raises(Refused, match=f"Process {process.identity.pid}") as refused:
            await register(engine, start().identity)
        assert "khoctl producers forget kv" in refused.value.remedy
        if given_up:
            await engine.forget_producer("kv")
        else:
            process.end()
        engine.registry.peers.remove_peer(await register(engine, start().identity))


@pytest.mark.parametrize("loaded", [False, True])
@in_virtual_time
async def test_with_a_record_that_cannot_be_read_whoever_may_be_frozen_stays_so(
    host: VirtualHost, start: Callable[[], Living], *, loaded: bool
) -> None:
    """The host may be about to jump; told that nothing is counted on, a producer would go on with its work."""
    process = start().identity
    engine = await host.started()
    async with serving(engine, process):
        await (host.kexec(engine, load_only=True) if loaded else engine.activate())
        engine.registry.peers.stop_remembering()  # khod is killed
        host.store.record_path.write_bytes(host.store.record_path.read_bytes()[:100])
        engine = await host.started()
        assert engine.machine.phase is Phase.inconsistent
        async with serving(engine, process) as heard:
            assert heard == ["registered: freeze"]
            await engine.abort(force=True)
            assert heard == ["registered: freeze", "thaw", "cancel"]
        assert (engine.machine.phase, engine.registry.peers.all_peers()) == (Phase.idle, [])


@in_virtual_time
async def test_with_a_record_that_cannot_be_read_one_that_has_ended_holds_nobody_up(
    host: VirtualHost, start: Callable[[], Living]
) -> None:
    process = start()
    engine = await host.started()
    async with serving(engine, process.identity):
        await engine.activate()
        engine.registry.peers.stop_remembering()
        host.store.record_path.write_bytes(b"")
        process.end()
        engine = await host.started()
        await engine.abort(force=True)
        assert engine.machine.phase is Phase.idle


@in_virtual_time
async def test_the_name_of_one_that_an_operator_gives_up_is_free(
    host: VirtualHost, start: Callable[[], Living]
) -> None:
    engine = await frozen(host, start().identity)
    await rests(host, engine, Phase.failed)
    other = Owner(0, "other.service")
    with pytest.raises(Refused, match="forget"):
        await register(engine, start().identity, other)
    await engine.forget_producer("kv")
    async with serving(engine, start().identity, other) as heard:
        await engine.abort()
    assert heard == ["registered: ", "thaw", "cancel"]
    assert engine.machine.phase is Phase.idle


@in_virtual_time
async def test_one_that_was_given_up_and_came_back_has_its_name_again(
    host: VirtualHost, start: Callable[[], Living]
) -> None:
    """It is counted on as before: another owner would be thawed in its stead."""
    engine = await frozen(host, start().identity)
    await rests(host, engine, Phase.failed)
    await engine.forget_producer("kv")
    async with serving(engine, start().identity) as heard:
        assert heard == ["registered: freeze"]
    with pytest.raises(Refused, match=r"kv\.service"):
        await register(engine, start().identity, Owner(0, "other.service"))


def test_a_zombie_has_ended(start: Callable[[], Living]) -> None:
    """Its parent may be slow to wait for it; its successor must not be refused for that."""
    living = start()
    assert is_alive(living.identity)
    os.kill(living.identity.pid, signal.SIGKILL)
    os.waitid(os.P_PID, living.identity.pid, os.WEXITED | os.WNOWAIT)
    assert process_of(living.identity.pid) == living.identity
    assert not is_alive(living.identity)
