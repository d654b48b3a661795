"""A thin typed client of io.kho.Handover: one connection, methods that return the model or raise KhoError."""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from khod import wire
from khod.client.connection import JOURNAL, Connection
from khod.errors import Unreachable
from khod.model import Check, Event, Plan, Producer, Snapshot, Status
from khod.region import Region

T = TypeVar("T")
ANSWER = 60.0
"""Seconds khod has for an answer; its start, a rollback included, comes before."""

INSPECTION = 600.0
"""Seconds it has where it reads and unpacks images for it."""

SLOW = 2.0
"""Seconds after which an operator is told what is waited for."""


class Client(Connection):
    """What khoctl asks of khod. Each answer has a deadline: Unreachable where khod takes the call and is silent.

    `patience` is that deadline in seconds, where the caller has one of its own. `on_slow` is called once for a call
    that is not answered within `SLOW` seconds.
    """

    def __init__(
        self,
        path: Path = Path(wire.SOCKET),
        *,
        patience: float | None = None,
        on_slow: Callable[["Client"], None] = lambda _: None,
    ) -> None:
        super().__init__(path)
        self._patience = patience
        self._on_slow = on_slow
        self._began, self._slow = 0.0, math.inf
        self._limit: float | None = None

    def reply(self) -> Mapping[str, Any]:
        """Wait for the next reply until the deadline of its call."""
        while not self.waiting:
            wake = min(self._slow, self._ends)
            if self.readable(None if wake == math.inf else wake - time.monotonic()):
                self.receive()
            else:
                self.check_overdue()
        self._slow = math.inf
        return super().reply()

    @property
    def _ends(self) -> float:
        return math.inf if self._limit is None else self._began + self._limit

    def check_overdue(self) -> None:
        """Call `on_slow`, once, where the last call has taken so long; Unreachable where its deadline is over."""
        now = time.monotonic()
        if now >= self._ends:
            raise Unreachable(f"khod has not answered within {self._limit:g} s", where=self._path, remedy=JOURNAL)
        if now >= self._slow:
            self._slow = math.inf
            self._on_slow(self)

    def status(self) -> Status:
        """How it stands."""
        self.ask("Status")
        return self.answer()

    def answer(self) -> Status:
        """Wait for the status that a call of Status, Activate, Abort or Kexec is answered with."""
        return self._decoded(Status, self.reply(), "status")

    def check(self, parameters: Mapping[str, Any] | None = None, fds: tuple[int, ...] = ()) -> list[Check]:
        """The preflight checks; `parameters` and `fds` as of Kexec."""
        self.ask("Check", parameters, fds=fds, limit=INSPECTION)
        return self._decoded(list[Check], self.reply(), "checks")

    def plan(self, parameters: Mapping[str, Any] | None = None, fds: tuple[int, ...] = ()) -> Plan:
        """What Kexec with these parameters would do."""
        self.ask("Plan", parameters, fds=fds, limit=INSPECTION)
        return self._decoded(Plan, self.reply(), "plan")

    def snapshots(self) -> list[Snapshot]:
        """The state trees that were kept when they left, the newest first."""
        self.ask("Snapshots")
        return self._decoded(list[Snapshot], self.reply(), "snapshots")

    def scratch(self) -> list[Region]:
        """The scratch regions; Unsupported where there are none."""
        self.ask("Scratch")
        return self._decoded(list[Region], self.reply(), "regions")

    def tree(self, side: str) -> dict[str, bytes]:
        """A state tree's blobs by name, the root's is ""; `side` is out, in, snapshot, or a snapshot's id."""
        self.ask("Tree", {"side": side})
        parameters = self.reply()
        names, indexes = parameters["names"], parameters["blobs"]
        return {name: _contents(self.fds[index]) for name, index in zip(names, indexes, strict=True)}

    def monitor(self) -> Iterator[Event]:
        """Every change from now on, beginning with how it stands; Unreachable when khod ends it."""
        self.ask("Monitor", more=True)
        yield self.event()
        self._limit = self._patience  # a change may come in a month
        while self.more:
            yield self.event()
        raise Unreachable("khod ended the stream", remedy="It was stopped, or this was not read in time.")

    def event(self) -> Event:
        """The next change, after a call of Monitor."""
        return self._decoded(Event, self.reply(), "event")

    def producers(self) -> list[Producer]:
        """Every producer, in the order they are told."""
        self.ask("Producers")
        return self._decoded(list[Producer], self.reply(), "producers")

    def rehearsed(self) -> list[Producer]:
        """Wait for the answer to a call of Rehearse."""
        return self._decoded(list[Producer], self.reply(), "producers")

    def retry(self, name: str) -> None:
        """Tell a producer again to take back what it left before the last jump."""
        self.ask("Retry", {"name": name})
        self.reply()

    def forget(self, name: str) -> None:
        """Free what a producer left before the jump."""
        self.ask("Forget", {"name": name})
        self.reply()

    def ask(
        self,
        method: str,
        parameters: Mapping[str, Any] | None = None,
        *,
        fds: tuple[int, ...] = (),
        more: bool = False,
        limit: float | None = None,
    ) -> None:
        """Send a call of the interface by its short name; its answer has `limit` seconds, None: ANSWER."""
        self._began, self._limit = time.monotonic(), self._patience or limit or ANSWER
        self._slow = self._began + SLOW
        self.send(f"{wire.INTERFACE}.{method}", parameters, fds=fds, more=more)

    def _decoded(self, wanted: type[T], reply: Mapping[str, Any], name: str) -> T:
        try:
            return wire.decode(wanted, reply[name])
        except (TypeError, KeyError, AttributeError):
            raise self.stranger() from None


def _contents(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)
