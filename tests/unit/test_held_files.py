# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files that were handed over with freeze, where the freeze is put back alone (--hold) and tried again."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from khod.config import Config, Policy
from khod.engine import Engine
from khod.errors import KhoError, Refused, Unreachable
from khod.handover.record import Owner
from khod.kernel.probe import Probed
from khod.model import Kept, Phase
from khod.producers.barrier import ProducerCall, Verb
from khod.producers.conversation import Answer, AnswerWord
from khod.producers.identity import process_of
from khod.producers.peer import Peer, Registration
from khod.simulated.kernel import Rebooted
from khod.target.target import Request
from tests.unit.images import bzimage, code
from tests.unit.luo import LuoHost, memfd
from tests.unit.scripted import Scripted, raises
from tests.unit.test_engine_limits import LoadFirst


@pytest.fixture
def host(tmp_path: Path) -> LuoHost:
    return LuoHost(tmp_path)


async def register(engine: Engine) -> Peer:
    process = process_of(os.getpid())
    assert process is not None
    return await engine.register_producer("kv", Owner(0, "kv.service"), process, Registration())


class Giver:
    """What `kv` hands over with each verb, and what it gets back."""

    def __init__(self) -> None:
        self.files: dict[str, list[tuple[Kept, int]]] = {}
        self.came: dict[str, bytes] = {}

    def add(self, verb: str, *files: tuple[str, int, int]) -> None:
        """Hand over from now on with this verb: name, token, descriptor."""
        self.files[verb] = [(Kept(name, token), fd) for name, token, fd in files]

    @asynccontextmanager
    async def serving(self, engine: Engine) -> AsyncIterator[None]:
        peer = await register(engine)

        async def serve() -> None:
            answer = None
            while True:
                command = await peer.conversation.exchange_answer(answer)
                for kept, fd in zip(command.kept, command.fds, strict=True):
                    self.came[kept.name] = os.pread(fd, 100, 0)
                    os.close(fd)
                answer = Answer(command.serial, AnswerWord.ready, files=self.files.get(command.verb.value, []))

        task = asyncio.ensure_future(serve())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError, Unreachable):
                await task
            engine.registry.peers.remove_peer(peer)


@pytest.fixture
def fds() -> Iterator[list[int]]:
    """Four memfds."""
    made = [memfd(f"file {number}".encode()) for number in range(4)]
    yield made
    for fd in made:
        os.close(fd)


async def held(host: LuoHost, engine: Engine) -> None:
    """Begin a handover that somebody vetoes when it freezes, and hold it."""
    Scripted(host, "last", after=("kv",)).does["freeze"] = raises(OSError(16, "busy"))
    with pytest.raises(KhoError, match="held at prepared"):
        await host.kexec(engine, hold=True)
    assert engine.machine.phase is Phase.prepared
    host.hooks[-1].does.clear()  # type: ignore[attr-defined]


async def arrived(host: LuoHost, giver: Giver) -> dict[str, bytes]:
    """What the producer gets back in the next kernel."""
    engine = await host.started()
    async with giver.serving(engine):
        while engine.machine.phase is not Phase.verified:
            await host.seen(lambda _event: True)
    assert host.luo.unclaimed == set()
    return giver.came


@pytest.mark.parametrize("token", [2, 3], ids=["same token", "another token"])
async def test_the_next_try_may_give_the_same_file(host: LuoHost, fds: list[int], token: int) -> None:
    engine, giver = await host.started(), Giver()
    giver.add("prepare", ("table", 1, fds[0]))
    giver.add("freeze", ("tail", 2, fds[1]))
    async with giver.serving(engine):
        await held(host, engine)
        os.pwrite(fds[1], b"newer", 0)
        giver.add("freeze", ("tail", token, fds[1]))
        with pytest.raises(Rebooted):
            await host.kexec(engine, hold=True)
    assert await arrived(host, giver) == {"table": b"file 0", "tail": b"newer1"}


async def test_the_next_try_may_give_another_file_or_none_in_its_place(host: LuoHost, fds: list[int]) -> None:
    engine, giver = await host.started(), Giver()
    giver.add("prepare", ("table", 1, fds[0]))
    giver.add("freeze", ("tail", 2, fds[1]), ("left out", 3, fds[2]))
    async with giver.serving(engine):
        await held(host, engine)
        giver.add("freeze", ("tail", 4, fds[3]))
        with pytest.raises(Rebooted):
            await host.kexec(engine, hold=True)
    assert await arrived(host, giver) == {"table": b"file 0", "tail": b"file 3"}


async def test_what_came_with_prepare_has_its_name_for_good(host: LuoHost, fds: list[int]) -> None:
    engine, giver = await host.started(), Giver()
    giver.add("prepare", ("table", 1, fds[0]))
    giver.add("freeze", ("table", 2, fds[1]))
    async with giver.serving(engine):
        with pytest.raises(KhoError, match="'table' is given to two files"):
            await host.kexec(engine)


