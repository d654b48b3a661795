# SPDX-License-Identifier: LGPL-2.1-or-later
"""All clients: each new connection is admitted or refused."""

import asyncio
import select
import socket
from collections.abc import Callable

from khod.config import Access
from khod.early.restore import EarlyClient
from khod.server.access import Caller, Standing
from khod.server.connection import ClientConnection
from khod.server.interfaces import Interfaces
from khod.server.monitors import Monitors
from khod.server.shared import Shared

OTHERS_SEND_BYTES = 32 << 10
"""The send buffer of a client without rights, for answers; the kernel doubles this (socket(7))."""


class Clients:
    """All connections of the server."""

    def __init__(self, interfaces: Interfaces, monitors: Monitors, access: Callable[[], Access]) -> None:
        """Serve the interfaces; `access` is called each time, because of reloads."""
        self.shared = Shared(interfaces, monitors, access)
        self._everyone: set[ClientConnection] = set()
        self._emptied = asyncio.Event()

    def admit_client(self, sock: socket.socket) -> bool:
        """Serve a new client, or hang up if its user has too many; return whether it was admitted with rights."""
        connection = self._admit(sock)
        if connection is None or connection.caller_standing is Standing.other:
            return False
        connection.transport.begin_reading()
        return True

    def take_over(self, client: EarlyClient) -> None:
        """Serve a client of the early restore; one that has gone meanwhile is forgotten."""
        ended = select.poll()
        ended.register(client.socket, select.POLLRDHUP)
        if client.register and ended.poll(0):
            client.socket.close()
        elif not client.register:
            self.admit_client(client.socket)
        elif (connection := self._admit(client.socket)) is not None:
            connection.repeat_registration(client.register, is_told=client.is_told)

    def _admit(self, sock: socket.socket) -> ClientConnection | None:
        caller = Caller(sock)
        if self.shared.places.has_enough(caller.uid):  # many connections of one user are refused as fast as they come
            self.shared.dispose_socket(sock, caller.uid)
            return None
        standing = self.shared.groups.standing_of(caller)
        place = self.shared.places.take_place(caller.uid, standing)
        if place is None:
            self.shared.dispose_socket(sock, caller.uid)
            return None
        sock.setblocking(False)
        if standing is Standing.other:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, OTHERS_SEND_BYTES)
        connection = ClientConnection(self.shared, sock, caller, standing, place, self._forget_connection)
        self._everyone.add(connection)
        return connection

    def _forget_connection(self, connection: ClientConnection) -> None:
        self._everyone.discard(connection)
        if not self._everyone:
            self._emptied.set()

    async def wait_closed(self) -> None:
        """Wait until every client is gone."""
        while self._everyone:
            self._emptied.clear()
            await self._emptied.wait()

    def hang_up_all(self) -> None:
        """End all remaining connections; unsent data is dropped."""
        for connection in list(self._everyone):
            connection.transport.end()
        self.shared.close()
