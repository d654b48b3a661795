# SPDX-License-Identifier: LGPL-2.1-or-later
"""What arrived ends by `finish` and `forget` alone: nothing else that happens to khod or its record frees it."""

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from khod.config import Checks, Config, Deadlines
from khod.engine import Engine
from khod.errors import Exit, Failed, NotRolledBack, Refused, Unreachable
from khod.model import Phase
from khod.producers.barrier import Participant, Verb
from khod.producers.conversation import Answer, AnswerWord, PeerCommand
from khod.producers.identity import process_of
from khod.producers.peer import Peer, Registration
from khod.simulated.kernel import Rebooted
from tests.unit.harness import ACTIVE
from tests.unit.luo import LuoHost
from tests.unit.scripted import Scripted, raises
from tests.unit.test_sessions import HELD, OWNER, holding, reached


@pytest.fixture
def host(tmp_path: Path) -> Iterator[LuoHost]:
    made = LuoHost(tmp_path)
    made.carries = True
    yield made
    while made.fdstore.kept:
        os.close(made.fdstore.kept.popitem()[1])


async def jump(host: LuoHost, *others: Participant) -> None:
    """Leave a memfd of `kv`'s in the next kernel, with these producers beside it."""
    engine = await host.started()
    async with holding(engine):
        while [found.name for found in await engine.queries.producers()] != ["kv"]:
            await host.seen(lambda _event: True)
        host.hooks += [producer for producer in others if producer not in host.hooks]
        with pytest.raises(Rebooted):
            await host.kexec(engine)


async def degraded(host: LuoHost, *others: Participant, kind: str = "varlink") -> Engine:
    """A khod in whose kernel `kv` did not come in time."""
    await jump(host, *others)
    soon = tuple(replace(holder, timeout=0.01, shown_kind=kind) for holder in host.record.producers)
    host.store.write(replace(host.record, producers=soon))
    host.config = Config(deadlines=Deadlines(restore=0.01))
    engine = await host.started()
    await reached(host, engine, Phase.degraded)
    return engine


async def test_the_time_to_restore_begins_when_the_host_has_its_services(host: LuoHost) -> None:
    """khod is started long before a producer that is an ordinary service."""
    await jump(host)
    soon = tuple(replace(holder, timeout=0.0) for holder in host.record.producers)
    host.store.write(replace(host.record, producers=soon))
    host.config = Config(deadlines=Deadlines(restore=0.0))

    async def never() -> None:
        await asyncio.Event().wait()

    host.host_up = never
    engine = await host.started()
    async with holding(engine):
        await reached(host, engine, Phase.verified)
    assert Phase.degraded not in [event.phase for event in host.events]


def waiting(host: LuoHost) -> bool:
    """Whether the previous kernel's memory is still there for whoever left it."""
    return len(host.fdstore.kept) == 1 and host.luo.unclaimed != set()


async def taken_back(host: LuoHost, engine: Engine) -> None:
    """The producer comes, has its own again, and nothing waits any more."""
    async with holding(engine) as holder:
        while engine.record.outcome is not Phase.verified:
            await host.seen(lambda _event: True)
        assert holder.came == {"table": HELD}
        assert holder.told[-2:] == ["restore", "finish"]
    status = await engine.queries.status()
    assert (status.outcome, status.claims, status.exit_code) == (Phase.verified, [], Exit.done)
    assert host.fdstore.kept == {}


async def load_foreign(host: LuoHost) -> None:
    with host.request() as request:
        assert request.kernel is not None
        host.kernel.kexec_file_load(request.kernel.fd, request.initrds[0].fd, b"root=/dev/sim\0", 0)


async def force_abort(host: LuoHost, engine: Engine) -> None:
    """Somebody loaded an image, as kexec-tools does, and the remedy that status names is used."""
    await load_foreign(host)
    assert "`Abort(force)`" in (await engine.queries.status()).remedy
    await engine.abort(force=True)
    assert not host.kernel.loaded


async def roll_another_back(host: LuoHost, engine: Engine) -> None:
    """A new handover that the configuration lets begin, to the end that it is called off."""
    engine.settings.current = replace(engine.settings.current, checks=Checks(claims="warn"))
    await host.kexec(engine, load_only=True)
    await engine.abort()


async def fail_another(host: LuoHost, engine: Engine) -> None:
    engine.settings.current = replace(engine.settings.current, checks=Checks(claims="warn"))
    Scripted(host, "no", prepare=raises(OSError(errno.EIO, "Input/output error", "disk")))
    with pytest.raises(Refused):
        await engine.activate()
    host.hooks.clear()


async def die_in_another(host: LuoHost, engine: Engine) -> None:
    """khod is killed in the middle of it."""
    engine.settings.current = replace(engine.settings.current, checks=Checks(claims="warn"))
    await engine.activate()
    with pytest.raises(Failed):
        await host.engine().start()


async def rehearse(host: LuoHost, engine: Engine) -> None:
    host.hook("h")
    with pytest.raises(Refused):
        await engine.rehearse_producer("h")
    host.hooks.clear()


async def reload(_host: LuoHost, engine: Engine) -> None:
    engine.settings.current = Config(deadlines=Deadlines(restore=1.0), checks=Checks(claims="off"))


async def forget_another(_host: LuoHost, engine: Engine) -> None:
    with pytest.raises(Refused):
        await engine.forget_producer("vk")


MEANWHILE: dict[str, Callable[[LuoHost, Engine], Awaitable[None]]] = {
    "nothing": lambda _host, _engine: _at_once(),
    "an abort": lambda _host, engine: engine.abort(),
    "abort --force": lambda _host, engine: engine.abort(force=True),
    "abort --force of another's image": force_abort,
    "a handover that is rolled back": roll_another_back,
    "a handover that fails": fail_another,
    "a handover that khod dies in": die_in_another,
    "a test of another producer": rehearse,
    "a reload": reload,
    "another is forgotten": forget_another,
    "a stop": lambda _host, engine: engine.stop(jumping=False),
}


