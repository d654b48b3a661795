"""One client: who is asking comes from the kernel, how much they may send is bounded."""

import asyncio
import contextlib
import contextvars
import grp
import resource
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from asyncvarlink import (
    FileDescriptorArray,
    VarlinkErrorReply,
    VarlinkInterfaceRegistry,
    VarlinkInterfaceServerProtocol,
    VarlinkMethodCall,
)
from asyncvarlink.types import JSONObject

from khod.errors import KhoError, Refused, UsageError
from khod.producers.peers import Peer
from khod.protocol import to_wire
from khod.server.listener import Transport

MAX_MESSAGE = 1 << 20
"""Bytes of one message: the longest honest one is a command line. Files come as descriptors."""

MAX_CALLS = 64
"""Calls of one client that wait for an answer, the one that is served left out."""

OWN_DESCRIPTORS = 256
"""File descriptors khod needs besides its connections: files, pipes, images, hooks."""

UCRED = struct.Struct("3i")  # struct ucred: pid, uid, gid
SO_PEERGROUPS = 59  # include/uapi/asm-generic/socket.h
PEERGROUPS_SIZE = 1024  # bytes: the most CPython's getsockopt takes, 256 groups


@dataclass(frozen=True)
class Caller:
    """Who is at the other end, as the kernel noted at connect(2)."""

    pid: int
    uid: int
    groups: frozenset[int]


@dataclass
class Count:
    """The connections there are. `per_user` leaves out producers, of which a user may have more."""

    everyone: int = 0
    per_user: Counter[int] = field(default_factory=Counter)


CONNECTION: "contextvars.ContextVar[Connection]" = contextvars.ContextVar("CONNECTION")
"""The connection whose call is being served."""


def peer_of(sock: socket.socket) -> Caller:
    """Ask the kernel who connected."""
    pid, uid, gid = UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, PEERGROUPS_SIZE)
        groups = struct.unpack(f"{len(raw) // 4}I", raw)
    except OSError:
        groups = ()  # more groups than we asked room for: the primary one must do
    return Caller(pid, uid, frozenset((gid, *groups)))


