# SPDX-License-Identifier: LGPL-2.1-or-later
"""A thin typed client of io.kho.Handover: one connection, methods that return the model or raise KhoError."""

import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from khod import values, wire
from khod.client.connection import JOURNAL, Connection
from khod.errors import Unreachable
from khod.model import Check, Event, Plan, Producer, Snapshot, Status
from khod.region import Region

T = TypeVar("T")
ANSWER_SECONDS = 60.0
"""How long khod may take to answer; this includes its start with a possible rollback."""

INSPECTION_SECONDS = 600.0
"""How long khod may take to answer a call for which it reads and unpacks images."""

SLOW_SECONDS = 2.0
"""After this time the operator is told what is waited for."""


class Client(Connection):
    """khoctl's calls to khod. Each has a deadline: Unreachable if khod accepts the call and does not answer.

    `patience` is the caller's own deadline in seconds. `on_slow` is called once for a call that is not answered within
    SLOW_SECONDS.
    """

    def __init__(
        self,
        path: Path | str = wire.SOCKET,
        *,
        patience: float | None = None,
        on_slow: Callable[["Client"], None] = lambda _: None,
        connected: socket.socket | None = None,
    ) -> None:
        super().__init__(path, connected)
        self._patience = patience
        self._on_slow = on_slow
        self._began, self._slow = 0.0, math.inf
        self._limit: float | None = None

    def receive_reply(self) -> Mapping[str, Any]:
        """Wait for the next reply until the deadline of its call."""
        while not self.reply_waiting:
            wake = min(self._slow, self._deadline)
            if self.wait_readable(None if wake == math.inf else wake - time.monotonic()):
                self.receive()
            else:
                self.check_overdue()
        self._slow = math.inf
        return super().receive_reply()

    @property
    def _deadline(self) -> float:
        return math.inf if self._limit is None else self._began + self._limit

    def check_overdue(self) -> None:
        """Call `on_slow` once if the last call is slow; raise Unreachable if its deadline is over."""
        now = time.monotonic()
        if now >= self._deadline:
            raise Unreachable(f"khod has not answered within {self._limit:g} s", where=self._path, remedy=JOURNAL)
        if now >= self._slow:
            self._slow = math.inf
            self._on_slow(self)

    def status(self) -> Status:
        """Return the status of the handover."""
        self.call_method("Status")
        return self.receive_status()

    def receive_status(self) -> Status:
        """Wait for the status that answers a call of Status, Activate, Abort or Kexec."""
        return self._decode_reply(Status, self.receive_reply(), "status")

    def check(self, parameters: Mapping[str, Any] | None = None, fds: tuple[int, ...] = ()) -> list[Check]:
        """Run the preflight checks and return them; `parameters` and `fds` are those of Kexec."""
        self.call_method("Check", parameters, fds=fds, limit=INSPECTION_SECONDS)
        return self._decode_reply(list[Check], self.receive_reply(), "checks")

    def plan(self, parameters: Mapping[str, Any] | None = None, fds: tuple[int, ...] = ()) -> Plan:
        """Return what Kexec with these parameters would do."""
        self.call_method("Plan", parameters, fds=fds, limit=INSPECTION_SECONDS)
        return self._decode_reply(Plan, self.receive_reply(), "plan")

    def snapshots(self) -> list[Snapshot]:
        """Return the state trees kept at earlier handovers, newest first."""
        self.call_method("Snapshots")
        return self._decode_reply(list[Snapshot], self.receive_reply(), "snapshots")

    def scratch(self) -> list[Region]:
        """Return the scratch regions; raise Unsupported if there are none."""
        self.call_method("Scratch")
        return self._decode_reply(list[Region], self.receive_reply(), "regions")

    def tree(self, side: str) -> dict[str, bytes]:
        """Return a state tree's blobs by name; the root's is "". `side` is out, in, snapshot, or a snapshot's id."""
        self.call_method("Tree", {"side": side})
        parameters = self.receive_reply()
        names, indexes = parameters["names"], parameters["blobs"]
        return {name: _read_fd(self.fds[index]) for name, index in zip(names, indexes, strict=True)}

    def monitor(self) -> Iterator[Event]:
        """Yield every change from now on, beginning with the current state; Unreachable if khod ends the stream."""
        self.call_method("Monitor", more=True)
        yield self.receive_event()
        self._limit = self._patience  # the next change may come in a month
        while self.more:
            yield self.receive_event()
        raise Unreachable("khod ended the stream", remedy="It was stopped, or this was not read in time.")

    def receive_event(self) -> Event:
        """Wait for the next change after a call of Monitor."""
        return self._decode_reply(Event, self.receive_reply(), "event")

    def producers(self) -> list[Producer]:
        """Return every producer, in the order in which they are called."""
        self.call_method("Producers")
        return self._decode_reply(list[Producer], self.receive_reply(), "producers")

    def receive_rehearsal(self) -> list[Producer]:
        """Wait for the answer to a call of Rehearse."""
        return self._decode_reply(list[Producer], self.receive_reply(), "producers")

    def retry(self, name: str) -> None:
        """Tell a producer again to take back what it left before the last jump."""
        self.call_method("Retry", {"name": name})
        self.receive_reply()

    def forget(self, name: str) -> None:
        """Free what a producer left before the jump."""
        self.call_method("Forget", {"name": name})
        self.receive_reply()

    def call_method(
        self,
        method: str,
        parameters: Mapping[str, Any] | None = None,
        *,
        fds: tuple[int, ...] = (),
        more: bool = False,
        limit: float | None = None,
    ) -> None:
        """Send a call of the interface by its short name; the answer has `limit` seconds (None: ANSWER_SECONDS)."""
        self._began, self._limit = time.monotonic(), self._patience or limit or ANSWER_SECONDS
        self._slow = self._began + SLOW_SECONDS
        self.send_call(f"{wire.INTERFACE}.{method}", parameters, fds=fds, more=more)

    def _decode_reply(self, wanted: type[T], reply: Mapping[str, Any], name: str) -> T:
        try:
            return values.decode_value(wanted, reply[name])
        except (values.DecodeError, KeyError, TypeError):
            raise self.version_mismatch_error() from None


def _read_fd(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)
