# SPDX-License-Identifier: LGPL-2.1-or-later
"""One client's socket and the descriptors that come over it."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from khod.server.closer import Closer
from khod.server.files import PassedFiles, Room, dispose_socket
from khod.server.lane import Lane
from khod.server.limits import Quota
from khod.server.transport import Transport
from khod.wire import MAX_FDS
from tests.unit.turns import until

ALICE, BOB = 1000, 1001
TURN_SECONDS = 60.0  # so long that no turn of a test ends early

# Descriptors


@pytest.mark.parametrize("index", [-1, -2, 2, 253, True, False])
def test_an_index_that_is_none_of_the_passed_descriptors(index: int) -> None:
    closed: list[int] = []
    files = PassedFiles([os.dup(1), os.dup(1)], closed.extend)
    with pytest.raises(IndexError):
        files[index]
    files.close_all()
    for fd in closed:
        os.close(fd)


def test_what_no_parameter_names_is_closed_at_once() -> None:
    closed: list[int] = []
    files = PassedFiles([10, 11, 12], closed.extend)
    assert files[1].fileno() == 11
    files.close_unnamed()
    assert sorted(closed) == [10, 12]
    files.close_all()
    assert sorted(closed) == [10, 11, 12]


class Waiting:
    """A client that waits for room."""

    def __init__(self, uid: int) -> None:
        self.uid = uid
        self.went_on = 0

    def go_on(self) -> None:
        self.went_on += 1


def test_who_finds_no_room_goes_on_when_there_is_some_and_one_user_does_not_take_all() -> None:
    room = Room(2 * MAX_FDS, MAX_FDS)
    mine = [os.dup(1) for _ in range(MAX_FDS)]
    room.take_fds(ALICE, mine)
    assert not room.has_room(ALICE)
    assert room.has_room(BOB)
    alice = Waiting(ALICE)
    room.wait_room(alice)
    room.close_fds(ALICE, mine[:1])
    assert alice.went_on == 0, "the largest message would not fit"
    room.close_fds(ALICE, mine[1:])
    assert alice.went_on == 1


async def test_a_socket_with_descriptors_in_it_is_closed_by_a_thread() -> None:
    """The last reference to somebody else's file may block whoever drops it."""
    closer, closed = Closer("test"), asyncio.Event()
    ours, theirs = socket.socketpair()
    socket.send_fds(theirs, [b"x"], [1])
    dispose_socket(ours, closer, closed.set)
    assert closer.count_waiting == 1
    await closed.wait()
    assert closer.count_waiting == 0
    with suppress(ConnectionResetError):
        assert theirs.recv(1) == b""
    theirs.close()


@pytest.mark.parametrize("unread", [0, 1, 100_000])
async def test_a_socket_without_is_closed_at_once(unread: int) -> None:
    closer, closed = Closer("test"), asyncio.Event()
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    theirs.sendall(bytes(unread))
    dispose_socket(ours, closer, closed.set)
    assert closed.is_set()
    with suppress(ConnectionResetError):
        assert theirs.recv(1) == b""
    theirs.close()


# One socket


class Owner:
    """Whose socket it is: what it was told."""

    def __init__(self, *, may_send_files: bool = False, max_bytes: int = 100) -> None:
        self.max_bytes = max_bytes
        self.may_send_files = may_send_files
        self.messages: list[tuple[bytes, int]] = []
        self.refused: list[str] = []
        self.drained_ = self.hung_up_ = self.lost_ = 0
        self.transport: Transport | None = None
        self.room = Room(MAX_FDS, MAX_FDS)

    def on_message(self, text: bytes, fds: list[int]) -> None:
        self.messages.append((text, len(fds)))
        self.room.close_fds(ALICE, fds)

    def refuse_input(self, what: str) -> None:
        self.refused.append(what)
        assert self.transport is not None
        self.transport.close()

    def refuse_files(self) -> None:
        self.refuse_input("files")

    def on_drained(self) -> None:
        self.drained_ += 1

    def hung_up(self) -> None:
        self.hung_up_ += 1

    def on_lost(self, sock: socket.socket) -> None:
        self.lost_ += 1
        sock.close()


