# SPDX-License-Identifier: LGPL-2.1-or-later
"""What producers hand over: what the kernel does not take, whose it is in the next kernel, and what khod keeps open."""

import asyncio
import errno
import fcntl
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from khod.abi.statx import statx
from khod.config import Config, Deadlines
from khod.engine import Engine, transaction
from khod.errors import Exit, Failed, KhoError, Refused, Unreachable
from khod.handover.record import Owner
from khod.kernel.luo import Luo
from khod.kernel.memory import MemoryBounds, read_memory
from khod.kernel.thread import KernelThread
from khod.model import CheckResult, Event, Kept, Phase
from khod.producers.barrier import Verb
from khod.producers.conversation import Answer, AnswerWord
from khod.producers.peer import Registration
from khod.producers.sessions import Sessions
from khod.simulated.kernel import Rebooted
from tests.unit.harness import KeptFds, Living
from tests.unit.hung import silent_file_system
from tests.unit.khods import NOBODY, Khod, reply, run, until
from tests.unit.luo import FakeLuo, Hand, LuoHost, Mortal, System, begin, memfd, one_file

REFUSED = "io.kho.Handover.Refused"
HELD = b"what it holds"
OWNER = Owner(0, "kv.service")


# In the next kernel: whose it is


@pytest.fixture
def host(tmp_path: Path) -> LuoHost:
    return LuoHost(tmp_path)


class Holder:
    """A producer `kv` within khod's process: it says yes to everything, hands a memfd over and takes it back."""

    def __init__(self, engine: Engine, owner: Owner, patience: float) -> None:
        self._engine, self._owner, self._timeout = engine, owner, patience
        self.process = Living()
        self.told: list[str] = []
        self.came: dict[str, bytes] = {}

    async def serve(self) -> None:
        table = memfd(HELD)
        peer = await self._engine.register_producer(
            "kv", self._owner, self.process.identity, Registration(self._timeout)
        )
        try:
            answer = None
            while True:
                command = await peer.conversation.exchange_answer(answer)
                self.told.append(command.verb.value)
                for kept, fd in zip(command.kept, command.fds, strict=True):
                    self.came[kept.name] = os.pread(fd, 100, 0)
                    os.close(fd)
                files = [(Kept("table", 7), table)] if command.verb is Verb.prepare else []
                answer = Answer(command.serial, AnswerWord.ready, files=files)
        finally:
            os.close(table)
            self._engine.registry.peers.remove_peer(peer)


@asynccontextmanager
async def holding(engine: Engine, owner: Owner = OWNER, patience: float = 10.0) -> AsyncIterator[Holder]:
    """A holder beside this khod; KhoError where it is not taken in."""
    holder = Holder(engine, owner, patience)
    serving = asyncio.ensure_future(holder.serve())
    try:
        done, _ = await asyncio.wait({serving}, timeout=0)
        for task in done:
            task.result()
        yield holder
    finally:
        holder.process.end()
        serving.cancel()
        with suppress(asyncio.CancelledError):
            await serving


async def reached(host: LuoHost, engine: Engine, phase: Phase) -> None:
    while engine.machine.phase is not phase:
        await host.seen(lambda _event: True)


async def jump(host: LuoHost, patience: float = 10.0) -> None:
    """Leave a memfd of `kv`'s in the next kernel; nobody of the old one is left."""
    engine = await host.started()
    async with holding(engine, patience=patience):
        await reached_member(host, engine)
        with pytest.raises(Rebooted):
            await host.kexec(engine)


async def reached_member(host: LuoHost, engine: Engine) -> None:
    while [found.name for found in await engine.queries.producers()] != ["kv"]:
        await host.seen(lambda _event: True)


STRANGERS = [Owner(1000, "kv.service"), Owner(0, "other.service"), Owner(0, "")]


@pytest.mark.parametrize("carries", [False, True])
@pytest.mark.parametrize("stranger", STRANGERS, ids=str)
async def test_what_was_left_is_given_to_its_owner_and_to_nobody_else(
    host: LuoHost, stranger: Owner, carries: bool
) -> None:
    host.carries = carries
    await jump(host)
    engine = await host.started()
    with pytest.raises(Refused) as raised:
        async with holding(engine, stranger):
            await reached(host, engine, Phase.verified)
    assert "kv.service" in raised.value.what
    assert str(stranger.uid) in raised.value.what
    async with holding(engine) as holder:
        await reached(host, engine, Phase.verified)
        assert holder.came == {"table": HELD}
        assert holder.told == ["restore", "finish"]
    assert engine.record.verdict is not None
    assert engine.record.verdict.arrived.count("kv") == 1
    assert (host.luo.unclaimed, host.fdstore.kept, host.record.producers) == (set(), {}, ())


