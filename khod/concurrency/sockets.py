# SPDX-License-Identifier: LGPL-2.1-or-later
"""Connections to sockets of other programs, whose queue of waiting clients may be full."""

import asyncio
import socket

RETRY_SECONDS = 0.05
"""Seconds between two attempts to connect while the queue is full."""


async def connect_unix(path: str) -> socket.socket:
    """Connect to a Unix stream socket, and wait while its queue is full; OSError if nothing listens there.

    With a full queue connect(2) returns EAGAIN, and unix(7) has no event for the end of that. poll(2) reports the
    socket as writable, which asyncio's own connect takes for connected.
    """
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.setblocking(False)
        while True:
            try:
                connection.connect(path)
                return connection
            except BlockingIOError:
                await asyncio.sleep(RETRY_SECONDS)
    except (OSError, ValueError, asyncio.CancelledError):
        connection.close()
        raise