async def _at_once() -> None:
    """Do nothing."""


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("meanwhile", MEANWHILE)
async def test_what_waits_is_still_its_producer_s_whatever_is_done_meanwhile(
    host: LuoHost, meanwhile: str, restart: bool
) -> None:
    engine = await degraded(host)
    await MEANWHILE[meanwhile](host, engine)
    assert waiting(host)
    if restart or meanwhile == "a handover that khod dies in":
        engine = await host.started()
    assert waiting(host)
    status = await engine.queries.status()
    assert (status.claims, status.outcome, status.exit_code) == (["kv"], Phase.degraded, Exit.degraded)
    await taken_back(host, engine)


async def test_who_comes_while_a_handover_is_under_way_is_given_its_own_when_that_is_over(host: LuoHost) -> None:
    engine = await degraded(host)
    engine.settings.current = replace(engine.settings.current, checks=Checks(claims="warn"))
    await engine.activate()
    async with holding(engine) as holder:
        await host.kexec(engine, load_only=True)
        assert holder.told == [], "what is under way goes without it"
        await engine.abort()
        await reached(host, engine, Phase.verified)
        assert holder.came == {"table": HELD}
    assert host.fdstore.kept == {}


async def test_an_abort_beside_a_late_restore_does_not_reach_the_next_handover(host: LuoHost) -> None:
    engine = await degraded(host)
    process = process_of(os.getpid())
    assert process is not None
    peer = await engine.register_producer("kv", OWNER, process, Registration(10.0))
    restore = await peer.conversation.exchange_answer(None)
    abort = asyncio.ensure_future(engine.abort())
    await asyncio.sleep(0)
    answering = asyncio.ensure_future(says_yes(peer, restore))
    await abort
    while engine.record.claims:  # it was cut short, and is told again
        await host.seen(lambda _event: True)
    engine.registry.peers.remove_peer(peer)
    with pytest.raises(Unreachable):
        await answering
    await engine.activate()
    assert engine.machine.phase is Phase.active


@pytest.mark.parametrize(("before", "after"), [("varlink", "vm"), ("vm", "varlink")])
async def test_a_producer_that_names_another_kind_takes_its_state_back(host: LuoHost, before: str, after: str) -> None:
    """Its supervisor was upgraded; and what a client says of its kind decides nothing."""
    engine = await degraded(host, kind=before)
    process = process_of(os.getpid())
    assert process is not None
    peer = await engine.register_producer("kv", OWNER, process, Registration(10.0, shown_kind=after))
    command = await peer.conversation.exchange_answer(None)
    assert command.verb is Verb.restore
    answering = asyncio.ensure_future(says_yes(peer, command))
    while engine.record.claims:
        await host.seen(lambda _event: True)
    assert [shown.kind for shown in await engine.queries.producers()] == [after]
    engine.registry.peers.remove_peer(peer)
    with pytest.raises(Unreachable):
        await answering


async def says_yes(peer: Peer, command: PeerCommand) -> None:
    """Take back what was left, and say yes to this command and all to come."""
    while True:
        for fd in command.fds:
            os.close(fd)
        command = await peer.conversation.exchange_answer(Answer(command.serial, AnswerWord.ready))


WANTED: dict[str, Callable[[Engine], Awaitable[None]]] = {
    "abort": lambda engine: engine.abort(),
    "forget": lambda engine: engine.forget_producer("kv"),
    "stop": lambda engine: engine.stop(jumping=False),
}


@pytest.mark.parametrize("what", WANTED)
async def test_a_producer_that_comes_late_and_says_nothing_holds_nobody_up(host: LuoHost, what: str) -> None:
    """Ten minutes is what it may ask for, for each answer."""
    engine = await degraded(host)
    process = process_of(os.getpid())
    assert process is not None
    peer = await engine.register_producer("kv", OWNER, process, Registration(600.0))
    command = await peer.conversation.exchange_answer(None)
    assert command.verb is Verb.restore
    await WANTED[what](engine)
    os.close(command.fds[0])
    assert [holder.name for holder in engine.record.claims] == ([] if what == "forget" else ["kv"])
    if what == "stop":
        return
    engine.registry.peers.remove_peer(peer)


async def test_who_could_not_be_put_back_has_nothing_to_claim(host: LuoHost) -> None:
    """The kernel's part failed, and was mended by hand while khod was down."""
    host.hook("h")
    engine = await host.started()
    await engine.activate()
    host.kernel.set_fault("abort_errno", errno.EBUSY)
    with pytest.raises(NotRolledBack):
        await engine.abort()
    host.kernel.set_fault("abort_errno", None)
    host.kernel.echo_to(ACTIVE, "0")
    engine = await host.started()
    assert (await engine.queries.status()).claims == []
    await engine.activate()


# Hooks


async def test_a_hook_whose_restore_failed_can_be_given_up(host: LuoHost) -> None:
    pool = Scripted(host, "pool", restores=True, restore=raises(OSError(errno.EIO, "Input/output error", "disk")))
    host.hooks.clear()
    engine = await degraded(host, pool)
    assert (await engine.queries.status()).claims == ["kv", "pool"]
    with pytest.raises(Refused, match="pool"):
        await engine.activate()
    await engine.forget_producer("pool")
    assert (await engine.queries.status()).claims == ["kv"]
    assert waiting(host)
    pool.does.clear()
    with pytest.raises(Refused, match="kv"):
        await engine.activate()
    await engine.forget_producer("kv")
    await engine.activate()
