# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guest agent of a virtual machine, on a socket of QEMU's: asked to set the guest's clock after a jump."""

import asyncio
import json
from contextlib import suppress
from itertools import count

from khod.errors import errno_text
from khod.text import one_line
from khod.vm.monitor import VmError

DEADLINE_SECONDS = 10.0
MAX_LINE_BYTES = 1 << 16
_SERIALS = count(1)


async def set_guest_clock(path: str) -> None:
    """Have the guest take its time from its hardware clock, which QEMU keeps at the host's; raise VmError."""
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            reader, writer = await asyncio.open_unix_connection(path, limit=MAX_LINE_BYTES)
            try:
                await _synchronize(reader, writer)
                answer = await _call_agent(reader, writer, {"execute": "guest-set-time"})
            finally:
                writer.close()
    except TimeoutError:
        raise VmError(f"the guest agent did not answer within {DEADLINE_SECONDS:g} s") from None
    except (OSError, ValueError) as error:
        reason = errno_text(error) if isinstance(error, OSError) else one_line(str(error))
        raise VmError(f"the guest agent cannot be asked: {reason}") from None
    if "error" in answer:
        raise VmError(f"the guest agent did not set the clock: {one_line(str(answer['error']))}")


async def _synchronize(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Read until the answer to this call: others may still have been asked by an earlier client."""
    serial = next(_SERIALS)
    answer = await _call_agent(reader, writer, {"execute": "guest-sync", "arguments": {"id": serial}})
    while answer.get("return") != serial:
        answer = await _read_answer(reader)


async def _call_agent(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, call: dict[str, object]
) -> dict[str, object]:
    writer.write(json.dumps(call).encode() + b"\n")
    await writer.drain()
    return await _read_answer(reader)


async def _read_answer(reader: asyncio.StreamReader) -> dict[str, object]:
    while True:
        line = await reader.readline()
        if not line:
            raise ValueError("it closed the connection")
        with suppress(ValueError):
            answer = json.loads(line)
            if isinstance(answer, dict):
                return answer
