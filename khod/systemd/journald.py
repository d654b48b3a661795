# SPDX-License-Identifier: LGPL-2.1-or-later
"""Have journald write the journal to the disk over its Varlink socket, as `journalctl --sync` does."""

import asyncio
import json

SOCKET = "/run/systemd/journal/io.systemd.journal"
CALL = json.dumps({"method": "io.systemd.Journal.Synchronize"}).encode() + b"\0"


async def synchronize_journal() -> None:
    """Return once all that journald was sent is on the disk, and the journal's files are closed in order.

    OSError or EOFError if journald does not answer: its journal may be lost, the handover is not.
    """
    reader, writer = await asyncio.open_unix_connection(SOCKET)
    try:
        writer.write(CALL)
        await reader.readuntil(b"\0")
    finally:
        writer.close()