@asynccontextmanager
async def line(owner: Owner, buffered: Quota | None = None) -> AsyncIterator[tuple[Transport, socket.socket]]:
    """A transport, and the socket at the other end."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    lane = Lane(TURN_SECONDS)
    owner.transport = Transport(ours, ALICE, owner, lane, buffered=buffered, room=owner.room)
    try:
        yield owner.transport, theirs
    finally:
        owner.transport.end()
        lane.close()
        theirs.close()


async def test_messages_come_one_at_a_time_and_the_next_one_when_asked_for() -> None:
    owner = Owner()
    async with line(owner) as (transport, theirs):
        theirs.send(b"first\0second\0th")
        await until(lambda: owner.messages == [(b"first", 0)])
        transport.resume_reading()
        await until(lambda: len(owner.messages) == 2)
        theirs.send(b"ird\0")
        transport.resume_reading()
        await until(lambda: owner.messages[1:] == [(b"second", 0), (b"third", 0)])


async def test_a_client_that_goes_while_its_call_is_served_is_seen_to_go() -> None:
    owner = Owner()
    async with line(owner) as (_transport, theirs):
        theirs.send(b"call\0and more that is not read")
        await until(lambda: bool(owner.messages))
        theirs.shutdown(socket.SHUT_WR)
        await until(lambda: owner.hung_up_ > 0)
        assert not owner.lost_, "it may still read its answer"
        theirs.close()
        await until(lambda: owner.lost_ == 1)


@pytest.mark.parametrize("size", [100, 101])
async def test_a_message_has_a_bound(size: int) -> None:
    owner = Owner(max_bytes=100)
    async with line(owner) as (_transport, theirs):
        theirs.send(b"x" * size)
        theirs.send(b"\0")
        await until(lambda: bool(owner.messages or owner.refused))
        assert bool(owner.refused) is (size > 100)


async def test_what_a_user_does_not_read_is_bounded_and_given_back() -> None:
    quota, owner = Quota(1 << 20), Owner()
    async with line(owner, quota) as (transport, _theirs):
        for _answer in range(100):
            transport.send_data(bytes(1 << 16))
        await until(lambda: owner.lost_ == 1)
        assert quota.unused_amount == 1 << 20


async def test_what_a_user_reads_late_is_given_back_too() -> None:
    quota, owner, received = Quota(1 << 20), Owner(), 0
    async with line(owner, quota) as (transport, theirs):
        transport.send_data(bytes(1 << 20))
        assert not transport.is_drained
        assert quota.unused_amount < 1 << 20
        while received < 1 << 20:
            with suppress(BlockingIOError):
                received += len(theirs.recv(1 << 20))
            await asyncio.sleep(0)
        await until(lambda: owner.drained_ == 1)
        assert quota.unused_amount == 1 << 20


async def test_what_is_to_be_read_and_cannot_be_ends_the_connection() -> None:
    """Out-of-band data wakes khod again and again."""
    owner = Owner()
    async with line(owner) as (_transport, theirs):
        theirs.send(b"x", socket.MSG_OOB)
        await until(lambda: owner.lost_ == 1 or bool(owner.messages))


async def test_descriptors_come_with_their_message_and_no_other() -> None:
    owner = Owner(may_send_files=True)
    async with line(owner) as (transport, theirs):
        theirs.send(b"none\0")
        socket.send_fds(theirs, [b"two\0none\0"], [0, 0])
        socket.send_fds(theirs, [b"half of one"], [0])
        theirs.send(b", the other half\0")
        heard = 0
        while heard < 4:
            await asyncio.sleep(0)
            if len(owner.messages) > heard:
                heard = len(owner.messages)
                transport.resume_reading()
        assert [count for _text, count in owner.messages] == [0, 2, 0, 1]


async def test_descriptors_of_whoever_may_not_send_them_are_refused_and_never_taken_in() -> None:
    owner = Owner()
    async with line(owner) as (_transport, theirs):
        during = len(os.listdir("/proc/self/fd"))
        socket.send_fds(theirs, [b"call\0"], [0] * MAX_FDS)
        await until(lambda: owner.refused == ["files"])
        assert len(os.listdir("/proc/self/fd")) <= during
        assert owner.messages == []


async def test_descriptors_wait_until_there_is_room() -> None:
    owner = Owner(may_send_files=True)
    async with line(owner) as (_transport, theirs):
        mine = [os.dup(0)]
        owner.room.take_fds(ALICE, mine)
        socket.send_fds(theirs, [b"call\0"], [0])
        for _turn in range(10):
            await asyncio.sleep(0)
        assert owner.messages == []
        owner.room.close_fds(ALICE, mine)
        await until(lambda: owner.messages == [(b"call", 1)])
