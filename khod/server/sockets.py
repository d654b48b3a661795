# SPDX-License-Identifier: LGPL-2.1-or-later
"""The listening sockets, before and after the first client: khod starts without what serves clients."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from khod.early.restore import EarlyClient
    from khod.model import Event
    from khod.server.server import Server

BACKLOG = 64
"""Connections that wait to be accepted: those of root are queued behind this many others."""


class Sockets:
    """Sockets whose clients are served by what `make_server` returns, which is called when the first one has called."""

    def __init__(
        self, sockets: Sequence[socket.socket], make_server: Callable[[Sequence[socket.socket]], Server]
    ) -> None:
        self._sockets = sockets
        self._make_server = make_server
        self._server: Server | None = None
        self._last: Event | None = None
        self._loop = asyncio.get_running_loop()
        for sock in sockets:
            sock.setblocking(False)
            sock.listen(BACKLOG)
            self._loop.add_reader(sock, self._begin_serving)

    def publish_event(self, event: Event) -> None:
        """Send an event to every monitor."""
        self._last = event
        if self._server is not None:
            self._server.monitors.publish_event(event)

    def take_over(self, clients: Sequence[EarlyClient]) -> None:
        """Serve the clients of the early restore."""
        for client in clients:
            self._begin_serving().clients.take_over(client)

    async def close(self, seconds: float) -> None:
        """Accept nobody any more; give the clients this time to take their last answers, and end all connections."""
        if self._server is not None:
            await self._server.close(seconds)
            return
        for sock in self._sockets:
            self._loop.remove_reader(sock)
            sock.close()

    def _begin_serving(self) -> Server:
        if self._server is None:
            for sock in self._sockets:
                self._loop.remove_reader(sock)
            self._server = self._make_server(self._sockets)
            if self._last is not None:
                self._server.monitors.publish_event(self._last)
        return self._server