async def degraded(host: LuoHost) -> Engine:
    """A khod in whose kernel `kv` did not come in time."""
    host.config = Config(deadlines=Deadlines(restore=0.01))
    await jump(host)
    soon = tuple(replace(holder, timeout=0.2) for holder in host.record.producers)
    host.store.write(replace(host.record, producers=soon))
    engine = await host.started()
    await reached(host, engine, Phase.degraded)
    return engine


async def blocked(engine: Engine) -> bool:
    """Whether what was left keeps the next handover from beginning, and is named."""
    failed = [check for check in await engine.queries.check() if check.result is CheckResult.fail]
    if not failed:
        return False
    assert [check.name for check in failed] == ["claims"]
    assert "kv" in failed[0].evidence
    with pytest.raises(Refused, match="kv"):
        await engine.activate()
    return True


@pytest.mark.parametrize("carries", [False, True])
async def test_what_nobody_claimed_blocks_until_its_owner_comes_late(host: LuoHost, carries: bool) -> None:
    host.carries = carries
    engine = await degraded(host)
    assert await blocked(engine)
    with pytest.raises(Refused):
        async with holding(engine, STRANGERS[0]):
            await reached(host, engine, Phase.verified)
    async with holding(engine) as holder:
        await reached(host, engine, Phase.verified)
        assert holder.came == {"table": HELD}
    status = await engine.queries.status()
    assert (status.phase, status.exit_code, status.last_error) == (Phase.verified, Exit.done, "")
    assert not await blocked(engine)
    assert (host.luo.unclaimed, host.fdstore.kept) == (set(), {})


@pytest.mark.parametrize("carries", [False, True])
async def test_what_nobody_claimed_is_still_its_owner_s_after_a_restart_of_khod(host: LuoHost, carries: bool) -> None:
    host.carries = carries
    await degraded(host)
    engine = await host.started()
    assert engine.machine.phase is Phase.degraded
    assert await blocked(engine)
    with pytest.raises(Refused):
        async with holding(engine, STRANGERS[1]):
            await reached(host, engine, Phase.verified)
    async with holding(engine) as holder:
        await reached(host, engine, Phase.verified)
        assert holder.came == {"table": HELD}


@pytest.mark.parametrize("carries", [False, True])
async def test_what_is_forgotten_is_freed_and_blocks_no_more(host: LuoHost, carries: bool) -> None:
    host.carries = carries
    engine = await degraded(host)
    with pytest.raises(KhoError):
        await engine.forget_producer("vk")
    await engine.forget_producer("kv")
    assert host.luo.unclaimed == set(), "the kernel holds its memory until then"
    assert host.fdstore.kept == {}
    assert not await blocked(engine)
    async with holding(engine, STRANGERS[0]) as holder:
        await engine.activate()
        assert holder.told == ["prepare", "freeze"]
        await engine.abort()


async def test_a_session_that_another_process_has_for_a_moment_is_waited_for(host: LuoHost) -> None:
    """PID 1 has the device open while it starts units."""
    host.luo.busy = 2
    await jump(host)
    host.luo.busy = 2
    engine = await host.started()
    async with holding(engine) as holder:
        await reached(host, engine, Phase.verified)
        assert holder.came == {"table": HELD}


async def test_what_is_called_off_while_it_is_preserved_stays_in_no_session(host: LuoHost) -> None:
    """A guest's memory takes seconds to pin, and an abort does not wait for that to begin."""
    at_it, go_on, preserve = asyncio.Event(), threading.Event(), host.kernel.preserve_fd
    loop = asyncio.get_running_loop()

    def slowly(session: int, fd: int, token: int) -> None:
        loop.call_soon_threadsafe(at_it.set)
        go_on.wait()
        preserve(session, fd, token)

    engine = await host.started()
    async with holding(engine):
        await reached_member(host, engine)
        host.kernel.preserve_fd = slowly  # type: ignore[method-assign]
        activation = asyncio.ensure_future(engine.activate())
        await at_it.wait()
        abort = asyncio.ensure_future(engine.abort())
        await host.seen(lambda event: event.phase is Phase.rolling_back)
        go_on.set()
        await abort
        with pytest.raises(Failed):
            await activation
        assert host.luo.outgoing == {}
        assert host.fdstore.kept == {}
        await engine.activate()
        assert list(host.luo.outgoing.values()) == [[7]]


