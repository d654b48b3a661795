# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client of the system bus (`$DBUS_SYSTEM_BUS_ADDRESS`), read by the task that calls.

No second task can die unseen while an answer is waited for, and a call that is cut short leaves nothing behind.
"""

import asyncio
import os
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from jeepney import DBusAddress, HeaderFields, Message, MessageType, Parser, new_method_call
from jeepney.auth import BEGIN, AuthenticationError, Authenticator
from jeepney.bus import get_bus

from khod.concurrency.sockets import connect_unix
from khod.text import one_line

ADDRESS = "unix:path=/run/dbus/system_bus_socket"
BUS = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus")
NOBODY = tuple(
    f"org.freedesktop.DBus.Error.{name}"
    for name in ("NoReply", "NameHasNoOwner", "ServiceUnknown", "Disconnected", "TimedOut", "Spawn.ChildExited")
)
"""What a message bus answers in the place of a service that is not there, or went away before it answered."""
CHUNK_BYTES = 1 << 16
MAX_MESSAGE_BYTES = 128 << 20
"""Bytes of a message, as the D-Bus specification bounds it."""
HANG_UP_SECONDS = 0.5
"""How long the end of a connection is waited for; it needs nothing of the other side."""
GARBLED = (ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError, struct.error, RecursionError)
"""What jeepney raises on bytes that are no D-Bus message."""


class BusError(Exception):
    """A call over the bus that failed, in one line fit for a terminal."""


class ErrorAnswer(BusError):
    """What was called says no."""


class Disconnected(BusError):
    """The bus, or systemd, is not there or went away before it answered; what was called may be done or not."""


class Bus:
    """A connection to the message bus; every failure of it is a BusError."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._parser = Parser()
        self._serial = 0
        self.ended_jobs: dict[tuple[str, str], str] = {}
        """Results that JobRemoved has told, by its sender and the job's path."""
        self.watched_name = ""
        """The name on the bus that must keep its owner; a client has NameOwnerChanged sent for it."""

    async def authenticate(self) -> None:
        """Authenticate as this process's user and take a name on the bus."""
        authenticator = Authenticator()
        try:
            for line in authenticator:
                await self._write_bytes(line)
                authenticator.feed(await self._read_bytes())
        except AuthenticationError as error:
            raise BusError(f"the system bus does not let khod in: {one_line(str(error))}") from None
        await self._write_bytes(BEGIN)
        await self.call_method(BUS, "Hello")

    async def call_method(self, whom: tuple[str, str, str], method: str, signature: str = "", *body: object) -> Message:
        """Call a method and wait for its answer; BusError where that is an error."""
        name, path, interface = whom
        self._serial += 1
        message = new_method_call(DBusAddress(path, name, interface), method, signature or None, body)
        await self._write_bytes(message.serialise(self._serial))
        while True:
            answer = await self.receive_message()
            if answer.header.fields.get(HeaderFields.reply_serial) == self._serial:
                break
        if answer.header.message_type is MessageType.error:
            error = answer.header.fields.get(HeaderFields.error_name)
            text = answer.body[0] if answer.body and isinstance(answer.body[0], str) else ""
            kind = Disconnected if error in NOBODY else ErrorAnswer
            raise kind(f"{method}: {one_line(text or 'no reason given')} ({one_line(str(error))})")
        return answer

    async def receive_message(self) -> Message:
        """Wait for the next message."""
        try:
            while (message := self._parser.get_next_message()) is None:
                if self._parser.bytes_desired() > MAX_MESSAGE_BYTES:
                    raise ValueError
                self._parser.add_data(await self._read_bytes())
        except GARBLED:
            raise BusError("the system bus sent what is not a D-Bus message") from None
        if message.header.message_type is MessageType.signal:
            fields = message.header.fields
            match (fields.get(HeaderFields.member), fields.get(HeaderFields.sender), *message.body):
                case ("JobRemoved", str(sender), _, str(job), _, str(result)):
                    self.ended_jobs[sender, job] = result
                case ("NameOwnerChanged", name, who, _, _) if (name, who) == (BUS[0], self.watched_name):
                    raise Disconnected(f"{who} went from the system bus, or has come back to it")
        return message

    async def _read_bytes(self) -> bytes:
        try:
            data = await self._reader.read(CHUNK_BYTES)
        except OSError as error:
            raise Disconnected(f"the system bus has gone: {error.strerror}") from None
        if not data:
            raise Disconnected("the system bus hung up")
        return data

    async def _write_bytes(self, data: bytes) -> None:
        self._writer.write(data)
        try:
            await self._writer.drain()
        except OSError as error:
            raise Disconnected(f"the system bus has gone: {error.strerror}") from None


@asynccontextmanager
async def system_bus() -> AsyncIterator[Bus]:
    """Connect to the system bus, and hang up whatever happens; BusError where it is not there."""
    address = os.environ.get("DBUS_SYSTEM_BUS_ADDRESS") or ADDRESS
    try:
        reader, writer = await asyncio.open_unix_connection(sock=await connect_unix(get_bus(address)))
    except OSError as error:
        raise Disconnected(f"the system bus cannot be reached at {address}: {error.strerror or error}") from None
    except (ValueError, RuntimeError):
        raise BusError(f"DBUS_SYSTEM_BUS_ADDRESS is {address!r}, which names no unix socket") from None
    try:
        bus = Bus(reader, writer)
        await bus.authenticate()
        yield bus
    finally:
        # Not close(): that waits for a peer that may never read what is still to be written.
        writer.transport.abort()
        with suppress(OSError):  # TimeoutError is one
            async with asyncio.timeout(HANG_UP_SECONDS):
                await writer.wait_closed()
