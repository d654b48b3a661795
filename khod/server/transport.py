# SPDX-License-Identifier: LGPL-2.1-or-later
"""The socket of one client: complete messages are received one at a time, and answers are sent at once.

While a call is served nothing more is read: what a client sends meanwhile stays in the kernel, on the client's account,
and so do the calls of a client that does not read its answers. A hangup is noticed all the same.
"""

import array
import select
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from khod.abi.peercred import pass_rights
from khod.server.files import Room
from khod.server.lane import Lane
from khod.server.limits import FREE_BYTES, Quota
from khod.wire import MAX_FDS

CHUNK_BYTES = 16 << 10
OTHERS_CHUNK_BYTES = 4 << 10
MAX_IDLE_READS = 16
"""How often epoll may report a socket as readable without data in it: out-of-band data causes that."""

READ = select.EPOLLIN
WRITE = select.EPOLLOUT
HALF_CLOSED = select.EPOLLRDHUP
GONE = select.EPOLLHUP | select.EPOLLERR


class MessageHandler(Protocol):
    """The owner of the socket, and what it is told."""

    @property
    def max_bytes(self) -> int:
        """The maximum size of a message that the client may send now."""

    @property
    def may_send_files(self) -> bool:
        """Whether the client may send descriptors now."""

    def on_message(self, text: bytes, fds: list[int]) -> None:
        """Receive a message and its descriptors; `resume_reading` lets the next one come."""

    def refuse_input(self, what: str) -> None:
        """Answer that the input is not a message, and hang up."""

    def refuse_files(self) -> None:
        """Answer that the client may not send descriptors, and hang up."""

    def on_drained(self) -> None:
        """Called when the client has read all that was sent."""

    def hung_up(self) -> None:
        """Called when the client will send nothing more; it may still read."""

    def on_lost(self, sock: socket.socket) -> None:
        """Close the socket, because the connection has ended."""


