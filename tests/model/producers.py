# SPDX-License-Identifier: LGPL-2.1-or-later
"""Those who hold state: what is true of each, and what each does with the next thing it is told.

`FileProducer` stands for the kinds a file describes: khod runs something for each verb. `PeerProcess` is a process that
connects, and does what `khod.producer` does: it undoes by itself what khod does not count on any more.
"""

import asyncio
from collections.abc import Callable
from dataclasses import field
from typing import Protocol

from khod.dataclass import dataclass
from khod.producers.barrier import ParticipantVeto, ProducerCall, Verb
from khod.producers.configured import Configured, one_line
from tests.model.clock import VirtualLoop
from tests.model.faults import FOREVER

AGAIN = 1.0
"""Seconds after which a producer connects again, as khod.producer does."""

TABLE = "table"
"""The name of the file a producer hands over."""

BACK = {"thaw": "prepare", "cancel": "", "restore": "", "finish": ""}
UNDO = {"freeze": ("thaw", "prepare"), "prepare": ("cancel", "")}
GARBAGE_TEXT = "no\x1b[2J\nidle: khod started\x00\u202e"

KINDS = ("ready", "veto", "hang", "die", "late", "leave", "not_yet", "garbage", "broken")
"""What a producer may do with a verb. `leave` and `garbage` are a connection's: a file's producer says no then.

A `broken` one stays so until it is mended: khod cannot even start the command (a NUL in it), and a peer says no.
"""


@dataclass(frozen=True)
class Behaviour:
    """What a producer does when it is next told a verb.

    `first` is whether the verb has its effect before the trouble. One that hangs does so for `seconds`, and is not
    cut short for `stubborn` seconds.
    """

    kind: str = "ready"
    seconds: float = 0.0
    first: bool = True
    stubborn: float = 0.0


READY = Behaviour()


@dataclass
class Left:
    """What a producer left before the jump, and what became of it."""

    name: str
    run: str
    restores: bool
    contents: dict[str, str] = field(default_factory=dict)
    session: str = ""
    arrived: bool = True
    """Whether the kernel and its service manager brought it over."""
    taken_back: bool = False
    forgotten: bool = False


class Scene(Protocol):
    """What producers see of the host."""

    left: dict[str, Left]
    world_loop: VirtualLoop

    async def async_point(self, site: str, when: str) -> None:
        """A call of khod's that may fail or hang."""

    async def khod_is_up(self) -> None:
        """Wait until a khod runs: a producer tries each second, and the model does not."""

    def lost_member(self, service: "Service") -> None:
        """Called when one that takes part has died, or left."""


class Service:
    """The truth of one holder of state."""

    def __init__(self, name: str, scene: Scene, key: str = "") -> None:
        self.name, self.scene = name, scene
        self.key = key or name
        """What tells it from another of the same name."""
        self.alive = True
        self.prepared = False
        self.frozen = False
        self.run = ""
        self.frozen_run = ""
        """The handover it was frozen for last, if it still is or not."""
        self.restarted = False
        """Whether it died and came back in this boot: nobody watches what has a file for that."""
        self.lost_its_file = False
        """Whether its file was removed under it: only the record can say of it then."""
        self.is_unknown = False
        """Whether neither a file nor a record that can be read has told khod of it when an abort was forced."""
        self.behaviours: dict[str, list[Behaviour]] = {}

    def boot(self) -> None:
        """Start anew: what it held is gone, unless it takes it back."""
        self.alive = True
        self.prepared = self.frozen = False
        self.run = self.frozen_run = ""
        self.lost_its_file = self.restarted = self.is_unknown = False

    def next_behaviour(self, verb: str) -> Behaviour:
        planned = self.behaviours.get(verb)
        if not planned:
            return READY
        return planned[0] if planned[0].kind == "broken" else planned.pop(0)

    def do(self, verb: str, run: str) -> None:
        """Have the effect of a verb."""
        match verb:
            case "prepare":
                self.prepared, self.run, self.restarted, self.is_unknown = True, run, False, False
            case "freeze":
                self.prepared = self.frozen = True
                self.run = self.frozen_run = run
            case "thaw":
                self.frozen = False
            case "cancel":
                self.prepared = False
                self.run = self.run if self.frozen else ""

    def die(self) -> None:
        """End, with all that it held."""
        if not self.alive:
            return
        took_part = self.prepared or self.frozen
        self.alive = False
        self.prepared = self.frozen = False
        if took_part:
            self.scene.lost_member(self)

    @property
    def truth(self) -> str:
        """What is true of it, for counting states."""
        left = self.scene.left.get(self.key)
        claim = "" if left is None else ("t" if left.taken_back else "w")
        held = "f" if self.frozen else ("p" if self.prepared else "-")
        return f"{'+' if self.alive else 'x'}{held}{claim}"


@dataclass(frozen=True)
class FileProducer(Configured):
    """One that a file describes: a command for each verb, ended when khod gives it up."""

    kind: str = "hook"
    service: Service = None  # type: ignore[assignment]
    has_restore: bool = False
    dead: Callable[[], bool] = lambda: False
    """Whether the khod that runs it is gone, and the command with it."""

    @property
    def restores_state(self) -> bool:
        return self.has_restore

    async def carry_out(self, telling: ProducerCall) -> None:
        verb, service = telling.verb.value, self.service
        if verb in ("restore", "finish") and not self.has_restore:
            return
        await service.scene.async_point("producer.tell", "before")
        behaviour = service.next_behaviour(verb)
        if not service.alive and verb in ("prepare", "freeze", "restore"):
            raise ParticipantVeto("exit code 1")
        if behaviour.kind == "broken":
            raise ValueError("embedded null byte")
        if behaviour.kind == "die":
            if behaviour.first:
                self._do(telling)
            service.die()
            raise ParticipantVeto("killed by SIGKILL")
        if behaviour.kind == "not_yet":
            telling.not_yet(one_line(GARBAGE_TEXT), 0.5)
        if behaviour.first and behaviour.kind != "late":
            self._do(telling)
        if behaviour.seconds:
            await self._sleep(behaviour)
        if self.dead():
            return
        if behaviour.kind in ("veto", "leave", "garbage"):
            raise ParticipantVeto(one_line(GARBAGE_TEXT if behaviour.kind == "garbage" else "exit code 1"))
        if not behaviour.first or behaviour.kind == "late":
            self._do(telling)
        await service.scene.async_point("producer.tell", "after")

    def _do(self, telling: ProducerCall) -> None:
        if self.dead():
            return
        self.service.do(telling.verb.value, telling.run)
        left = self.service.scene.left.get(self.service.key)
        if telling.verb is Verb.restore and left is not None and self.service.alive:
            left.taken_back = left.arrived
            if not left.arrived:
                raise ParticipantVeto("nothing arrived")

    async def _sleep(self, behaviour: Behaviour) -> None:
        """Take long; a command in uninterruptible sleep takes as long as it takes, killed or not."""
        loop = asyncio.get_running_loop()
        until, earliest = loop.time() + behaviour.seconds, loop.time() + behaviour.stubborn
        cancelled: asyncio.CancelledError | None = None
        while loop.time() < (min(until, earliest) if cancelled else until):
            rest = (min(until, earliest) if cancelled else until) - loop.time()
            try:
                if rest == FOREVER:
                    await loop.create_future()
                await asyncio.sleep(rest)
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled

    async def make_way(self, _note: str) -> None:
        await self.service.scene.async_point("producer.leave", "before")

    async def wait_returned(self) -> None:
        await self.service.scene.async_point("producer.returned", "before")
