# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guest agent of a virtual machine, on a socket of QEMU's: asked for the guest's clock, and to set it.

A guest's clock stands still while the guest does. By how much more it is behind the host's afterwards is how long the
guest was stopped, from inside.
"""

import asyncio
import json
import logging
import secrets
import time
from contextlib import suppress

from khod.errors import errno_text
from khod.text import one_line
from khod.vm.monitor import VmError

DEADLINE_SECONDS = 10.0
MAX_LINE_BYTES = 1 << 16
FINISH_SECONDS = 1.0
"""What `finish` waits for a clock that was not read yet: the handover's blackout ends with it."""
LOG = logging.getLogger("khod-vm")


class GuestClock:
    """The clock of a guest whose agent is at the path `agent`; without one nothing is known of it."""

    def __init__(self, agent: str) -> None:
        self._agent = agent
        self.lag: float | None = None
        """By how many seconds it was behind the host's at the last `note_lag`, if that is known."""
        self._setting: asyncio.Future[None] | None = None
        self._stopped: asyncio.Future[float | None] | None = None

    async def note_lag(self) -> None:
        """Read it before a handover."""
        self.lag = await self.read_lag()

    async def read_lag(self) -> float | None:
        """Return by how many seconds it is behind the host's, None if that is not known."""
        if not self._agent:
            return None
        try:
            return await read_guest_lag(self._agent)
        except VmError as error:
            LOG.warning("The guest's clock is not known: %s", error)
            return None

    def note_continued(self, lag_before: float | None) -> None:
        """Read the clock of a guest that has just continued, then set it; do not wait for that."""
        if self._agent:
            self._stopped = asyncio.get_running_loop().create_future()
            self._setting = asyncio.ensure_future(self._read_and_set(lag_before, self._stopped))

    async def _read_and_set(self, lag_before: float | None, stopped: "asyncio.Future[float | None]") -> None:
        lag = await self.read_lag()
        stopped.set_result(None if lag is None or lag_before is None else max(0.0, lag - lag_before))
        try:
            await set_guest_clock(self._agent)  # it takes the guest's time, and nobody waits for it
        except VmError as error:
            LOG.warning("The guest's clock may be behind: %s", error)

    async def wait_stopped(self) -> float | None:
        """Return how many seconds it stood still, None if that is not known within FINISH_SECONDS."""
        if self._stopped is None:
            return None
        await asyncio.wait({self._stopped}, timeout=FINISH_SECONDS)
        return self._stopped.result() if self._stopped.done() else None


async def read_guest_lag(path: str) -> float:
    """Return by how many seconds the guest's clock is behind the host's; raise VmError."""
    nanoseconds, asked, answered = await _ask_agent(path, "guest-get-time")
    if not isinstance(nanoseconds, int):
        raise VmError("the guest agent did not tell the time: its answer is not a number")
    return (asked + answered) / 2 - nanoseconds / 1e9


async def set_guest_clock(path: str) -> None:
    """Have the guest take its time from its hardware clock, which QEMU keeps at the host's; raise VmError."""
    await _ask_agent(path, "guest-set-time")


async def _ask_agent(path: str, command: str) -> tuple[object, float, float]:
    """Return what the agent returns for a command without arguments, and when it was asked and answered; raise VmError.

    An agent that is not there yet is waited for before it is asked.
    """
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            reader, writer = await asyncio.open_unix_connection(path, limit=MAX_LINE_BYTES)
            try:
                await _synchronize(reader, writer)
                asked = time.time()
                answer = await _call_agent(reader, writer, {"execute": command})
                answered = time.time()
            finally:
                writer.close()
    except TimeoutError:
        raise VmError(f"the guest agent did not answer within {DEADLINE_SECONDS:g} s") from None
    except (OSError, ValueError) as error:
        reason = errno_text(error) if isinstance(error, OSError) else one_line(str(error))
        raise VmError(f"the guest agent cannot be asked: {reason}") from None
    if "error" in answer:
        raise VmError(f"the guest agent refuses `{command}`: {one_line(str(answer['error']))}")
    return answer.get("return"), asked, answered


async def _synchronize(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Read until the answer to this call: others may still have been asked by an earlier client."""
    serial = secrets.randbelow(1 << 31)  # not one that an earlier khod-vm has used
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
