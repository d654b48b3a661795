"""The Varlink server: who is asking comes from the kernel, how much they may send is bounded."""

import asyncio
import contextlib
import contextvars
import grp
import os
import resource
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field

from asyncvarlink import (
    FileDescriptor,
    FileDescriptorArray,
    LastResult,
    VarlinkErrorReply,
    VarlinkInterfaceRegistry,
    VarlinkInterfaceServerProtocol,
    VarlinkMethodCall,
    varlinkmethod,
)
from asyncvarlink.serviceinterface import VarlinkServiceInterface
from asyncvarlink.types import JSONObject

from khod import __version__, model, wire
from khod.config import Access
from khod.engine import Engine
from khod.errors import KhoError, Refused, Unreachable, UsageError
from khod.listener import Transport
from khod.producers.configured import one_line
from khod.producers.identity import process_of, unit_of
from khod.producers.peers import Answer, Peer, Terms
from khod.protocol import Command, Handover, Producer, Registered, TreeReply, Word, to_wire
from khod.record import Owner
from khod.target import Request

MAX_MESSAGE = 1 << 20
"""Bytes of one message: the longest honest one is a command line. Files come as descriptors."""

MAX_CALLS = 64
"""Calls of one client that wait for an answer, the one that is served left out."""

MAX_FILE_NAME = 255
"""Characters of the name a producer gives a file: it stands in the record."""

OWN_DESCRIPTORS = 256
"""File descriptors khod needs besides its connections: files, pipes, images, hooks."""

MAX_QUEUE = 1 << 15
"""Events kept for a monitor that does not read; then it is dropped.

Two a verb for as many producers as one user may have, there and back: they are shared, a reference each.
"""

Queue = asyncio.Queue[model.Event | Exception]
"""What a monitor is to be told: events, then how it ends."""

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
        found: asyncio.Future[None] | None = super().request_received(obj, fds)
        return found

    def call_received(self, call: VarlinkMethodCall, fds: FileDescriptorArray | None) -> "asyncio.Future[None] | None":
        token = CONNECTION.set(self)
        try:
            future: asyncio.Future[None] | None = super().call_received(call, fds)
            return future
        except VarlinkErrorReply:
            if self.producer is not None:  # an answer that is none: whatever was asked, this is no yes
                asyncio.get_running_loop().call_soon(self.hang_up)
            raise
        finally:
            CONNECTION.reset(token)

    def hang_up(self) -> None:
        """End the connection after what was said; for its producer it ends at once."""
        self._over()
        self.close()

    def _over(self) -> None:
        for end in self.on_end:
            end()
        self.on_end.clear()

    def _refuse(self, what: str) -> None:
        self._over()
        self._say_and_hang_up(what)

    def _say_and_hang_up(self, what: str) -> None:
        """Say why, and hang up: what follows on this connection cannot be trusted to be a message."""
        if self._line is not None:
            # The library reads on while there is data, with the event loop held: only this ends it.
            with contextlib.suppress(OSError):
                self._line.socket.shutdown(socket.SHUT_RD)
        sent = self.send_error(to_wire(UsageError(what, remedy="Send one JSON object, ended by a NUL byte.")))
        self._pending, self._recv_buffer = 0, b""
        if self._line is not None:
            self._line.stop_reading()
        sent.add_done_callback(lambda _: self.close())