# Before the jump: what the kernel does not take


@pytest.fixture(scope="module")
def kept_on(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[System, Khod]]:
    """A khod for all tests of the module, and its system."""
    made = System(tmp_path_factory.mktemp("sessions"))
    yield made, made.khod()
    made.close()


@pytest.fixture
def peer(kept_on: tuple[System, Khod]) -> Iterator[Hand]:
    """A producer, told nothing yet."""
    _, khod = kept_on
    made = Mortal(khod, "subject", timeout=10)
    made.ready()
    yield made
    made.close()
    assert khod.khoctl("abort").code == Exit.done
    until(lambda: khod.ask("Producers")["producers"] == [], khod.process)


@pytest.fixture
def activation(kept_on: tuple[System, Khod], peer: Hand) -> Iterator[Any]:
    """An activation whose first verb the producer has heard."""
    with begin(kept_on[1], "Activate") as operation:
        assert peer.told() == "prepare"
        yield operation


def pipe_end() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def sealed() -> int:
    fd = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0x20)  # F_SEAL_EXEC
    return fd


UNPRESERVABLE: dict[str, tuple[Callable[[], int], str, str]] = {
    "pipe": (pipe_end, "ENOENT", "a pipe"),
    "hugetlb": (lambda: os.memfd_create("huge", os.MFD_HUGETLB), "ENOENT", "a hugetlb memfd"),
    "device": (lambda: os.open("/dev/null", os.O_RDWR), "ENOENT", "a character device"),
    "directory": (lambda: os.open("/", os.O_RDONLY | os.O_DIRECTORY), "ENOENT", "a directory"),
    "eventfd": (lambda: os.eventfd(0), "ENOENT", "eventfd"),
    "sealed": (sealed, "F_SEAL_EXEC", "read-only"),
}


@pytest.mark.parametrize("kind", UNPRESERVABLE)
def test_what_cannot_be_preserved_is_a_veto_that_says_why(
    kept_on: tuple[System, Khod], peer: Hand, activation: Any, kind: str
) -> None:
    make, name, words = UNPRESERVABLE[kind]
    fd = make()
    peer.ready(**one_file(fd, name="the table"))
    os.close(fd)
    assert peer.told() == "cancel"
    peer.ready()
    answer = reply(activation)
    assert answer["error"] == REFUSED
    said = answer["parameters"]["what"]
    assert "subject" in said
    assert "the table" in said
    assert name in said
    assert words in said
    put_back(kept_on)


def put_back(kept_on: tuple[System, Khod]) -> None:
    system, khod = kept_on
    assert khod.khoctl("status", "--json").json["phase"] == "idle"
    assert not khod.active
    assert system.emptied()


def veto(peer: Hand, activation: Any) -> str:
    """Take the cancel, and give the reason of the refusal."""
    assert peer.told() == "cancel"
    peer.ready()
    answer = reply(activation)
    assert answer["error"] == REFUSED
    return str(answer["parameters"]["what"])


@pytest.mark.parametrize(
    ("tokens", "names", "same", "word"),
    [
        ([1, 2], ["a", "b"], True, "file"),
        ([1, 1], ["a", "b"], False, "token"),
        ([1, 2], ["a", "a"], False, "name"),
    ],
)
def test_nothing_is_handed_over_twice(
    kept_on: tuple[System, Khod],
    peer: Hand,
    activation: Any,
    tokens: list[int],
    names: list[str],
    same: bool,
    word: str,
) -> None:
    fds = [memfd(), memfd()]
    peer.ready(files=fds[:1] * 2 if same else fds, names=names, tokens=tokens, fds=[0, 1])
    assert word in veto(peer, activation)
    for fd in fds:
        os.close(fd)
    put_back(kept_on)


