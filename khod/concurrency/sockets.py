# SPDX-License-Identifier: LGPL-2.1-or-later
"""Connections to sockets of others, which may have more waiting than they let wait."""

import asyncio
import socket

RETRY_SECONDS = 0.05
"""Between two tries to connect while too many clients wait."""


async def connect_unix(path: str) -> socket.socket:
    """Connect to a Unix stream socket, and wait where too many others do; OSError where nobody serves it.

    connect(2) says EAGAIN there, and unix(7) has no event for the end of that. To poll(2) the socket is writable,
    which asyncio's own connect takes for connected.
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