class Service(Handover):
    """The interface over one engine."""

    render_interface_description = Handover.render_interface_description  # with the words it was described in

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._monitors: set[Queue] = set()
        self._last = model.Event(0.0, model.Phase.idle, "", "")

    def publish(self, event: model.Event) -> None:
        """Give an event to every monitor; one that does not read is dropped."""
        self._last = event
        for queue in list(self._monitors):
            if queue.qsize() < MAX_QUEUE:
                queue.put_nowait(event)
            else:
                self._monitors.discard(queue)
                queue.put_nowait(LastResult(self._last))

    @varlinkmethod(return_parameter="status")
    async def Status(self) -> model.Status:
        with wired():
            return await self._engine.status()

    @varlinkmethod(return_parameter="event", delay_generator=False)
    async def Monitor(self) -> AsyncIterator[model.Event]:
        queue: Queue = asyncio.Queue()
        self._monitors.add(queue)
        # An error, not a last result: the library leaves the generator of a result it cannot send unclosed.
        CONNECTION.get().on_end.append(lambda: queue.put_nowait(to_wire(Unreachable("The client is gone"))))
        try:
            yield await self._engine.now()
            while isinstance(item := await queue.get(), model.Event):
                yield item
            raise item
        finally:
            self._monitors.discard(queue)

    def close(self) -> None:
        """End every monitor."""
        for queue in self._monitors:
            queue.put_nowait(LastResult(self._last))

    @varlinkmethod(return_parameter="checks")
    async def Check(self) -> list[model.Check]:
        with wired():
            return await self._engine.check()

    @varlinkmethod(return_parameter="status")
    async def Activate(self) -> model.Status:
        with wired():
            self._privileged("activate")
            await self._engine.activate()
            return await self._engine.status()

    @varlinkmethod(return_parameter="status")
    async def Abort(self, *, force: bool | None = None) -> model.Status:
        with wired():
            self._privileged("abort")
            await self._engine.abort(force=bool(force))
            return await self._engine.status()

    @varlinkmethod(return_parameter="status")
    async def Kexec(
        self,
        *,
        image: FileDescriptor | None = None,
        image_name: str | None = None,
        initrd: FileDescriptor | None = None,
        initrd_name: str | None = None,
        cmdline: str | None = None,
        append: str | None = None,
        now: bool | None = None,
        load_only: bool | None = None,
        hold: bool | None = None,
    ) -> model.Status:
        with wired():
            self._privileged("kexec")
            await self._engine.kexec(
                Request(
                    None if image is None else image.fileno(),
                    image_name or "the image",
                    None if initrd is None else initrd.fileno(),
                    initrd_name or "the initrd",
                    cmdline,
                    append,
                    bool(now),
                    bool(load_only),
                    bool(hold),
                )
            )
            return await self._engine.status()

    @varlinkmethod(return_parameter="producers")
    async def Producers(self) -> list[model.Producer]:
        with wired():
            return await self._engine.producers()

    @varlinkmethod(return_parameter="producers")
    async def Rehearse(self, *, name: str) -> list[model.Producer]:
        with wired():
            self._privileged("test a producer")
            return await self._engine.rehearse(name)

    @varlinkmethod
    async def Forget(self, *, name: str) -> None:
        with wired():
            self._privileged("forget a producer")
            await self._engine.forget(name)

    @varlinkmethod
    async def Tree(self, *, side: str) -> TreeReply:
        with wired():
            self._privileged("read the state tree")
            tree = await self._engine.tree(side)
            return {"names": ["", *tree.blobs], "blobs": [_memfd(blob) for blob in (tree.root, *tree.blobs.values())]}

    def _privileged(self, what: str) -> None:
        privileged(what, self._engine.config.access.group)