def test_nor_in_two_answers(kept_on: tuple[System, Khod], peer: Hand, activation: Any) -> None:
    fd, other = memfd(), memfd()
    peer.ready(**one_file(fd))
    assert peer.told() == "freeze"
    assert list(kept_on[0].luo.outgoing.values()) == [[0]]
    peer.ready(**one_file(fd, token=1, name="again"))
    assert peer.told() == "thaw"
    peer.ready()
    assert "twice" in veto(peer, activation)
    os.close(fd)
    os.close(other)
    put_back(kept_on)


def test_a_file_that_another_producer_has_handed_over_is_refused(kept_on: tuple[System, Khod], peer: Hand) -> None:
    other = Mortal(kept_on[1], "other", timeout=10, after=["subject"])
    other.ready()
    fd = memfd()
    with begin(kept_on[1], "Activate") as operation:
        assert peer.told() == "prepare"
        peer.ready(**one_file(fd))
        assert other.told() == "prepare"
        other.ready(**one_file(fd))
        assert other.told() == "cancel"
        other.ready()
        assert "twice" in (said := veto(peer, operation))
        assert "other" in said
    os.close(fd)
    other.close()
    put_back(kept_on)


@pytest.mark.parametrize("token", [0, 2**64 - 1])
@pytest.mark.usefixtures("activation")
def test_a_token_has_64_bits(kept_on: tuple[System, Khod], peer: Hand, token: int) -> None:
    fd = memfd()
    peer.ready(**one_file(fd, token))
    os.close(fd)
    assert peer.told() == "freeze"
    assert list(kept_on[0].luo.outgoing.values()) == [[token]]
    assert set(kept_on[0].kept) == set(kept_on[0].luo.outgoing), "in the service manager's store, whoever dies"


def test_files_with_thaw_are_a_no_and_are_not_kept(kept_on: tuple[System, Khod], peer: Hand, activation: Any) -> None:
    peer.ready()
    assert peer.told() == "freeze"
    peer.send("Next", serial=peer.serial, answer="veto", reason="not now")
    assert peer.told() == "thaw"
    fd = memfd()
    peer.ready(**one_file(fd))
    os.close(fd)
    answer = reply(activation)
    assert answer["error"] == "io.kho.Handover.NotRolledBack"
    assert "prepare and freeze" in answer["parameters"]["what"]
    assert kept_on[0].luo.outgoing == {}
    with begin(kept_on[1], "Abort") as again:
        for verb in ("thaw", "cancel"):
            assert peer.told() == verb
            peer.ready()
        assert "error" not in reply(again)
    put_back(kept_on)


def open_files(khod: Khod) -> int:
    return len(os.listdir(f"/proc/{khod.process.pid}/fd"))


def test_files_of_a_late_answer_are_closed_and_not_preserved(kept_on: tuple[System, Khod]) -> None:
    khod = kept_on[1]
    late = Mortal(khod, "late", timeout=0.2)
    late.ready()
    before = open_files(khod)
    with begin(khod, "Activate") as operation:
        assert late.told() == "prepare"
        # Its undo goes unanswered too, as it stands still.
        assert reply(operation)["error"] == "io.kho.Handover.NotRolledBack"
    fd = memfd()
    late.ready(**one_file(fd))
    os.close(fd)
    assert late.told() == "cancel"
    late.ready()
    until(lambda: open_files(khod) <= before, khod.process)
    assert kept_on[0].luo.outgoing == {}
    late.close()
    assert khod.khoctl("abort").code == Exit.done, "it stood still; now it is gone, and holds nothing"
    assert khod.ask("Producers")["producers"] == []
    put_back(kept_on)


def test_nothing_stays_open_in_khod_over_fifty_handovers(kept_on: tuple[System, Khod]) -> None:
    system, khod = kept_on
    peer = Hand(khod, "subject")
    peer.ready()
    before = open_files(khod)
    for turn in range(50):
        fds = [memfd(), memfd()]
        with begin(khod, "Activate") as operation:
            assert peer.told() == "prepare"
            peer.ready(files=fds, names=["a", "b"], tokens=[1, 2], fds=[0, 1])
            assert peer.told() == "freeze"
            if turn % 3 == 0:
                peer.send("Next", serial=peer.serial, answer="veto")
            else:
                peer.ready(**one_file(fd := memfd(), 3))
                os.close(fd)
                assert "error" not in reply(operation)
                operation.close()
        with begin(khod, "Abort") as abort:
            for verb in ("thaw", "cancel"):
                assert peer.told() == verb
                peer.ready()
            assert "error" not in reply(abort)
        for each in fds:
            os.close(each)
        assert system.emptied()
    until(lambda: open_files(khod) <= before, khod.process)
    peer.close()


