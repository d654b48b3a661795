# SPDX-License-Identifier: LGPL-2.1-or-later
"""What ends a handover stays a fact until somebody has acted on it, whatever khod does in that moment."""

import asyncio
import errno
import os
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace

import pytest

from khod import preflight
from khod.engine import Engine
from khod.errors import Failed, KhoError, NotRolledBack, Refused
from khod.handover import reconcile
from khod.handover.record import Owner
from khod.model import Phase
from khod.producers.conversation import Answer, AnswerWord
from khod.producers.peer import Peer, Registration
from khod.simulated.kernel import Rebooted
from tests.unit.harness import Host, Living

TOLD = ["a prepare", "a freeze"]
UNDONE = [*TOLD, "a thaw", "a cancel"]
HARDWARE = "The hardware changed"


class Gate:
    """Stands before a function that runs in a thread: the function waits there until it is let through."""

    def __init__(self, owner: object, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached = asyncio.Event()
        self._open = threading.Event()
        original, loop = getattr(owner, name), asyncio.get_running_loop()

        def wait(*arguments: object, **named: object) -> object:
            loop.call_soon_threadsafe(self.reached.set)
            self._open.wait()
            return original(*arguments, **named)

        monkeypatch.setattr(owner, name, wait)

    def open(self) -> None:
        self._open.set()


async def rolled_back(host: Host, engine: Engine) -> None:
    assert engine.machine.phase is Phase.idle
    assert host.verbs == UNDONE
    assert (host.kernel.active, host.kernel.loaded) == (False, False)
    assert not host.guard.watching
    host.told.unlink()
    await engine.activate()
    assert host.verbs == TOLD, "what ended the one handover does not end the next"
    await engine.abort()


def remove_memory(host: Host) -> None:
    host.guard.event("remove", "memory")


# In the last step


LAST_STEPS: dict[str, tuple[Callable[[Host, Engine], Awaitable[None]], str]] = {
    "activate": (lambda _host, engine: engine.activate(), "write_file"),
    "load": (lambda host, engine: host.kexec(engine, load_only=True), "kexec_file_load"),
    "load, with --hold": (lambda host, engine: host.kexec(engine, load_only=True, hold=True), "kexec_file_load"),
}


@pytest.mark.parametrize("step", LAST_STEPS)
async def test_an_event_in_the_last_step_ends_the_handover(
    host: Host, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    host.hook("a")
    engine = await host.started()
    operation, call = LAST_STEPS[step]
    gate = Gate(host.kernel, call, monkeypatch)
    handover = asyncio.ensure_future(operation(host, engine))
    await gate.reached.wait()
    remove_memory(host)
    gate.open()
    with pytest.raises(Refused, match=HARDWARE):
        await handover
    await rolled_back(host, engine)


async def test_an_event_while_the_last_record_is_written_ends_the_handover(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.hook("a")
    engine = await host.started()
    write, gates = type(host.store).write, []

    def held(store: object, record: object, **more: object) -> None:
        if getattr(record, "phase", None) is Phase.active:
            gates.append(loop.call_soon_threadsafe(remove_memory, host))
        write(store, record, **more)  # type: ignore[arg-type]

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(type(host.store), "write", held)
    with pytest.raises(Refused, match=HARDWARE):
        await engine.activate()
    monkeypatch.undo()
    assert gates
    await rolled_back(host, engine)


# While it is held


async def test_an_event_that_comes_with_the_next_order_in_one_turn_comes_first(host: Host) -> None:
    host.hook("a")
    engine = await host.started()
    await engine.activate()
    remove_memory(host)
    with pytest.raises(Refused, match=HARDWARE):
        await host.kexec(engine)
    await rolled_back(host, engine)


ORDERS: dict[str, Callable[[Engine], Awaitable[object]]] = {
    "activate": lambda engine: engine.activate(),
    "rehearse": lambda engine: engine.rehearse_producer("a"),
    "forget": lambda engine: engine.forget_producer("a"),
    "abort": lambda engine: engine.abort(),
    "stop": lambda engine: engine.stop(jumping=False),
}


@pytest.mark.parametrize("order", ORDERS)
async def test_whoever_has_the_lock_first_acts_on_the_event(host: Host, order: str) -> None:
    host.hook("a")
    engine = await host.started()
    await host.kexec(engine, load_only=True)
    remove_memory(host)
    with suppress(KhoError):
        await ORDERS[order](engine)
    await rolled_back(host, engine)


async def test_an_event_while_nobody_asks_for_anything_ends_it_by_itself(host: Host) -> None:
    host.hook("a")
    engine = await host.started()
    await engine.activate()
    back = asyncio.ensure_future(host.seen(lambda event: event.message == "Rolled back."))
    await asyncio.sleep(0)
    remove_memory(host)
    await back
    assert HARDWARE in (await engine.queries.status()).last_error
    await rolled_back(host, engine)


# While the next step is got ready


GETTING_READY = {
    "an image is read": (os, "preadv"),
    "the checks run": (preflight, "run_checks"),
    "the kernel is asked": (reconcile, "observe_kernel"),
    "the disks are synced": (None, "sync_disks"),
}


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("what", GETTING_READY)
async def test_an_event_while_the_next_step_is_got_ready_ends_the_handover(
    host: Host, monkeypatch: pytest.MonkeyPatch, what: str, hold: bool
) -> None:
    host.hook("a")
    engine = await host.started()
    await engine.activate()
    owner, name = GETTING_READY[what]
    gate = Gate(owner or host.kernel, name, monkeypatch)
    with host.request(hold=hold) as request:
        handover = asyncio.ensure_future(engine.kexec(replace(request, now=True)))
        await gate.reached.wait()
        remove_memory(host)
        with pytest.raises(Refused, match=HARDWARE):
            await handover  # it is not waited for: it may hang
        gate.open()
    monkeypatch.undo()
    await rolled_back(host, engine)


async def test_an_event_while_a_failed_step_is_held_ends_the_handover(host: Host) -> None:
    """--hold keeps what was done before a step that failed; it is no answer to hardware that is gone."""
    host.hook("a")
    host.kernel.set_fault("load_errno", errno.ENOMEM)
    engine = await host.started()
    failing = asyncio.ensure_future(host.seen(lambda event: event.message.startswith("held at")))
    failing.add_done_callback(lambda _event: remove_memory(host))
    with pytest.raises((NotRolledBack, Refused)):
        await host.kexec(engine, hold=True)
    while engine.machine.phase is not Phase.idle:
        await host.seen(lambda _event: True)
    host.kernel.set_fault("load_errno", None)
    await rolled_back(host, engine)


# A producer that dies


async def peer(engine: Engine, living: Living, verbs: int) -> Peer:
    """A producer that connects and says yes to so many verbs."""
    made = await engine.register_producer("p", Owner(0, "p.service"), living.identity, Registration())

    async def answer() -> None:
        said = None
        for _verb in range(verbs):
            said = Answer((await made.conversation.exchange_answer(said)).serial, AnswerWord.ready)
        await made.conversation.exchange_answer(said)

    answering = asyncio.ensure_future(answer())
    answering.add_done_callback(lambda task: task.cancelled() or task.exception())
    return made


@pytest.mark.parametrize("step", LAST_STEPS)
async def test_a_producer_that_dies_in_the_last_step_ends_the_handover(
    host: Host, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """It was frozen, and what it held went with it."""
    host.hook("a")
    engine = await host.started()
    living = Living()
    frozen = await peer(engine, living, 2)
    operation, call = LAST_STEPS[step]
    gate = Gate(host.kernel, call, monkeypatch)
    handover = asyncio.ensure_future(operation(host, engine))
    await gate.reached.wait()
    living.end()
    engine.registry.peers.remove_peer(frozen)
    gate.open()
    with pytest.raises(Refused, match="Producer p went away"):
        await handover
    await rolled_back(host, engine)


async def test_a_producer_that_dies_with_the_next_order_in_one_turn_comes_first(host: Host) -> None:
    host.hook("a")
    engine = await host.started()
    living = Living()
    frozen = await peer(engine, living, 2)
    await engine.activate()
    living.end()
    engine.registry.peers.remove_peer(frozen)
    with pytest.raises(Refused, match="Producer p went away"):
        await host.kexec(engine)
    await rolled_back(host, engine)


# What found nothing to end


async def test_an_abort_that_finds_nothing_to_end_does_not_reach_the_next_handover(host: Host) -> None:
    host.hook("a")
    engine = await host.started()
    await engine.abort()
    await engine.activate()
    assert engine.machine.phase is Phase.active


async def test_an_abort_while_the_first_checks_run_refuses_that_handover_and_no_other(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.hook("a")
    engine = await host.started()
    gate = Gate(preflight, "run_checks", monkeypatch)
    activation = asyncio.ensure_future(engine.activate())
    await gate.reached.wait()
    await engine.abort()
    with pytest.raises(Failed, match="aborted"):
        await activation
    gate.open()
    assert host.verbs == []
    await engine.activate()
    assert engine.machine.phase is Phase.active


async def test_an_abort_beside_a_test_of_a_producer_does_not_reach_the_next_handover(host: Host) -> None:
    host.hook("a", {"freeze": "sleep 600"}, timeout=600)
    engine = await host.started()
    rehearsal = asyncio.ensure_future(engine.rehearse_producer("a"))
    await host.seen(lambda event: event.message.startswith("a: freeze"))
    await engine.abort()
    with pytest.raises(Failed, match="aborted"):
        await rehearsal
    host.hooks.clear()
    await engine.activate()
    assert engine.machine.phase is Phase.active


async def test_an_event_after_the_jump_was_asked_for_ends_nothing(host: Host) -> None:
    host.hook("a")

    async def jump() -> None:
        remove_memory(host)
        await asyncio.sleep(0)
        host.kernel.reboot_kexec()

    engine = await host.started(orderly=jump)
    with pytest.raises(Rebooted):
        await host.kexec(engine)
    assert host.verbs == TOLD
