# SPDX-License-Identifier: LGPL-2.1-or-later
"""A D-Bus client in the event loop: for systemd at its private socket, for other services on the system bus.

There is no task that could die unnoticed while an answer is awaited, and a cancelled call leaves nothing behind.
"""

import asyncio
import os
import re
import socket
import struct
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from itertools import chain
from typing import Any, TypeVar

from jeepney import DBusAddress, HeaderFields, Message, MessageFlag, MessageType, Parser, new_method_call
from jeepney.auth import BEGIN, NEGOTIATE_UNIX_FD, make_auth_external
from jeepney.bus import get_bus

from khod.concurrency.sockets import connect_unix
from khod.text import one_line

T = TypeVar("T")
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
RECONNECT_SECONDS = 0.2
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
    """A connection to the message bus or to systemd; `peer` is its name in messages. Every failure is a BusError.

    Tasks may share it: each waits for its own answer, for its own job, or for news of its own object.
    """

    def __init__(self, connection: socket.socket, peer: str) -> None:
        self._connection, self._peer = connection, peer
        self._loop = asyncio.get_running_loop()
        self._parser = Parser()
        self._serial = 0
        self._failure: BusError | None = None
        self._begun = b""
        """The rest of a message whose first bytes were sent."""
        self._unsent: dict[int, tuple[bytes, Sequence[int]]] = {}
        """Messages of which nothing was sent, and their descriptors, by serial number."""
        self._answers: dict[int, asyncio.Future[Message]] = {}
        self._news: dict[str, list[asyncio.Future[None]]] = {}
        self._watched: dict[str, list[dict[str, Any]]] = {}
        self._ended_jobs: dict[str, str] = {}

    @property
    def is_open(self) -> bool:
        """Whether it can still be used."""
        return self._failure is None

    async def authenticate(self) -> None:
        """Authenticate as this process's user, with the right to pass file descriptors.

        BEGIN is sent together with the request, as sd-bus does. Seen with systemd 262 under load: if BEGIN arrives
        together with the first call, PID 1 reads both at once and handles the call only when more bytes arrive, which
        never happens. What systemd sends of its own accord follows its answer at once, often in the same bytes.
        """
        answer, request = b"", b"\0" + make_auth_external() + NEGOTIATE_UNIX_FD + BEGIN
        try:
            await self._loop.sock_sendall(self._connection, request)
            while (welcome := WELCOME.match(answer)) is None:
                if len(answer) > MAX_WELCOME_BYTES or (b"\r\n" in answer and not answer.startswith(b"OK ")):
                    raise BusError(f"{self._peer} does not let khod in: {one_line(answer.decode(errors='replace'))}")
                data = await self._loop.sock_recv(self._connection, CHUNK_BYTES)
                if not data:
                    raise Disconnected(f"{self._peer} hung up")
                answer += data
        except OSError as error:
            raise Disconnected(f"{self._peer} has gone: {error.strerror}") from None
        self._loop.add_reader(self._connection, self._read_once)
        self._take_data(answer[welcome.end() :])

    def close(self) -> None:
        """Disconnect. What is still awaited is Disconnected."""
        self._fail(Disconnected(f"khod has hung up on {self._peer}"))
        self._connection.close()

    async def call_method(self, whom: tuple[str, str, str], method: str, signature: str = "", *body: object) -> Message:
        """Call a method and return its answer; ErrorAnswer if that is an error, Disconnected if nobody answers.

        A service that does not run is not started by it: a question may come while the host is at rest.
        `whom` is the bus name, the object path and the interface. A call that is cancelled may have its effect, though
        not after that of a later one.
        """
        name, path, interface = whom
        self._serial += 1
        serial, fds = self._serial, array("i")
        message = new_method_call(DBusAddress(path, name, interface), method, signature or None, body)
        message.header.flags |= MessageFlag.no_auto_start
        coming = self._answers[serial] = self._new_future()
        self._unsent[serial] = message.serialise(serial, fds), fds
        try:
            self._send_unsent()
            answer = await coming
        finally:
            del self._answers[serial]
            self._unsent.pop(serial, None)  # the caller may close the descriptors now
        if answer.header.message_type is MessageType.error:
            error = answer.header.fields.get(HeaderFields.error_name)
            text = answer.body[0] if answer.body and isinstance(answer.body[0], str) else ""
            said = f"{method}: {one_line(text or 'no reason given')} ({one_line(str(error))})"
            raise Disconnected(said) if error in NOBODY else ErrorAnswer(said, str(error))
        return answer

    async def wait_job(self, job: str) -> str:
        """Wait until systemd has reported the end of the job with this path, and return its result."""
        while job not in self._ended_jobs:
            await self.wait_news(job)
        return self._ended_jobs[job]

    async def wait_news(self, path: str) -> None:
        """Wait until systemd reports other properties of the object with this path, or the end of this job."""
        coming: asyncio.Future[None] = self._new_future()
        waiting = self._news.setdefault(path, [])
        waiting.append(coming)
        try:
            await coming
        finally:
            waiting.remove(coming)
            if not waiting:
                self._news.pop(path, None)

    @contextmanager
    def watch_object(self, path: str) -> Iterator[dict[str, Any]]:
        """Return the values that PropertiesChanged reports of an object from now on, by the property's name."""
        told: dict[str, Any] = {}
        watching = self._watched.setdefault(path, [])
        watching.append(told)
        try:
            yield told
        finally:
            watching[:] = [other for other in watching if other is not told]
            if not watching:
                self._watched.pop(path, None)

    def _new_future(self) -> asyncio.Future[Any]:
        if self._failure is not None:
            raise type(self._failure)(str(self._failure))
        return self._loop.create_future()

    def _fail(self, failure: BusError) -> None:
        """Tell everyone who waits that nothing more comes, unless they were told."""
        if self._failure is not None:
            return
        self._failure = failure
        self._loop.remove_reader(self._connection)
        self._loop.remove_writer(self._connection)
        for coming in (*self._answers.values(), *chain.from_iterable(self._news.values())):
            if not coming.done():
                coming.set_exception(type(failure)(str(failure)))

    def _read_once(self) -> None:
        try:
            data = self._connection.recv(CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(Disconnected(f"{self._peer} has gone: {error.strerror}"))
            return
        if data:
            self._take_data(data)
        else:
            self._fail(Disconnected(f"{self._peer} hung up"))

    def _take_data(self, data: bytes) -> None:
        self._parser.add_data(data)
        try:
            while (message := self._parser.get_next_message()) is not None:
                self._take_message(message)
            if self._parser.bytes_desired() > MAX_MESSAGE_BYTES:
                raise ValueError
        except GARBLED:
            self._fail(BusError(f"{self._peer} sent what is not a D-Bus message"))

    def _take_message(self, message: Message) -> None:
        fields = message.header.fields
        if message.header.message_type is not MessageType.signal:
            coming = self._answers.get(fields.get(HeaderFields.reply_serial))
            if coming is not None and not coming.done():
                coming.set_result(message)
            return
        about = fields.get(HeaderFields.path)
        match (fields.get(HeaderFields.member), *message.body):
            case ("JobRemoved", _, str(about), _, str(result)):
                self._ended_jobs[about] = result
            case ("PropertiesChanged", _, dict(changed), _):
                for told in self._watched.get(about, ()):
                    told |= {name: value for name, (_, value) in changed.items()}
        for news in self._news.get(about, ()):
            if not news.done():
                news.set_result(None)

    def _send_unsent(self) -> None:
        """Send what there is room for. Descriptors go with the first byte of their message."""
        try:
            while self._begun or self._unsent:
                if self._begun:
                    self._begun = self._begun[self._connection.send(self._begun) :]
                    continue
                serial, (data, fds) = next(iter(self._unsent.items()))
                sent = socket.send_fds(self._connection, [data], fds) if fds else self._connection.send(data)
                self._begun = data[sent:]
                del self._unsent[serial]
        except BlockingIOError:
            self._loop.add_writer(self._connection, self._send_unsent)
        except OSError as error:
            self._fail(Disconnected(f"{self._peer} has gone: {error.strerror}"))
        else:
            self._loop.remove_writer(self._connection)


class SharedBus:
    """One connection to systemd for all who need one at a time: on each, PID 1 sends the signals of all units."""

    def __init__(self) -> None:
        self._connecting = asyncio.Lock()
        self._bus: Bus | None = None
        self._users: Counter[Bus] = Counter()

    @asynccontextmanager
    async def use(self) -> AsyncIterator[Bus]:
        """Connect to systemd if nobody is connected; the last one disconnects. BusError if that fails."""
        async with self._connecting:
            if self._bus is None or not self._bus.is_open:
                self._bus = await _connect(PRIVATE_SOCKET, "systemd")
            bus = self._bus
            self._users[bus] += 1
        try:
            yield bus
        finally:
            self._users[bus] -= 1
            if not self._users[bus]:
                del self._users[bus]
                bus.close()


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


async def ask_again(ask: Callable[[], Awaitable[T]]) -> T:
    """Return what `ask` returns; it is called again while systemd re-executes itself (daemon-reexec).

    This does not end while systemd cannot be reached: the caller limits the time.
    """
    while True:
        try:
            return await ask()
        except Disconnected:
            await asyncio.sleep(RECONNECT_SECONDS)


@asynccontextmanager
async def _connected(path: str, peer: str) -> AsyncIterator[Bus]:
    bus = await _connect(path, peer)
    try:
        yield bus
    finally:
        bus.close()


async def _connect(path: str, peer: str) -> Bus:
    try:
        connection = await connect_unix(path)
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise Disconnected(f"{peer} cannot be reached at {one_line(path)}: {said}") from None
    bus = Bus(connection, peer)
    try:
        await bus.authenticate()
    except BaseException:
        bus.close()
        raise
    return bus