def test_another_user_does_not_get_what_root_s_producer_left(system: System) -> None:
    system.configure('[access]\nproducers = "nogroup"\n')
    khod = system.khod()
    peer = Hand(khod, "kv")
    system.mortal.append(peer.close)
    peer.ready()
    with begin(khod, "Activate") as operation:
        assert peer.told() == "prepare"
        fd = memfd()
        peer.ready(**one_file(fd))
        os.close(fd)
        assert peer.told() == "freeze"
        peer.ready()
        assert "error" not in reply(operation)
    system.jump(khod)
    khod = system.khod()
    said = run(["-c", CLAIM, str(khod.socket)], user=NOBODY)
    assert "Refused" in said.err, said
    assert "user 0's" in said.err
    owner = Hand(khod, "kv")
    owner.ready()
    assert owner.told() == "restore"
    assert [os.pread(fd, 100, 0) for fd in owner.fds] == [HELD]
    owner.close()


CLAIM = """
import sys
from pathlib import Path
from khod.producer import Producer
Producer("kv", socket=Path(sys.argv[1])).start()
"""


# How much of it there may be

GIB = 1 << 30


class Host:
    """A kernel with LUO, the service manager's store, and khods one after the other, of which only the sessions run."""

    def __init__(self, directory: Path) -> None:
        self.luo, self.store = FakeLuo(), KeptFds()
        self.bound, self.memory = 100 * GIB, MemoryBounds(64 * GIB, 24 * GIB)
        self._directory = directory
        self._fds: list[int] = []

    def khod(self) -> Sessions:
        calls: Any = self.luo
        return Sessions(
            Luo(calls),
            KernelThread(),
            self.store,
            passed=self.store.passed(),
            max_bytes=lambda: self.bound,
            memory=lambda: self.memory,
            account=self._directory / "sessions.json",
        )

    def file(self, size: int, written: bytes = b"") -> int:
        """A memfd of this size with nothing in it but what is written."""
        self._fds.append(memfd(written))
        os.ftruncate(self._fds[-1], size)
        return self._fds[-1]

    @property
    def taken(self) -> int:
        """How many files the kernel was asked to preserve and preserves."""
        return sum(map(len, self.luo.outgoing.values()))

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self.luo.jump(cold=True)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Host]:
    made = Host(tmp_path)
    yield made
    made.close()


async def refused(sessions: Sessions, session: str, *files: tuple[Kept, int]) -> str:
    with pytest.raises(Refused) as raised:
        await sessions.preserve_files(session, files, 10)
    return str(raised.value)


async def test_holes_for_which_there_is_no_memory_are_refused_before_the_kernel_fills_them(machine: Host) -> None:
    sessions = machine.khod()
    said = await refused(sessions, "khod-1-a", (Kept("table", 1), machine.file(25 * GIB)))
    assert "table (a memfd, 25.0 GiB)" in said
    assert "24.0 GiB of memory are available, and 4.0 GiB of that stay free" in said
    assert "free memory" in said
    await refused(sessions, "khod-1-a", (Kept("table", 1), machine.file(20 * GIB + 1)))
    assert machine.taken == 0
    await sessions.preserve_files("khod-1-a", [(Kept("table", 1), machine.file(20 * GIB))], 10)
    assert machine.taken == 1


async def test_what_has_its_memory_already_needs_none(machine: Host) -> None:
    machine.memory = MemoryBounds(64 * GIB, 0)
    await machine.khod().preserve_files("khod-1-a", [(Kept("table", 1), machine.file(4096, b"all of it"))], 10)
    assert "holes" in await refused(machine.khod(), "khod-1-b", (Kept("more", 1), machine.file(4097, b"not all")))


