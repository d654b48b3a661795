# SPDX-License-Identifier: LGPL-2.1-or-later
"""A D-Bus client in the caller's task: for systemd at its private socket, for other services on the system bus.

There is no second task that could die unnoticed while an answer is awaited, and a cancelled call leaves nothing behind.
"""

import asyncio
import os
import re
import socket
import struct
from array import array
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from jeepney import DBusAddress, HeaderFields, Message, MessageType, Parser, new_method_call
from jeepney.auth import BEGIN, NEGOTIATE_UNIX_FD, make_auth_external
from jeepney.bus import get_bus

from khod.concurrency.sockets import connect_unix
from khod.text import one_line

ADDRESS = "unix:path=/run/dbus/system_bus_socket"
PRIVATE_SOCKET = "/run/systemd/private"
"""The socket of PID 1 itself, for root only. It exists without a message bus; systemctl(1) uses it too."""
BUS = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus")
NOBODY = tuple(
    f"org.freedesktop.DBus.Error.{name}"
    for name in ("NoReply", "NameHasNoOwner", "ServiceUnknown", "Disconnected", "TimedOut", "Spawn.ChildExited")
)
"""Errors that the message bus returns for a service that is not there, or that went away before it answered."""
WELCOME = re.compile(rb"OK [0-9a-f]*\r\nAGREE_UNIX_FD\r\n")
MAX_WELCOME_BYTES = 1024
CHUNK_BYTES = 1 << 16
MAX_MESSAGE_BYTES = 128 << 20
"""Maximum size of a message in bytes, by the D-Bus specification."""
GARBLED = (ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError, struct.error, RecursionError)
"""What jeepney raises on bytes that are not a D-Bus message."""


class BusError(Exception):
    """A call over the bus failed; the message is one line that is safe for a terminal."""


class ErrorAnswer(BusError):
    """The called service answered with an error; `name` is its name, such as org.freedesktop.systemd1.UnitExists."""

    def __init__(self, text: str, name: str = "") -> None:
        super().__init__(text)
        self.name = name


class Disconnected(BusError):
    """The bus or systemd is not there, or went away before it answered: the call may have had its effect."""