class Producers(Producer):
    """The producers' interface over one engine."""

    render_interface_description = Producer.render_interface_description

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @varlinkmethod
    async def Register(
        self,
        *,
        name: str,
        version: int,
        timeout: float | None = None,
        after: list[str] | None = None,
        before: list[str] | None = None,
        devices: list[str] | None = None,
    ) -> Registered:
        with wired():
            connection, access = CONNECTION.get(), self._engine.config.access
            peer = privileged("be a producer", access.group, access.producers)
            if version < 1:
                raise UsageError(f"There is no version {version} of {wire.PRODUCER}", where="version", remedy="Give 1.")
            if connection.producer is not None:
                raise Refused(f"This connection is producer {connection.producer.name}", remedy="Open another one.")
            owner, process = Owner(peer.uid, unit_of(peer.pid)), process_of(peer.pid)
            if process is None:
                raise Refused("The process that connected has ended", where=f"process {peer.pid}")
            terms = Terms(
                30.0 if timeout is None else timeout, tuple(after or ()), tuple(before or ()), tuple(devices or ())
            )
            try:
                made = await self._engine.register(name, owner, process, terms)
            except Refused:
                # A connection is one producer; kept open, thousands of them would leave no room for anyone else.
                asyncio.get_running_loop().call_soon(connection.hang_up)
                raise
            connection.enlist(made)
            connection.on_end.append(lambda: self._engine.muster.peers.leave(made))
            if connection.peer is None:  # it went while khod looked
                self._engine.muster.peers.leave(made)
            return {"version": wire.PRODUCER_VERSION, "run": made.run, "told": made.told}

    @varlinkmethod
    async def Next(
        self,
        *,
        serial: int | None = None,
        answer: Word | None = None,
        reason: str | None = None,
        progress: float | None = None,
        names: list[str] | None = None,
        tokens: list[int] | None = None,
        fds: list[FileDescriptor] | None = None,
    ) -> Command:
        with wired():
            connection = CONNECTION.get()
            if (peer := connection.producer) is None:
                raise Refused("This connection is no producer", remedy=f"Call {wire.PRODUCER}.Register first.")
            try:
                said = None if answer is None else _answer(serial, answer, reason, progress, names, tokens, fds)
                command = await peer.next(said)
            except UsageError:
                asyncio.get_running_loop().call_soon(connection.hang_up)
                raise
            return {
                "serial": command.serial,
                "verb": command.verb.value,
                "run": command.run,
                "timeout": command.timeout,
                "names": [kept.name for kept in command.kept],
                "tokens": [kept.token for kept in command.kept],
                "fds": [FileDescriptor(fd, should_close=True) for fd in command.fds],
            }


def _answer(
    serial: int | None,
    word: Word,
    reason: str | None,
    progress: float | None,
    names: list[str] | None,
    tokens: list[int] | None,
    fds: list[FileDescriptor] | None,
) -> Answer:
    """Check what a producer said; UsageError where it makes no sense."""
    if serial is None:
        raise UsageError("An answer to no command", where="serial", remedy="Give the command's serial.")
    names, tokens, fds = names or [], tokens or [], fds or []
    if not len(names) == len(tokens) == len(fds):
        raise UsageError(
            f"{len(names)} names, {len(tokens)} tokens and {len(fds)} descriptors",
            where="names/tokens/fds",
            remedy="Give as many of each.",
        )
    for name, token in zip(names, tokens, strict=True):
        if not 0 <= token < 1 << 64:
            raise UsageError(f"The token {token} is no u64", where=name[:MAX_FILE_NAME])
        if not name or len(name) > MAX_FILE_NAME or not name.isprintable():
            raise UsageError(f"{name[:MAX_FILE_NAME]!r} is no name for a file", where="names")
    if progress is not None and not 0 <= progress <= 1:
        raise UsageError(f"The progress is {progress}", where="progress", remedy="It goes from 0 to 1.")
    files = [(model.Kept(name, token), fd.fileno()) for name, token, fd in zip(names, tokens, fds, strict=True)]
    return Answer(serial, word.value, one_line(reason or ""), progress, files)


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


def _memfd(blob: bytes) -> FileDescriptor:
    fd = os.memfd_create("khod-tree", os.MFD_CLOEXEC)
    with open(fd, "wb", closefd=False) as file:
        file.write(blob)
    return FileDescriptor(fd, should_close=True)


def registry(service: Service, producers: Producers) -> VarlinkInterfaceRegistry:
    """What the socket serves: the interfaces and their introspection."""
    made = VarlinkInterfaceRegistry()
    made.register_interface(service)
    made.register_interface(producers)
    made.register_interface(VarlinkServiceInterface("khod", "khod", __version__, "https://kho.io/", made))
    return made


def connections(made: VarlinkInterfaceRegistry, access: Callable[[], Access]) -> Callable[[], Connection]:
    """A factory of connections that share their count; `access` is asked anew, for a reload."""
    count = Count()
    return lambda: Connection(made, count, access().max_connections_per_user)
