# SPDX-License-Identifier: LGPL-2.1-or-later
"""The turns of clients: users take turns, and together have no more than their share of time."""

import asyncio
import select
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from khod.server.load import Allowance

MAX_EVENTS = 64
"""The number of clients that are checked in one turn of the event loop."""


class LaneMember(Protocol):
    """A client of a lane."""

    uid: int
    events: int
    """The events of epoll that it has not handled yet; 0 if it waits for no turn."""

    def handle_ready(self) -> None:
        """Read or write, at most one message."""

    def abort_connection(self) -> None:
        """End the connection."""


class Lane:
    """Clients that are watched and served together.

    They are in an epoll of their own, which is one descriptor for the event loop. A lane that has used its allowance is
    not polled, however many of its clients are ready.
    """

    def __init__(self, turn_seconds: float, allowance: Allowance | None = None) -> None:
        """Serve for `turn_seconds` at a time; without an allowance, as long as there is work."""
        self._turn_seconds = turn_seconds
        self._allowance = allowance
        self._loop = asyncio.get_running_loop()
        self._epoll = select.epoll()
        self._members: dict[int, LaneMember] = {}
        self._work: dict[int, deque[tuple[LaneMember, Callable[[], None]]]] = {}
        self._users: deque[int] = deque()
        self._next: asyncio.Handle | None = None
        self._paused = False
        self._in_turn = False
        self._loop.add_reader(self._epoll.fileno(), self._on_ready)

    def close(self) -> None:
        """Stop serving."""
        if self._next is not None:
            self._next.cancel()
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()

    def add_member(self, fd: int, member: LaneMember, events: int) -> None:
        """Watch a client for these events of epoll(7)."""
        self._members[fd] = member
        self._epoll.register(fd, events)

    def watch_events(self, fd: int, events: int) -> None:
        """Watch a client for other events."""
        self._epoll.modify(fd, events)

    def remove_member(self, fd: int) -> None:
        """Stop watching a client; work submitted for it is still done."""
        if self._members.pop(fd, None) is not None and not self._epoll.closed:
            self._epoll.unregister(fd)

    def submit_work(self, member: LaneMember, work: Callable[[], None]) -> None:
        """Run work for a client when it is its user's turn."""
        queue = self._work.get(member.uid)
        if queue is None:
            queue = self._work[member.uid] = deque()
            self._users.append(member.uid)
        queue.append((member, work))
        if self._next is None and not self._in_turn and not self._epoll.closed:
            self._next = self._loop.call_soon(self._go_on)

    def _on_ready(self) -> None:
        if self._next is None:
            self._take_turns()

    def _go_on(self) -> None:
        self._next = None
        if self._paused:
            self._paused = False
            self._loop.add_reader(self._epoll.fileno(), self._on_ready)
        self._take_turns()

    def _take_turns(self) -> None:
        began = time.monotonic()
        until = began + self._turn_seconds
        if self._allowance is not None:
            until = min(until, began + self._allowance.left_seconds())
        self._in_turn = True
        try:
            if until > began:
                self._collect_ready()
            while self._users and time.monotonic() < until:
                self._do_next()
        finally:
            self._in_turn = False
            self._plan_turn(time.monotonic() - began)

    def _collect_ready(self) -> None:
        for fd, events in self._epoll.poll(0, MAX_EVENTS):
            member = self._members[fd]
            waits = member.events
            member.events |= events
            if not waits:
                self.submit_work(member, member.handle_ready)

    def _do_next(self) -> None:
        uid = self._users.popleft()
        queue = self._work[uid]
        member, work = queue.popleft()
        if queue:
            self._users.append(uid)
        else:
            del self._work[uid]
        try:
            work()
        except Exception as error:  # noqa: BLE001  # one client's error must not end the turns of others
            self._loop.call_exception_handler({"message": "Serving a client failed", "exception": error})
            member.abort_connection()

    def go_on(self) -> None:
        """Compute the waiting time again, because the share has changed."""
        if self._paused and self._next is not None:
            self._next.cancel()
            self._next = self._loop.call_soon(self._go_on)

    def _plan_turn(self, spent_seconds: float) -> None:
        """Schedule the next turn: at once, or when the allowance has filled up."""
        wait_seconds = 0.0
        if self._allowance is not None:
            self._allowance.spend_time(spent_seconds)
            wait_seconds = self._allowance.wait_seconds()
        if wait_seconds:
            self._paused = True
            self._loop.remove_reader(self._epoll.fileno())
            self._next = self._loop.call_later(wait_seconds, self._go_on)
        elif self._users:
            self._next = self._loop.call_soon(self._go_on)