class Connection(VarlinkInterfaceServerProtocol):
    """One client. A message over MAX_MESSAGE ends the connection before it fills our memory."""

    def __init__(self, registry: VarlinkInterfaceRegistry, count: Count, limit: int) -> None:
        super().__init__(registry)
        self._count = count
        self._limit = limit
        self._pending = 0
        self._calls = 0
        self._serving: asyncio.Future[None] | None = None
        self._held: FileDescriptorArray | None = None
        self._line: Transport | None = None
        self.peer: Caller | None = None
        self.producer: Peer | None = None
        self.on_end: list[Callable[[], None]] = []
        """Called when the client has said its last; a monitor would wait for the next event otherwise."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert isinstance(transport, Transport)
        self._line = transport
        self.peer = peer_of(transport.socket)
        self._count.everyone += 1
        self._count.per_user[self.peer.uid] += 1
        mine = self._count.per_user[self.peer.uid]
        if (self.peer.uid != 0 and mine > self._limit) or self._count.everyone > _room():
            transport.close()

    def enlist(self, producer: Peer) -> None:
        """Be this producer's connection from here on; producers.max_per_user bounds those."""
        self.producer = producer
        if self.peer is not None:
            self._count.per_user[self.peer.uid] -= 1

    def eof_received(self) -> None:
        self._over()
        super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._over()
        self._let_go()
        if self.peer is not None:
            self._count.everyone -= 1
            self._count.per_user[self.peer.uid] -= self.producer is None
            self.peer = None
        super().connection_lost(exc)

    def message_received(self, data: bytes, fds: FileDescriptorArray | None) -> None:
        self._pending += len(data)
        self._calls += data.count(b"\0")
        if self._pending > MAX_MESSAGE:
            self._refuse(f"The message is longer than {MAX_MESSAGE} bytes")
            return
        if self._calls > MAX_CALLS:
            self._refuse(f"More than {MAX_CALLS} calls wait for an answer")
            return
        try:
            super().message_received(data, self._with_its_message(data, fds))
        except (ValueError, RecursionError) as error:  # no UTF-8, or nested beyond reason
            self.error_received(error, data, fds)
        if b"\0" in data:
            self._let_go()

    def _with_its_message(self, data: bytes, fds: FileDescriptorArray | None) -> FileDescriptorArray | None:
        """Hold descriptors until their message is complete.

        They come with the first piece, and the library (0.3.3) closes those of an incomplete one: a call
        longer than 4096 bytes, as a long command line makes it, would lose its images.
        """
        if fds:
            self._let_go()
            fds.reference(self)
            self._held = fds
        return self._held if b"\0" in data else None

    def _let_go(self) -> None:
        if self._held is not None:
            self._held.release(self)
            self._held = None

    def error_received(self, err: Exception, data: bytes, fds: FileDescriptorArray | None) -> None:  # noqa: ARG002
        self._refuse(f"The message is no Varlink call: {err}")

    def request_received(self, obj: JSONObject, fds: FileDescriptorArray | None) -> "asyncio.Future[None] | None":
        """Serve calls one after the other: the library would, but it relies on not reading meanwhile."""
        if self._serving is None or self._serving.done():
            self._serving = self._next(obj, fds)
        else:
            self._serving = asyncio.ensure_future(self._in_turn(self._serving, obj, fds))
            if fds is not None:
                fds.reference_until_done(self._serving)
        return self._serving

    async def _in_turn(self, before: "asyncio.Future[None]", obj: JSONObject, fds: FileDescriptorArray | None) -> None:
        await before
        if (serving := self._next(obj, fds)) is not None:
            await serving

    def _next(self, obj: JSONObject, fds: FileDescriptorArray | None) -> "asyncio.Future[None] | None":
        self._pending, self._calls = 0, self._calls - 1
        sound = isinstance(obj.get("method"), str) and isinstance(obj.get("parameters", {}), dict)
        if self.producer is not None and not sound:  # whatever was asked of it, this is no yes
            self._refuse("The message is no Varlink call")
            return None
        found: asyncio.Future[None] | None = super().request_received(obj, fds)
        return found

    def call_received(self, call: VarlinkMethodCall, fds: FileDescriptorArray | None) -> "asyncio.Future[None] | None":
        token = CONNECTION.set(self)
        try:
            future: asyncio.Future[None] | None = super().call_received(call, fds)
            return future
        except VarlinkErrorReply:
            self._no_yes()
            raise
        finally:
            CONNECTION.reset(token)

    def handle_call_exception(self, exc: BaseException, oneway: bool) -> None:
        self._no_yes()  # one descriptor named twice ends here
        super().handle_call_exception(exc, oneway)

    def _no_yes(self) -> None:
        """A producer's answer that is none: whatever it was asked, it ends here; another client may go on."""
        if self.producer is not None:
            asyncio.get_running_loop().call_soon(self.hang_up)

    def hang_up(self) -> None:
        """End the connection after what was said; for its producer it ends at once."""
        self._over()
        self.close()

    def _over(self) -> None:
        for end in self.on_end:
            end()
        self.on_end.clear()

    def _refuse(self, what: str) -> None:
        """Say why, and hang up: what follows on this connection cannot be trusted to be a message."""
        self._over()
        if self._line is not None:
            # The library reads on while there is data, with the event loop held: only this ends it.
            with contextlib.suppress(OSError):
                self._line.socket.shutdown(socket.SHUT_RD)
        sent = self.send_error(to_wire(UsageError(what, remedy="Send one JSON object, ended by a NUL byte.")))
        self._pending, self._recv_buffer = 0, b""
        if self._line is not None:
            self._line.stop_reading()
        sent.add_done_callback(lambda _: self.close())


def privileged(what: str, *groups: str) -> Caller:
    """Give the caller, if it is root's or in one of the groups; Refused otherwise."""
    peer = CONNECTION.get().peer
    assert peer is not None, "a call comes from a connected peer"
    named = [group for group in groups if group]
    if peer.uid == 0 or any(_gid(group) in peer.groups for group in named):
        return peer
    raise Refused(
        f"User {peer.uid} may not {what}",
        where=f"process {peer.pid}",
        remedy=f"Run it as root{f' or join group {named[-1]}' if named else ''}.",
    )


def _room() -> int:
    """How many connections this process can hold: a descriptor each, and some for its own work."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] - OWN_DESCRIPTORS


@contextlib.contextmanager
def wired() -> Iterator[None]:
    """Send our errors as Varlink errors."""
    try:
        yield
    except KhoError as error:
        raise to_wire(error) from error


def _gid(group: str) -> int | None:
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        return None