@pytest.mark.parametrize("own", [True, False], ids=["max_bytes", "memory"])
@pytest.mark.parametrize("by", ["answer", "answers", "producers", "khods"])
async def test_files_that_are_small_enough_one_by_one_are_bounded_together(machine: Host, by: str, own: bool) -> None:
    machine.bound = 40 * GIB if own else 100 * GIB
    machine.memory = MemoryBounds(64 * GIB if own else 40 * GIB, 40 * GIB)
    files = [(Kept(f"part {number}", number), machine.file(15 * GIB)) for number in range(3)]
    sessions = machine.khod()
    if by == "answer":
        said = await refused(sessions, "khod-1-a", *files)
        assert machine.taken == 0, "all of them are looked at before the first is filled"
    else:
        for number, file in enumerate(files[:2]):
            await sessions.preserve_files("khod-1-a" if by != "producers" else f"khod-1-{number}", [file], 10)
        sessions = machine.khod() if by == "khods" else sessions
        said = await refused(sessions, "khod-1-a", files[2])
        assert machine.taken == 2
    assert "part 2 (a memfd, 15.0 GiB)" in said
    assert "45.0 GiB, more than" in said
    assert ("producers.max_bytes: 40.0 GiB" in said) is own
    assert ("raise producers.max_bytes" in said) is own


async def test_what_was_let_go_counts_no_more_for_this_khod_or_the_next(machine: Host) -> None:
    sessions = machine.khod()
    for turn in range(3):
        machine.memory = MemoryBounds(64 * GIB, 64 * GIB)
        await sessions.preserve_files(f"khod-{turn}-a", [(Kept("table", 1), machine.file(60 * GIB))], 10)
        sessions.close_session(f"khod-{turn}-a")
        sessions = machine.khod() if turn == 1 else sessions


async def test_what_the_kernel_refuses_does_not_count(machine: Host) -> None:
    sessions, huge = machine.khod(), os.memfd_create("huge", os.MFD_HUGETLB)
    os.ftruncate(huge, 16 * GIB)
    machine.memory = MemoryBounds(20 * GIB, 20 * GIB)
    assert "ENOENT" in await refused(sessions, "khod-1-a", (Kept("huge", 1), huge))
    await sessions.preserve_files("khod-1-a", [(Kept("table", 1), machine.file(16 * GIB))], 10)
    os.close(huge)


@pytest.mark.parametrize("other", ["khod-1-a", "khod-1-b"], ids=["same", "another"])
async def test_a_file_is_preserved_once_where_two_calls_bring_it(machine: Host, other: str) -> None:
    sessions, one = machine.khod(), machine.file(4096)
    await sessions.preserve_files("khod-1-a", [(Kept("first", 1), machine.file(4096))], 10)
    first, second = await asyncio.gather(
        sessions.preserve_files("khod-1-a", [(Kept("table", 2), one)], 10),
        sessions.preserve_files(other, [(Kept("again", 3), one)], 10),
        return_exceptions=True,
    )
    assert first is None
    assert "twice" in str(second)
    assert machine.taken == 2


async def test_what_could_not_be_preserved_may_be_handed_over_again(machine: Host) -> None:
    sessions, one, two = machine.khod(), machine.file(4096), machine.file(4096)
    preserve, create = machine.luo.preserve_fd, machine.luo.create_session

    def no_session(name: str) -> int:
        raise OSError(errno.ENOSPC, "no room", name)

    def only_one(session: int, fd: int, token: int) -> None:
        if machine.taken:
            raise OSError(errno.ENOMEM, "no memory")
        preserve(session, fd, token)

    machine.luo.create_session = no_session  # type: ignore[method-assign]
    await refused(sessions, "khod-1-a", (Kept("one", 1), one))
    machine.luo.create_session = create  # type: ignore[method-assign]
    machine.luo.preserve_fd = only_one  # type: ignore[method-assign]
    await refused(sessions, "khod-1-a", (Kept("one", 1), one), (Kept("two", 2), two))
    machine.luo.preserve_fd = preserve  # type: ignore[method-assign]
    assert "twice" in await refused(sessions, "khod-1-a", (Kept("one", 3), one)), "the kernel has it"
    await sessions.preserve_files("khod-1-a", [(Kept("two", 4), two)], 10)
    assert machine.taken == 2
    sessions.close_session("khod-1-a")
    await sessions.preserve_files("khod-1-b", [(Kept("one", 1), one)], 10)


