# SPDX-License-Identifier: LGPL-2.1-or-later
"""The listening socket: it accepts a few clients at a time, so that admitted clients continue to be served."""

import asyncio
import socket
import time
from contextlib import suppress

from khod.abi.peercred import pass_rights
from khod.server.clients import Clients
from khod.server.load import ACCEPT_SHARE, ACCEPT_SHARE_BUSY, Allowance

TURN_SECONDS = 0.001
"""How long connections are accepted in one turn of the event loop."""
MAX_CHARGE_SECONDS = 0.01
"""What one turn is charged at most. It may have been preempted, or have imported what serves the first client; while
something is under way the pause after it is 20 times as long, and those of root wait in the same queue."""
RETRY_SECONDS = 0.1
"""The time until the next attempt if this process has no free descriptors."""


class Listener:
    """Accepts clients on a socket that listens, and does not block."""

    def __init__(self, sock: socket.socket, clients: Clients) -> None:
        """Pass each client to `clients`."""
        self._socket = sock
        self._clients = clients
        self._loop = asyncio.get_running_loop()
        self._allowance = Allowance(clients.shared.load.make_share(ACCEPT_SHARE, ACCEPT_SHARE_BUSY))
        self._trusts = True
        self._timer: asyncio.TimerHandle | None = None
        clients.shared.load.on_relief.append(self._look_again)
        self._begin = asyncio.ensure_future(self._accept_when_groups_are_known())

    async def _accept_when_groups_are_known(self) -> None:
        """Start when the groups are known, or after a time: descriptors of operators may have come before the start."""
        await self._clients.shared.groups.wait_lookup()
        self._loop.add_reader(self._socket, self._accept_clients)

    def close(self) -> None:
        """Stop accepting."""
        self._begin.cancel()
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._socket)
        self._socket.close()

    def _accept_clients(self) -> None:
        began = time.monotonic()
        until = began + min(TURN_SECONDS, self._allowance.left_seconds())
        wait_seconds = 0.0
        try:
            while time.monotonic() < until:
                sock, _ = self._socket.accept()
                if self._clients.admit_client(sock):
                    break  # a client with rights is served before the next ones are accepted
        except BlockingIOError:
            pass
        except OSError:  # no free descriptor or memory, or the client has gone: the others continue to wait
            wait_seconds = RETRY_SECONDS
        self._trust_senders()
        self._allowance.spend_time(min(time.monotonic() - began, MAX_CHARGE_SECONDS))
        wait_seconds = max(wait_seconds, self._allowance.wait_seconds())
        if wait_seconds:
            self._loop.remove_reader(self._socket)
            self._wait_before(wait_seconds)

    def _trust_senders(self) -> None:
        """Allow descriptors to be sent before accept(2), as an operator's client may do, or forbid it."""
        if self._clients.shared.trusts_senders is not self._trusts:
            self._trusts = self._clients.shared.trusts_senders
            with suppress(OSError):  # before Linux 6.16 it cannot be forbidden
                pass_rights(self._socket, allowed=self._trusts)

    def _look_again(self) -> None:
        """Compute the waiting time again, because the share has changed."""
        if self._timer is not None:
            self._timer.cancel()
            self._wait_before(self._allowance.wait_seconds())

    def _wait_before(self, seconds: float) -> None:
        self._timer = self._loop.call_later(seconds, self._go_on)

    def _go_on(self) -> None:
        self._timer = None
        self._loop.add_reader(self._socket, self._accept_clients)
