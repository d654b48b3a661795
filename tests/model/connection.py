# SPDX-License-Identifier: LGPL-2.1-or-later
"""What reaches khod from outside while it runs: producers' connections, and the kernel's device events."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from khod import values
from khod.concurrency.bounded import ANYTHING
from khod.engine.guard import Seen, Severity, Uevent, Watch
from khod.errors import KhoError, Refused, UsageError
from khod.handover.record import Owner
from khod.handover.record import Process as Identity
from khod.producers.barrier import write_verb
from khod.producers.peer import Peer, Registration
from khod.producers.registrations import Registrations
from khod.server.producer_interface import Word
from khod.server.producers import _build_answer
from tests.model.peer import Gone, Line, PeerProcess, Rejected, Told
from tests.model.process import duplicate

if TYPE_CHECKING:
    from tests.model.host import Khod


class KeptRegistrations(Registrations):
    """The registrations below /run: khod's death leaves them, and its kernel's end does not."""

    def __init__(self, khod: "Khod", lines: list[str]) -> None:
        super().__init__(Path("/run/khod/registrations"))
        self._khod, self._kept, self._open = khod, lines, False

    def _read_lines(self) -> list[str]:
        self._khod.point("registrations", "before")
        return list(self._kept)

    def _rewrite_file(self) -> None:
        self._khod.point("registrations", "before")
        found = [self._encode_line({"registered": values.encode_value(found)}) for found in self._known.values()]
        self._kept[:] = b"".join(found).decode().splitlines()
        self._open = True

    def _append_line(self, values: dict[str, object]) -> None:
        if self._open:
            self._khod.point("registrations", "before")
            self._kept += self._encode_line(values).decode().splitlines()

    def close_file(self) -> None:
        self._open = False


class Watcher:
    """The guard: events wait in a socket until khod reads them."""

    def __init__(self, khod: "Khod", happened: Callable[[Seen], None]) -> None:
        self._khod, self._happened = khod, happened
        self._watch = Watch(frozenset(), frozenset())
        self._queue: list[Uevent] = []
        self.watching = False

    def start(self, abort: Iterable[str], record: Iterable[str], devices: Mapping[str, Iterable[str]]) -> None:
        self._khod.point("guard.start", "before")
        found = tuple((name, path) for name, paths in devices.items() for path in paths)
        self._watch, self.watching = Watch(frozenset(abort), frozenset(record), found), True

    def stop(self) -> None:
        self._khod.point("guard.stop", "before")
        self.watching = False
        self._queue.clear()

    def process_pending(self) -> None:
        self._khod.point("guard.look", "before")
        self._read()

    def event(self, event: Uevent) -> bool:
        """The kernel sends this; whether it must end a handover."""
        if not self.watching:
            return False
        self._queue.append(event)
        self._khod.loop.call_soon(self._read)
        seen = self._watch.judge_event(event)
        return seen is not None and seen.severity is Severity.abort

    def _read(self) -> None:
        while self._queue and self.watching:
            seen = self._watch.judge_event(self._queue.pop(0))
            if seen is not None:
                self._happened(seen)


class Connection(Line):
    """A producer's connection: what `khod.server.producers` does with its calls."""

    def __init__(self, khod: "Khod", process: PeerProcess) -> None:
        self._khod, self._process = khod, process
        self._identity = Identity(process.process.pid, process.process.pid)
        self._peer: Peer | None = None
        self._open = True
        self._waiting: list[asyncio.Future[Any]] = []
        khod.connections.append(self)

    def call(self, method: str, parameters: dict[str, Any]) -> "asyncio.Future[Any]":
        future = self._khod.scene.world_loop.create_future()
        if not self._open or not self._khod.process.alive:
            future.set_exception(Gone())
            return future
        self._waiting.append(future)
        serve = self._register(parameters) if method == "Register" else self._next(parameters)
        self._khod.serve(self._reply(serve, future))
        return future

    def close(self) -> None:
        """The producer's end is closed."""
        self.lost()
        if self._khod.process.alive:
            self._khod.loop.call_soon(self._left)

    def lost(self) -> None:
        """Nothing more is heard of khod."""
        self._open = False
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            self._khod.scene.world_loop.call_soon(fail, future, Gone())

    def _hang_up(self) -> None:
        self.lost()
        self._left()

    def _left(self) -> None:
        if self._peer is not None:
            self._khod.engine.registry.peers.remove_peer(self._peer)

    async def _reply(self, serve: Coroutine[Any, Any, Any], future: "asyncio.Future[Any]") -> None:
        world = self._khod.scene.world_loop
        try:
            result = await serve
        except KhoError:
            world.call_soon(fail, future, Rejected())
        except ANYTHING:  # khod answers an exception of any class with an error
            world.call_soon(fail, future, Rejected())
        else:
            world.call_soon(give, future, result)

    async def _register(self, parameters: dict[str, Any]) -> str:
        owner = Owner(1000, f"{self._process.name}.service")
        terms = Registration(parameters["timeout"], parameters["after"])
        try:
            made = await self._khod.engine.register_producer(self._process.name, owner, self._identity, terms)
        except Refused:
            self._khod.loop.call_soon(self._hang_up)
            raise
        self._peer = made
        if not self._open:
            self._left()
        return write_verb(made.claim.told)

    async def _next(self, parameters: dict[str, Any]) -> Told:
        if self._peer is None:
            raise Refused("This connection is not a producer")
        khod, word = self._khod.process, parameters.get("answer")
        fds = [_Passed(khod.adopt(duplicate(fd))) for fd in parameters.get("fds", ())]
        for fd in parameters.get("fds", ()):
            self._process.process.close(fd)
        try:
            said = None
            if word is not None:
                names, tokens = parameters.get("names"), parameters.get("tokens")
                reason, progress = parameters.get("reason"), parameters.get("progress")
                said = _build_answer(
                    parameters["serial"], Word[word], reason, progress, names, tokens, cast("Any", fds)
                )
            command = await self._peer.conversation.exchange_answer(said)
        except UsageError:
            self._khod.loop.call_soon(self._hang_up)
            raise
        finally:
            for each in fds:
                khod.close(each.fd)
        given = [self._process.process.adopt(duplicate(fd)) for fd in command.fds]
        for fd in command.fds:
            khod.close(fd)
        names = [kept.name for kept in command.kept]
        return Told(command.serial, command.verb.value, command.run, command.timeout, names if given else (), given)


@dataclass(frozen=True)
class _Passed:
    """A descriptor that came in with a call."""

    fd: int

    def fileno(self) -> int:
        return self.fd


def give(future: "asyncio.Future[Any]", result: Any) -> None:
    if not future.done():
        future.set_result(result)


def fail(future: "asyncio.Future[Any]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