async def test_a_file_that_grows_until_it_is_preserved_is_let_go_at_once(machine: Host) -> None:
    """The kernel cannot be told how much it may take at most; from the call on the size stays."""
    preserve = machine.luo.preserve_fd

    def too_late(session: int, fd: int, token: int) -> None:
        os.ftruncate(fd, 1 << 40)
        preserve(session, fd, token)

    machine.luo.preserve_fd = too_late  # type: ignore[method-assign]
    sessions = machine.khod()
    said = await refused(sessions, "khod-1-a", (Kept("table", 1), machine.file(4096)))
    assert "table (a memfd, 4.0 KiB) grew to 1.0 TiB" in said
    assert machine.store.kept == {}
    machine.luo.preserve_fd = preserve  # type: ignore[method-assign]
    await sessions.preserve_files("khod-1-b", [(Kept("table", 1), machine.file(4096))], 10)
    assert list(machine.luo.outgoing) == ["khod-1-b"]


SILENT = """
import asyncio, errno, os
from khod.errors import Refused
from khod.kernel.luo import Luo
from khod.kernel.thread import KernelThread
from khod.model import Kept
from khod.producers.sessions import Sessions
class Calls:
    def create_session(self, name):
        return os.pipe()[1]
    def preserve_fd(self, session, fd, token):
        raise OSError(errno.ENOENT, "no handler")
class Store:
    def store_fd(self, name, fd):
        pass
    async def wait_settled(self):
        pass
async def main():
    sessions = Sessions(Luo(Calls()), KernelThread(), Store())
    try:
        await sessions.preserve_files("khod-1-a", [(Kept("table", 1), os.open({path!r}, os.O_PATH))], 10)
    except Refused as error:
        print(error.what)
asyncio.run(main())
"""


def test_a_descriptor_of_a_file_system_that_does_not_answer_holds_nobody_up(tmp_path: Path) -> None:
    """fstat(2) asks the file system; whoever sends such a descriptor would stop khod for good."""
    with silent_file_system(tmp_path / "mnt") as silent:
        ended = run(["-c", SILENT.format(path=str(silent))])
    assert "table (a directory) cannot be preserved: ENOENT" in ended.out, ended


async def test_without_a_word_on_memory_nothing_is_preserved(machine: Host) -> None:
    def unreadable() -> MemoryBounds:
        raise OSError(errno.EIO, "Input/output error")

    calls: Any = machine.luo
    sessions = Sessions(Luo(calls), KernelThread(), machine.store, memory=unreadable)
    assert "Input/output error" in await refused(sessions, "khod-1-a", (Kept("table", 1), machine.file(4096)))


async def test_an_account_that_cannot_be_written_is_a_refusal(machine: Host, tmp_path: Path) -> None:
    (tmp_path / "sessions.json.new").mkdir()
    said = await refused(machine.khod(), "khod-1-a", (Kept("table", 1), machine.file(4096)))
    assert str(tmp_path / "sessions.json") in said


def test_a_sparse_memfd_of_a_producer_is_refused(kept_on: tuple[System, Khod], peer: Hand, activation: Any) -> None:
    """It costs its owner nothing, and the host all of its memory."""
    fd = os.memfd_create("sparse")
    os.ftruncate(fd, 1 << 50)
    peer.ready(**one_file(fd))
    os.close(fd)
    said = veto(peer, activation)
    assert "table (a memfd, 1.0 PiB)" in said
    assert "the memory of this host" in said
    put_back(kept_on)