class Bus:
    """A connection to the message bus or to systemd; `peer` is its name in messages. Every failure is a BusError."""

    def __init__(self, connection: socket.socket, peer: str) -> None:
        self._connection, self._peer = connection, peer
        self._parser = Parser()
        self._serial = 0
        self.ended_jobs: dict[str, str] = {}
        """Results of jobs that JobRemoved has reported, by the job's path."""
        self.properties: dict[str, dict[str, Any]] = {}
        """Values that PropertiesChanged has reported, by the property's name, for each object path that is a key."""

    async def authenticate(self) -> None:
        """Authenticate as this process's user, with the right to pass file descriptors.

        BEGIN is sent together with the request, as sd-bus does. Seen with systemd 262 under load: if BEGIN arrives
        together with the first call, PID 1 reads both at once and handles the call only when more bytes arrive, which
        never happens. What systemd sends of its own accord follows its answer at once, often in the same bytes.
        """
        await self._write_bytes(b"\0" + make_auth_external() + NEGOTIATE_UNIX_FD + BEGIN)
        answer = b""
        while (welcome := WELCOME.match(answer)) is None:
            if len(answer) > MAX_WELCOME_BYTES or (b"\r\n" in answer and not answer.startswith(b"OK ")):
                raise BusError(f"{self._peer} does not let khod in: {one_line(answer.decode(errors='replace'))}")
            answer += await self._read_bytes()
        self._parser.add_data(answer[welcome.end() :])

    async def call_method(self, whom: tuple[str, str, str], method: str, signature: str = "", *body: object) -> Message:
        """Call a method and return its answer; ErrorAnswer if that is an error, Disconnected if nobody answers.

        `whom` is the bus name, the object path and the interface.
        """
        name, path, interface = whom
        self._serial += 1
        message = new_method_call(DBusAddress(path, name, interface), method, signature or None, body)
        fds = array("i")
        await self._write_bytes(message.serialise(self._serial, fds), fds)
        while True:
            answer = await self.receive_message()
            if answer.header.fields.get(HeaderFields.reply_serial) == self._serial:
                break
        if answer.header.message_type is MessageType.error:
            error = answer.header.fields.get(HeaderFields.error_name)
            text = answer.body[0] if answer.body and isinstance(answer.body[0], str) else ""
            said = f"{method}: {one_line(text or 'no reason given')} ({one_line(str(error))})"
            raise Disconnected(said) if error in NOBODY else ErrorAnswer(said, str(error))
        return answer

    async def wait_job(self, job: str) -> str:
        """Wait until systemd has reported the end of the job with this path, and return its result."""
        while job not in self.ended_jobs:
            await self.receive_message()
        return self.ended_jobs[job]

    async def receive_message(self) -> Message:
        """Wait for the next message and return it; signals also update `ended_jobs` and `properties`."""
        try:
            while (message := self._parser.get_next_message()) is None:
                if self._parser.bytes_desired() > MAX_MESSAGE_BYTES:
                    raise ValueError
                self._parser.add_data(await self._read_bytes())
        except GARBLED:
            raise BusError(f"{self._peer} sent what is not a D-Bus message") from None
        if message.header.message_type is MessageType.signal:
            path = message.header.fields.get(HeaderFields.path)
            match (message.header.fields.get(HeaderFields.member), *message.body):
                case ("JobRemoved", _, str(job), _, str(result)):
                    self.ended_jobs[job] = result
                case ("PropertiesChanged", _, dict(changed), _) if path in self.properties:
                    self.properties[path] |= {name: value for name, (_, value) in changed.items()}
        return message

    async def _read_bytes(self) -> bytes:
        try:
            data = await asyncio.get_running_loop().sock_recv(self._connection, CHUNK_BYTES)
        except OSError as error:
            raise Disconnected(f"{self._peer} has gone: {error.strerror}") from None
        if not data:
            raise Disconnected(f"{self._peer} hung up")
        return data

    async def _write_bytes(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Write all bytes. The descriptors are sent with the first byte, and stay the caller's."""
        loop = asyncio.get_running_loop()
        try:
            if fds:
                data = data[socket.send_fds(self._connection, [data], fds) :]
            await loop.sock_sendall(self._connection, data)
        except OSError as error:
            raise Disconnected(f"{self._peer} has gone: {error.strerror}") from None


@asynccontextmanager
async def system_bus() -> AsyncIterator[Bus]:
    """Connect to the system bus (`$DBUS_SYSTEM_BUS_ADDRESS`), and disconnect at the end; BusError if that fails."""
    address = os.environ.get("DBUS_SYSTEM_BUS_ADDRESS") or ADDRESS
    try:
        path = get_bus(address)
    except (ValueError, RuntimeError):
        raise BusError(f"DBUS_SYSTEM_BUS_ADDRESS is {address!r}, which names no unix socket") from None
    async with _connected(path, "the system bus") as bus:
        await bus.call_method(BUS, "Hello")
        yield bus


@asynccontextmanager
async def systemd_bus() -> AsyncIterator[Bus]:
    """Connect to systemd, and disconnect at the end; BusError if that fails.

    On this connection systemd sends the signals of all units without a subscription (bus_foreach_bus() in
    src/core/dbus.c). It closes the connection when it re-executes itself.
    """
    async with _connected(PRIVATE_SOCKET, "systemd") as bus:
        yield bus


@asynccontextmanager
async def _connected(path: str, peer: str) -> AsyncIterator[Bus]:
    try:
        connection = await connect_unix(path)
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise Disconnected(f"{peer} cannot be reached at {one_line(path)}: {said}") from None
    with connection:
        bus = Bus(connection, peer)
        await bus.authenticate()
        yield bus
