# SPDX-License-Identifier: LGPL-2.1-or-later
"""What all connections share: the engine's interfaces, rights, turns, room, answers."""

import asyncio
import socket
from collections.abc import Callable, Coroutine, Hashable
from typing import Any

from khod.config import Access
from khod.server import messages
from khod.server.access import Groups, Standing
from khod.server.answers import Answers
from khod.server.closer import Closer
from khod.server.files import Room, dispose_socket
from khod.server.interfaces import Interfaces
from khod.server.lane import Lane
from khod.server.limits import BUFFERED_BYTES, USER_BUFFERED_BYTES, Limits, Quota
from khod.server.load import (
    CLIENTS_SHARE,
    CLIENTS_SHARE_BUSY,
    QUESTIONS_SHARE,
    QUESTIONS_SHARE_BUSY,
    Allowance,
)
from khod.server.monitors import Monitors
from khod.server.places import Places
from khod.server.rules import OPERATORS
from khod.wire import MAX_FDS

TURN_SECONDS = 0.005
"""How long clients with rights are served before the event loop does other work."""
OTHERS_TURN_SECONDS = 0.001
"""The same for clients without rights."""


class Shared:
    """The shared state of one server."""

    def __init__(self, interfaces: Interfaces, monitors: Monitors, access: Callable[[], Access]) -> None:
        self.interfaces = interfaces
        self.monitors = monitors
        self.load = monitors.load
        self.groups = Groups(access)
        limits = Limits.of_process()
        self.places = Places(limits, lambda: access().max_connections_per_user)
        self._buffered = Quota(BUFFERED_BYTES, USER_BUFFERED_BYTES)
        self._max_unclosed = limits.unclosed
        self._sockets, self._files = Closer("sockets"), Closer("files")
        self._roots_room = Room(limits.files, limits.files)
        self._room = Room(limits.files, max(MAX_FDS, limits.files // 2), self._files)
        share = self.load.make_share(CLIENTS_SHARE, CLIENTS_SHARE_BUSY)
        self._lane, self._others_lane = Lane(TURN_SECONDS), Lane(OTHERS_TURN_SECONDS, Allowance(share))
        share = self.load.make_share(QUESTIONS_SHARE, QUESTIONS_SHARE_BUSY)
        self._answers, self._others_answers = Answers(), Answers(Allowance(share))
        self.load.on_relief += [self._others_lane.go_on, self._others_answers.go_on]
        self._fixed: dict[Hashable, bytes] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def lane_for(self, *, rights: bool) -> Lane:
        """Return the lane in which a client is served."""
        return self._lane if rights else self._others_lane

    def answers_for(self, standing: Standing) -> Answers:
        """Return the object that computes the answers to a client's questions."""
        return self._answers if standing in OPERATORS else self._others_answers

    def room_of(self, uid: int) -> Room:
        """Return the room for a user's descriptors."""
        return self._roots_room if uid == 0 else self._room

    def buffer_quota(self, uid: int) -> Quota | None:
        """Return the limit of a user's unfinished messages and unread answers; None for root."""
        return None if uid == 0 else self._buffered

    def fixed_answer(self, question: Hashable, serve: Callable[[], Any]) -> bytes:
        """Return an answer that is always the same; it is computed once."""
        if question not in self._fixed:
            self._fixed[question] = messages.encode_reply(serve().parameters)
        return self._fixed[question]

    def spawn_task(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a task to its end, even if its client has gone."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @property
    def trusts_senders(self) -> bool:
        """Whether descriptors may be sent before accept(2): not while too many sockets with some wait to be closed."""
        return self._sockets.count_waiting <= self._max_unclosed // 2

    def dispose_socket(self, sock: socket.socket, uid: int, closed: Callable[[], None] = lambda: None) -> None:
        """Close a client's socket, with any unread data; `closed` is called afterwards."""
        if uid == 0 or self._sockets.count_waiting > self._max_unclosed:
            sock.close()
            closed()
        else:
            dispose_socket(sock, self._sockets, closed)

    def close(self) -> None:
        """Stop serving."""
        self._lane.close()
        self._others_lane.close()