async def test_a_freeze_that_took_too_long_costs_nothing_that_came_with_prepare(host: LuoHost, fds: list[int]) -> None:
    """Its file comes into the session when nobody waits for it any more."""
    at_it, go_on, preserve = asyncio.Event(), threading.Event(), host.kernel.preserve_fd
    loop = asyncio.get_running_loop()

    def slowly(session: int, fd: int, token: int) -> None:
        if token == 2:
            loop.call_soon_threadsafe(at_it.set)
            go_on.wait()
        preserve(session, fd, token)

    host.kernel.preserve_fd = slowly  # type: ignore[method-assign]
    peer = await register(await host.started())

    def tell(verb: Verb) -> "asyncio.Future[str | None]":
        return asyncio.ensure_future(peer.carry_out(ProducerCall(verb, "run")))

    prepared = tell(Verb.prepare)
    command = await peer.conversation.exchange_answer(None)
    listening = asyncio.ensure_future(
        peer.conversation.exchange_answer(Answer(command.serial, AnswerWord.ready, files=[(Kept("table", 1), fds[0])]))
    )
    await prepared
    missed = tell(Verb.freeze)
    command = await listening
    tail = [(Kept("tail", 2), fds[1])]
    listening = asyncio.ensure_future(
        peer.conversation.exchange_answer(Answer(command.serial, AnswerWord.ready, files=tail))
    )
    await at_it.wait()
    missed.cancel()  # as at its deadline
    thawed = tell(Verb.thaw)
    await asyncio.sleep(0)
    go_on.set()
    command = await listening
    assert command.verb is Verb.thaw
    listening = asyncio.ensure_future(peer.conversation.exchange_answer(Answer(command.serial, AnswerWord.ready)))
    await thawed
    assert [kept.name for kept in peer.claim.kept] == ["table"]
    frozen = tell(Verb.freeze)
    command = await listening
    listening = asyncio.ensure_future(
        peer.conversation.exchange_answer(Answer(command.serial, AnswerWord.ready, files=tail))
    )
    await frozen
    listening.cancel()
    assert [kept.name for kept in peer.claim.kept] == ["table", "tail"]
    assert host.luo.outgoing == {peer.claim.session_name: [1, 2]}


async def test_a_session_that_was_closed_is_no_yes(host: LuoHost, fds: list[int]) -> None:
    """What is preserved no more must not count as handed over."""
    engine, giver = await host.started(), Giver()
    giver.add("prepare", ("table", 1, fds[0]))
    async with giver.serving(engine):
        await held(host, engine)
        (session,) = engine._resources.sessions.session_names
        engine._resources.sessions.close_session(session)
        with pytest.raises(KhoError, match="preserved no more"):
            await host.kexec(engine)
    assert "reboot" not in host.kernel.calls


@pytest.mark.parametrize("verb", ["prepare", "freeze"])
async def test_a_next_kernel_with_luo_off_is_refused_where_there_are_files(
    host: LuoHost, fds: list[int], verb: str
) -> None:
    engine, giver = await host.started(), Giver()
    giver.add(verb, ("table", 1, fds[0]))
    async with giver.serving(engine):
        with host.request() as request, pytest.raises(Refused, match=r"LUO is off in the next kernel.* kv"):
            await engine.kexec(replace(request, remove=("liveupdate",)))
        assert engine.machine.phase is Phase.idle
        assert (host.kernel.active, host.kernel.loaded) == (False, False)
        with pytest.raises(Rebooted):
            await host.kexec(engine)


async def test_an_image_with_luo_off_that_is_loaded_takes_no_files(host: LuoHost, fds: list[int]) -> None:
    """Files that come after it was loaded: no other image can take its place, so it is not held either."""
    host.prober = lambda: Probed(LoadFirst(host.kernel), "as the test says", "")
    host.config = Config(policy=Policy(unknown_format="warn"))  # the embedded kernel shows no such trees
    engine, giver = await host.started(), Giver()
    giver.add("freeze", ("table", 1, fds[0]))
    async with giver.serving(engine):
        with host.request(load_only=True) as request:
            await engine.kexec(replace(request, remove=("liveupdate",)))
        assert engine.machine.phase is Phase.loaded
        with pytest.raises(Refused, match="LUO is off in the next kernel"):
            await engine.kexec(Request(hold=True))
        assert (await engine.queries.status()).phase is Phase.idle
        assert not host.kernel.loaded


@pytest.mark.parametrize(("line", "lost"), [("root=/dev/sim liveupdate=on", False), ("root=/dev/sim", True)])
async def test_the_line_that_counts_is_the_one_it_boots_with(
    host: LuoHost, fds: list[int], line: str, lost: bool
) -> None:
    """An image may have been built with a command line that overrides what it is given."""
    config = f'CONFIG_KEXEC_HANDOVER=y\nCONFIG_CMDLINE_BOOL=y\nCONFIG_CMDLINE="{line}"\nCONFIG_CMDLINE_OVERRIDE=y\n'
    (host.directory / "vmlinuz").write_bytes(bzimage(contents=code(config=config)))
    engine, giver = await host.started(), Giver()
    giver.add("prepare", ("table", 1, fds[0]))
    async with giver.serving(engine):
        with host.request() as request, pytest.raises(Refused if lost else Rebooted):
            await engine.kexec(request if lost else replace(request, remove=("liveupdate",)))


async def test_a_next_kernel_with_luo_off_is_taken_where_there_are_no_files(host: LuoHost) -> None:
    engine = await host.started()
    async with Giver().serving(engine):
        with host.request() as request, pytest.raises(Rebooted):
            await engine.kexec(replace(request, remove=("liveupdate",)))