class Transport:
    """The socket of one client, served in the turns of a lane.

    One class of this size: reading, writing and the room for both are one state, which epoll(7) drives.
    """

    def __init__(
        self, sock: socket.socket, uid: int, owner: MessageHandler, lane: Lane, *, buffered: Quota | None, room: Room
    ) -> None:
        """Begin to read; `buffered` limits the bytes held in both directions (None for root), `room` descriptors."""
        self.uid = uid
        self.events = 0
        self.is_open = True
        self._socket = sock
        self._owner = owner
        self._lane = lane
        self._buffered = buffered
        self._counted_bytes = 0
        self._room = room
        self._input = bytearray()
        self._searched = 0
        self._fds: list[int] = []
        self._output: deque[tuple[memoryview, tuple[int, ...], Callable[[], None]]] = deque()
        self._output_bytes = 0
        self._held = False
        """Whether reading is stopped, because a call is served or there is no room for descriptors."""
        self._closing = False
        self._broken = False
        self._idle_reads = 0
        self._watched = READ | HALF_CLOSED
        lane.add_member(sock.fileno(), self, self._watched)

    @property
    def is_drained(self) -> bool:
        """Whether the client has read all that was sent."""
        return not self._output

    def move_to_lane(self, lane: Lane) -> None:
        """Move to another lane, for all further turns."""
        self._lane.remove_member(self._socket.fileno())
        self._lane = lane
        lane.add_member(self._socket.fileno(), self, self._watched)

    def let_send_files(self, *, allowed: bool) -> None:
        """Let the kernel accept or refuse descriptors before they are sent, if it can."""
        with suppress(OSError):  # it cannot before Linux 6.16: then khod notices them itself
            pass_rights(self._socket, allowed=allowed)

    def submit_work(self, work: Callable[[], None]) -> None:
        """Run work for this client in its turn."""
        self._lane.submit_work(self, work)

    def begin_reading(self) -> None:
        """Read what the client has already sent, without waiting for a turn."""
        self.events |= READ
        self.handle_ready()

    def pass_message(self, text: bytes) -> None:
        """Pass on a message that was read off the socket before; `resume_reading` lets the next one come."""
        self._held = True
        self._owner.on_message(text, [])

    def handle_ready(self) -> None:
        """Handle the last events of epoll(7); read at most one message."""
        events, self.events = self.events, 0
        if self.is_open and events & WRITE:
            self._flush_data()
        if not self.is_open:
            return
        if events & GONE and (self._held or self._closing or not self._owner.may_send_files):
            self.end()
        elif self._held:
            # New input waits in the kernel. A client that has hung up will send nothing more, so a monitor ends.
            self._watch(drop=events & (READ | HALF_CLOSED))
            if events & HALF_CLOSED:
                self._owner.hung_up()
        elif events & (READ | HALF_CLOSED | GONE) and not self._closing:
            self._receive_message()

    # Reading

    def _receive_message(self) -> None:
        try:
            data = self._read_socket()
        except BlockingIOError:
            self._idle_reads += 1
            if self._idle_reads > MAX_IDLE_READS:
                self.end()
            return
        except OSError:
            self.end()
            return
        if data is None:
            return
        if not data:
            self._owner.hung_up()
            self.close()
            return
        self._idle_reads = 0
        self._input += data
        self._next_message()

    def _read_socket(self) -> bytes | None:
        """Read available data, with descriptors at most one message; return None if descriptors prevent it.

        Descriptors from a client that may not send any are never received by this process.
        """
        may_send_files = self._owner.may_send_files
        size = CHUNK_BYTES if may_send_files else OTHERS_CHUNK_BYTES
        data, _, flags, _ = self._socket.recvmsg(size, 0, socket.MSG_PEEK)
        if not flags & socket.MSG_CTRUNC:
            return self._socket.recv(len(data)) if data else data
        if not may_send_files:
            self._owner.refuse_files()
            return None
        if not self._room.has_room(self.uid):
            self._held = True
            self._watch(drop=READ)
            self._room.wait_room(self)
            return None
        return self._read_with_files(data.find(0) + 1 or len(data))

    def _read_with_files(self, size: int) -> bytes | None:
        # Read to the end of the message and no further: descriptors are received with the bytes they were sent with.
        space = socket.CMSG_SPACE((MAX_FDS - len(self._fds)) * array.array("i").itemsize)
        data, messages, flags, _ = self._socket.recvmsg(size, space, socket.MSG_CMSG_CLOEXEC)
        fds = array.array("i")
        for level, kind, content in messages:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
        self._room.take_fds(self.uid, fds)
        self._fds += fds
        if flags & socket.MSG_CTRUNC:
            self._owner.refuse_input(
                f"More than {MAX_FDS} descriptors came with one message, khod has no room for them, or its AppArmor "
                "profile forbids one"
            )
            return None
        return data

    def go_on(self) -> None:
        """Continue reading, because there is room for descriptors again."""
        if self.is_open:
            self._held = False
            self._watch(add=READ)

    def _next_message(self) -> None:
        """Pass on the next message if it is complete."""
        end = self._input.find(0, self._searched)
        length = len(self._input) if end < 0 else end
        if length > self._owner.max_bytes:
            self._owner.refuse_input(f"The message is longer than {self._owner.max_bytes} bytes")
        elif not self._count_buffered():
            self._owner.refuse_input("Too many unfinished messages and unread answers of this user's are held already")
        elif end < 0:
            self._searched = length
        else:
            text = bytes(self._input[:end])
            del self._input[: end + 1]
            self._searched = 0
            self._count_buffered()
            fds, self._fds = self._fds, []
            self._held = True
            self._owner.on_message(text, fds)

    def resume_reading(self) -> None:
        """Receive the next message, because the one before is answered."""
        if not self.is_open or self._closing:
            return
        if b"\0" in self._input:
            self.submit_work(self._go_on_with_input)
        else:
            self._held = False
            self._watch(add=READ)

    def _go_on_with_input(self) -> None:
        if self.is_open and not self._closing:
            self._next_message()

    # Writing

    def send_data(self, data: bytes, fds: tuple[int, ...] = (), sent: Callable[[], None] = lambda: None) -> None:
        """Send data, and keep what the socket does not accept; `sent` is called when it is no longer needed."""
        count = 0
        if not data or not self.is_open or self._closing or self._broken:
            sent()
            return
        if not self._output:
            count = self._write_socket(data, fds)
        if count == len(data) or self._broken:
            sent()
            return
        self._output.append((memoryview(data)[count:], () if count else fds, sent))
        self._output_bytes += len(data) - count
        self._watch(add=WRITE)
        if not self._count_buffered():
            self._break_soon()

    def _write_socket(self, data: bytes | memoryview, fds: tuple[int, ...]) -> int:
        try:
            return socket.send_fds(self._socket, [data], fds) if fds else self._socket.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            self._break_soon()
            return 0

    def _break_soon(self) -> None:
        """End the connection in its turn, because nothing can be sent any more."""
        self._broken = True
        self.submit_work(self.end)

    def _flush_data(self) -> None:
        while self._output and not self._broken:
            data, fds, sent = self._output[0]
            count = self._write_socket(data, fds)
            self._output_bytes -= count
            if count < len(data):
                self._output[0] = (data[count:], () if count else fds, sent)
                break
            self._output.popleft()
            sent()
        self._count_buffered()
        if not self._output:
            self._watch(drop=WRITE)
            if self._closing:
                self.end()
            else:
                self._owner.on_drained()

    # The end

    def close(self) -> None:
        """End the connection after all data is sent; read nothing more."""
        if self.is_open and not self._closing:
            self._closing = True
            self._watch(drop=READ | HALF_CLOSED)
            if not self._output:
                self.submit_work(self.end)

    def abort_connection(self) -> None:
        """End the connection at once; unsent data is dropped."""
        self.end()

    def end(self) -> None:
        """End the connection at once and release all that it held."""
        if not self.is_open:
            return
        self.is_open = False
        self._lane.remove_member(self._socket.fileno())
        self._room.close_fds(self.uid, self._fds)
        for _, _, sent in self._output:
            sent()
        self._output.clear()
        self._input.clear()
        self._output_bytes = 0
        self._count_buffered()
        self._owner.on_lost(self._socket)

    # The bytes it holds

    def _count_buffered(self) -> bool:
        """Count the bytes held beyond the free part; return False if they are too many."""
        if self._buffered is None:
            return True
        held = max(0, len(self._input) + self._output_bytes - FREE_BYTES)
        if held > self._counted_bytes and not self._buffered.take_amount(self.uid, held - self._counted_bytes):
            return False
        if held < self._counted_bytes:
            self._buffered.give_back(self.uid, self._counted_bytes - held)
        self._counted_bytes = held
        return True

    def _watch(self, add: int = 0, drop: int = 0) -> None:
        watched = (self._watched | add) & ~drop
        if watched != self._watched and self.is_open:
            self._watched = watched
            self._lane.watch_events(self._socket.fileno(), watched)
