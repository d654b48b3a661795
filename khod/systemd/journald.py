# SPDX-License-Identifier: LGPL-2.1-or-later
"""Have journald write the journal to the disk over its Varlink socket, as `journalctl --sync` does."""

import asyncio
import json
from contextlib import suppress

SOCKET = "/run/systemd/journal/io.systemd.journal"
CALL = json.dumps({"method": "io.systemd.Journal.Synchronize"}).encode() + b"\0"


async def synchronize_journal(seconds: float, socket: str = SOCKET) -> bool:
    """Wait at most `seconds` until all that was logged is on the disk, and the files are closed in order.

    Returns whether journald said so: its journal may be lost, the handover is not.
    """
    with suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        async with asyncio.timeout(seconds):
            reader, writer = await asyncio.open_unix_connection(socket)
            try:
                writer.write(CALL)
                answer = await reader.readuntil(b"\0")
            finally:
                writer.close()
        return b'"error"' not in answer
    return False
