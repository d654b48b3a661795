# SPDX-License-Identifier: LGPL-2.1-or-later
"""The descriptors of clients: how many khod holds, which clients wait for room, and how they are closed."""

import fcntl
import os
import socket
import struct
import termios
from collections.abc import Callable, Sequence
from typing import Protocol

from asyncvarlink import FileDescriptor, FileDescriptorArray

from khod.server.closer import Closer
from khod.server.limits import Quota
from khod.wire import MAX_FDS

MAX_PEEKS = 8
"""The number of reads to empty a dropped socket: a sender's buffer is 208 KiB, net.core.wmem_max."""
PEEK_BYTES = 64 << 10


class Waiting(Protocol):
    """A client whose next message has descriptors, for which there was no room."""

    uid: int

    def go_on(self) -> None:
        """Try again."""


class Room:
    """Room for the descriptors that clients pass, for as long as their calls are served."""

    def __init__(self, total: int, per_user: int, closer: Closer | None = None) -> None:
        """Allow `per_user` for each user; `closer` closes them, or None closes them at once: root's are trusted."""
        self._quota = Quota(total, per_user)
        self._closer = closer
        self._waiting: list[Waiting] = []

    def has_room(self, uid: int) -> bool:
        """Whether the descriptors of one more message fit."""
        return self._quota.has_room(uid, MAX_FDS)

    def wait_room(self, client: Waiting) -> None:
        """Continue a client when there is room again."""
        self._waiting.append(client)

    def take_fds(self, uid: int, fds: Sequence[int]) -> None:
        """Count received descriptors, after `has_room`."""
        taken = self._quota.take_amount(uid, len(fds))
        assert taken, "room was asked for before"

    def close_fds(self, uid: int, fds: Sequence[int]) -> None:
        """Close received descriptors."""
        for fd in fds:
            if self._closer is None:
                os.close(fd)
                self._give_back(uid)
            else:
                self._closer.close_later(fd, lambda: self._give_back(uid))

    def _give_back(self, uid: int) -> None:
        self._quota.give_back(uid)
        if self._waiting:
            again = [client for client in self._waiting if self.has_room(client.uid)]
            self._waiting = [client for client in self._waiting if client not in again]
            for client in again:
                client.go_on()


class PassedFiles(FileDescriptorArray):
    """The descriptors of one call, by index; -1 and `true` are not valid indexes."""

    def __init__(self, fds: Sequence[int], close: Callable[[Sequence[int]], None]) -> None:
        """Use `close` to close them when they are no longer needed."""
        super().__init__(self)
        for fd in fds:
            self.add(FileDescriptor(fd))
        self._open = dict(enumerate(fds))
        self._named: set[int] = set()
        self._close = close

    def __getitem__(self, index: int) -> FileDescriptor:
        if isinstance(index, bool) or index < 0:
            raise IndexError(index)
        file = super().__getitem__(index)
        self._named.add(index)
        return file

    def close_unnamed(self) -> None:
        """Close the descriptors that no parameter of the call names."""
        self._close([self._open.pop(index) for index in self._open.keys() - self._named])

    def close_all(self) -> None:
        """Close all of them."""
        self._close([*self._open.values()])
        self._open.clear()


def dispose_socket(sock: socket.socket, closer: Closer, closed: Callable[[], None]) -> None:
    """Close the socket of a client without rights, in `closer` if unread descriptors are in it.

    Closing the last reference to a descriptor may block for ever. MSG_PEEK without space for descriptors shows that
    there are some (MSG_CTRUNC), and neither receives nor drops them.
    """
    try:
        harmless = _is_emptied(sock)
    except OSError:
        harmless = False
    if harmless:
        sock.close()
        closed()
    else:
        closer.close_later(sock.detach(), closed)


def _is_emptied(sock: socket.socket) -> bool:
    """Read and drop what is in a socket, up to a descriptor; return whether it is empty."""
    for _ in range(MAX_PEEKS):
        if not unread_bytes(sock):
            return True
        data, _, flags, _ = sock.recvmsg(PEEK_BYTES, 0, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        if flags & socket.MSG_CTRUNC or not data:
            return False
        sock.recv(len(data), socket.MSG_DONTWAIT)
    return False


def unread_bytes(sock: socket.socket) -> int:
    """Return the number of unread bytes in a socket."""
    (count,) = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.FIONREAD, bytes(4)))
    return int(count)
