"""The listening socket: accepts clients, each with a transport that suits many of them."""

import asyncio
import socket
import weakref
from collections.abc import Callable

from asyncvarlink import VarlinkTransport
from asyncvarlink.protocol import VarlinkBaseProtocol

BACKLOG = 128
FULL = 1.0
"""Seconds until the next try where this process can hold no more connections."""


class Transport(VarlinkTransport):
    """Writes at once what the socket takes, and reads on while a call is served, to see its client go.

    The library (0.3.3) waits for the event loop to write and stops reading for each call: with a thousand producers
    that is half of khod's time.
    """

    def __init__(self, conn: socket.socket, protocol: VarlinkBaseProtocol) -> None:
        super().__init__(asyncio.get_running_loop(), conn, conn, protocol)
        self.socket = conn
        self._queued: asyncio.Future[None] | None = None

    def pause_reading(self) -> None:
        """Read on; the protocol bounds how much comes."""

    def stop_reading(self) -> None:
        """Read no more."""
        super().pause_reading()

    def send_message(self, data: bytes, fds: list[int] | None = None) -> "asyncio.Future[None]":
        sent = 0
        if not fds and not self.is_closing() and (self._queued is None or self._queued.done()):
            try:
                sent = self.socket.send(data)
            except OSError:
                sent = 0  # the library finds out why, and says it
        if sent == len(data):
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            done.set_result(None)
            return done
        self._queued = super().send_message(data[sent:], fds)
        return self._queued


class Listener:
    """Accepts on a socket from the start on."""

    def __init__(self, sock: socket.socket, made: Callable[[], VarlinkBaseProtocol]) -> None:
        """Serve each client with a protocol of its own."""
        self._sock = sock
        self._made = made
        self._clients: weakref.WeakSet[Transport] = weakref.WeakSet()
        sock.setblocking(False)
        sock.listen(BACKLOG)
        asyncio.get_running_loop().add_reader(sock, self._accept)

    def close(self) -> None:
        """Accept nobody any more."""
        asyncio.get_running_loop().remove_reader(self._sock)
        self._sock.close()

    async def wait_closed(self) -> None:
        """Wait until every client is gone."""
        for client in list(self._clients):
            await asyncio.shield(client.closed_future)

    def abort_clients(self) -> None:
        """Hang up on everyone who is left, whatever was still to be said."""
        for client in list(self._clients):
            client.abort()

    def _accept(self) -> None:
        try:
            conn, _ = self._sock.accept()
        except BlockingIOError:
            return
        except OSError:  # no descriptor or no memory left: whoever waits goes on waiting
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._sock)
            loop.call_later(FULL, self._again)
            return
        self._clients.add(Transport(conn, self._made()))

    def _again(self) -> None:
        if self._sock.fileno() >= 0:
            asyncio.get_running_loop().add_reader(self._sock, self._accept)