def test_memory_is_what_proc_says_within_the_limits_of_the_control_groups(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:  8 kB\nMemFree: 1 kB\nMemAvailable:   6 kB\n")
    assert read_memory(tmp_path) == MemoryBounds(8192, 6144)
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/x\n0::/a.slice/b.service\n")
    for group, most, current in (("a.slice/b.service", "max", 10), ("a.slice", "5000", 904)):
        at = tmp_path / "sys/fs/cgroup" / group
        at.mkdir(parents=True, exist_ok=True)
        (at / "memory.max").write_text(f"{most}\n")
        (at / "memory.current").write_text(f"{current}\n")
    assert read_memory(tmp_path) == MemoryBounds(8192, 4096)
    (tmp_path / "proc/meminfo").write_text("MemTotal:  8 kB\n")
    with pytest.raises(ValueError, match="invalid literal"):
        read_memory(tmp_path)


def test_statx_says_what_fstat_does() -> None:
    for fd in (memfd(b"a" * 5000), pipe_end(), os.open("/", os.O_RDONLY), os.open("/dev/null", os.O_RDWR)):
        found, stat = statx(fd), os.fstat(fd)
        said = (found.mode, found.ino, found.size, found.blocks, found.blksize)
        assert said == (stat.st_mode, stat.st_ino, stat.st_size, stat.st_blocks, stat.st_blksize)
        assert os.makedev(*found.dev) == stat.st_dev
        os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor") as raised:
        statx(fd)
    assert raised.value.errno == errno.EBADF


# The host goes down while something is held: systemd stops what is ordered after khod before khod itself


async def down() -> bool:
    return True


async def stays_up() -> bool:
    return False


async def test_a_frozen_producer_that_the_shutdown_stops_goes_along(host: LuoHost) -> None:
    host.shutdown, host.goes_down, host.carries = down, down, True
    engine = await host.started()
    async with holding(engine):
        await reached_member(host, engine)
        await host.kexec(engine, load_only=True)
    await engine.stop(jumping=True, going_down=True)
    assert "unload" not in host.kernel.calls
    with pytest.raises(Rebooted):
        host.kernel.reboot_kexec()
    host.shutdown = host.goes_down = stays_up
    engine = await host.started()
    async with holding(engine) as holder:
        await reached(host, engine, Phase.verified)
        assert holder.came == {"table": HELD}


async def test_a_frozen_producer_that_leaves_an_unharmed_host_ends_the_handover(host: LuoHost) -> None:
    host.shutdown = host.goes_down = stays_up
    engine = await host.started()
    async with holding(engine):
        await reached_member(host, engine)
        await host.kexec(engine, load_only=True)
    await reached(host, engine, Phase.idle)
    assert "kv went away" in engine.record.last_error
    assert host.kernel.calls[-2:] == ["unload", "active=0"]
    assert engine.record.interrupted == ""


async def test_the_jump_waits_until_systemd_has_said_why_a_producer_left(host: LuoHost) -> None:
    asked, answer = asyncio.Event(), asyncio.Event()

    async def hesitates() -> bool:
        asked.set()
        await answer.wait()
        return False

    def leaves(event: Event) -> bool:
        if event.phase is Phase.executing:
            for peer in engine.registry.peers.all_peers():
                engine.registry.peers.remove_peer(peer)
        return False

    host.shutdown = host.goes_down = hesitates
    engine = await host.started()
    with suppress(Unreachable):  # what the holder is told of the end of its connection
        async with holding(engine, patience=3.0):  # the undo waits that long for a producer that has left
            await reached_member(host, engine)
            watching = asyncio.ensure_future(host.seen(leaves))
            handover = asyncio.ensure_future(host.kexec(engine))
            await asked.wait()
            answer.set()
            with pytest.raises(Refused, match="kv went away"):
                await handover
            watching.cancel()
    assert "reboot" not in host.kernel.calls


@pytest.mark.parametrize("late", [False, True], ids=["at once", "after the rollback"])
async def test_a_shutdown_that_ends_a_handover_before_khod_is_stopped_is_said_after_the_boot(
    host: LuoHost, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transaction, "SHUTDOWN_SECONDS", 0)
    over = asyncio.Event()

    async def answers() -> bool:
        if late:
            await over.wait()
        return True

    host.shutdown, host.goes_down = down, answers
    engine = await host.started()
    async with holding(engine):
        await reached_member(host, engine)
        await engine.activate()  # no image is loaded: this shutdown is none into the next kernel
    await reached(host, engine, Phase.idle)
    over.set()
    await engine.stop(jumping=False, going_down=True)
    with host.request() as request:
        assert request.kernel is not None
        host.kernel.kexec_file_load(request.kernel.fd, request.initrds[0].fd, b"root=/dev/sim\0", 0)
    host.kernel.set_fault("cold", True)
    with pytest.raises(Rebooted):
        host.kernel.reboot_kexec()
    host.shutdown = host.goes_down = stays_up
    status = await (await host.started()).queries.status()
    assert (status.phase, status.exit_code) == (Phase.cold_boot, Exit.degraded)
    assert "a handover was at active" in status.last_error
