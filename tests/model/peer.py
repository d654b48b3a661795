# SPDX-License-Identifier: LGPL-2.1-or-later
"""A producer that connects: a process that does what `khod.producer` does.

It undoes by itself what khod does not count on any more.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tests.model.faults import FOREVER
from tests.model.process import Memory, Process, file_of
from tests.model.producers import BACK, GARBAGE_TEXT, TABLE, UNDO, Scene, Service

AGAIN = 1.0
"""Seconds after which a producer connects again, as khod.producer does."""


class Gone(Exception):
    """khod is not there, or has hung up."""


class Rejected(Exception):
    """khod has refused a call; the connection stays."""


@dataclass(frozen=True)
class Told:
    """A command as it comes over the wire."""

    serial: int
    verb: str
    run: str
    timeout: float
    names: Sequence[str] = ()
    fds: Sequence[int] = ()


class Line(Protocol):
    """A connection to khod, from the producer's side."""

    def call(self, method: str, parameters: dict[str, Any]) -> Awaitable[Any]:
        """Call a method; Gone or Rejected."""

    def close(self) -> None:
        """Hang up."""


class PeerProcess(Service):
    """A producer that connects. `connect` gives a line to khod, or raises Gone."""

    def __init__(
        self, name: str, scene: Scene, connect: Callable[["PeerProcess"], Line], pids: Callable[[], int]
    ) -> None:
        super().__init__(name, scene)
        self.timeout = 30.0
        self.after: tuple[str, ...] = ()
        self.files = True
        """Whether it hands a file over."""
        self.process = Process(name, pids())
        self.registered = False
        """Whether khod has taken it in, and it has undone what khod does not count on."""
        self.rejected = False
        self._refusals = 0
        self.hang: asyncio.Future[None] | None = None
        self._connect, self._pids = connect, pids
        self._line: Line | None = None
        self._counts = ""
        self._tokens = 0
        self._task: asyncio.Task[None] | None = None
        self.alive = False

    @property
    def connected(self) -> bool:
        return self._line is not None

    def boot(self) -> None:
        """The kernel is another: nothing of it runs until it is started."""
        self._stop()
        super().boot()
        self.alive = False

    def start(self) -> None:
        """Be started by the service manager."""
        if self.alive:
            return
        self.alive = True
        self.rejected = False
        self.process = Process(self.name, self._pids())
        self._counts, self._tokens = "", 0
        self._task = self.scene.world_loop.create_task(self._live())

    def die(self) -> None:
        self._stop()
        super().die()

    def come_back(self) -> None:
        """End a hang."""
        if self.hang is not None and not self.hang.done():
            self.hang.set_result(None)

    def hang_up(self) -> None:
        """Lose the connection, and connect again after a while."""
        self._drop()

    def _stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None
        self.process.end()
        self._drop()

    def _drop(self) -> None:
        line, self._line = self._line, None
        self.registered = False
        if line is not None:
            line.close()

    async def _live(self) -> None:
        answer: dict[str, Any] = {}
        while self.alive:
            try:
                if self._line is None:
                    await self._register()
                    answer = {}
                answer = await self._turn(answer)
            except Gone:
                self._drop()
                self._refusals = self._refusals + 1 if self.rejected else 0
                await asyncio.sleep(AGAIN * 2**self._refusals)
                await self.scene.khod_is_up()

    async def _register(self) -> None:
        self._line = self._connect(self)
        try:
            told = await self._line.call("Register", {"timeout": self.timeout, "after": self.after})
        except Rejected:
            self.rejected = True
            raise Gone from None
        self.rejected = False
        if told == "restore":
            self._counts = ""
            self.prepared = self.frozen = False
        while self._counts and self._counts != told:
            undo, self._counts = UNDO[self._counts]
            self.do(undo, "")
        self.registered = True

    async def _turn(self, answer: dict[str, Any]) -> dict[str, Any]:
        try:
            told: Told = await self._next(answer)
        except Rejected:
            return {}
        said = {"serial": told.serial, **await self._handle(told)}
        self._counts = BACK.get(told.verb, told.verb)
        if not self._counts:
            self._tokens = 0
        return said

    async def _next(self, answer: dict[str, Any]) -> Told:
        if self._line is None:
            raise Gone
        told: Told = await self._line.call("Next", answer)
        return told

    async def _handle(self, told: Told) -> dict[str, Any]:
        """Do what was told; the answer to it."""
        behaviour = self.next_behaviour(told.verb)
        contents = {name: self._content(fd) for name, fd in zip(told.names, told.fds, strict=True)}
        if behaviour.first:
            self._effect(told, contents)
        if behaviour.kind == "die":
            self.scene.world_loop.call_soon(self.die)
            await self.scene.world_loop.create_future()
        if behaviour.kind == "leave":
            self._drop()
        if behaviour.kind == "not_yet":
            again = await self._next(
                {"serial": told.serial, "answer": "not_yet", "reason": GARBAGE_TEXT, "progress": 0.5}
            )
            if again.serial != told.serial:
                return await self._instead(told, again, contents)
        if behaviour.seconds:
            self.hang = self.scene.world_loop.create_future()
            await asyncio.wait({self.hang}, timeout=None if behaviour.seconds == FOREVER else behaviour.seconds)
        if behaviour.kind in ("veto", "broken"):
            return {"answer": "veto", "reason": GARBAGE_TEXT}
        if behaviour.kind == "garbage":
            return {
                "answer": "ready",
                "serial": told.serial + 7 * behaviour.first,
                "names": ["a", "a"],
                "tokens": [1, 1],
                "fds": self._two(),
            }
        if not behaviour.first:
            self._effect(told, contents)
        return {"answer": "ready", **self._handed_over(told)}

    async def _instead(self, told: Told, again: Told, contents: dict[str, str]) -> dict[str, Any]:
        """khod does not wait for this any more, and says something else: the answer to that."""
        self._counts = BACK.get(told.verb, told.verb)
        self._effect(told, contents)
        contents = {name: self._content(fd) for name, fd in zip(again.names, again.fds, strict=True)}
        self._effect(again, contents)
        self._counts = BACK.get(again.verb, again.verb)
        return {"answer": "ready", "serial": again.serial}

    def _effect(self, told: Told, contents: dict[str, str]) -> None:
        self.do(told.verb, told.run)
        left = self.scene.left.get(self.key)
        if told.verb == "restore" and left is not None:
            left.taken_back = left.arrived and contents == left.contents

    def _handed_over(self, told: Told) -> dict[str, Any]:
        if told.verb != "prepare" or not self.files:
            return {}
        self._tokens += 1
        table = self.process.open(Memory(f"{self.name} of {told.run}"))
        return {"names": [TABLE], "tokens": [self._tokens], "fds": [table]}

    def _two(self) -> list[int]:
        table = self.process.open(Memory("garbage"))
        return [table, table]

    def _content(self, fd: int) -> str:
        file = file_of(fd)
        self.process.close(fd)
        return file.content if isinstance(file, Memory) else ""
