# SPDX-License-Identifier: LGPL-2.1-or-later
"""Close descriptors that may take long to close.

Closing the last reference to another process's file may block: a TCP socket lingers as long as its owner chose, and a
file of a FUSE or NFS server asks that server. systemd closes such files in a thread too (asynchronous_close).
"""

import asyncio
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue


class Closer:
    """Closes descriptors in a thread of its own, one after the other; khod does not wait for them when it ends."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: SimpleQueue[tuple[int, Callable[[], None]]] = SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._thread: threading.Thread | None = None
        self._waiting = 0

    @property
    def count_waiting(self) -> int:
        """The number of descriptors that are not closed yet."""
        return self._waiting

    def close_later(self, fd: int, closed: Callable[[], None] = lambda: None) -> None:
        """Close a descriptor later; `closed` is called in the event loop afterwards."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._close_queue, name=self._name, daemon=True)
            self._thread.start()
        self._waiting += 1
        self._queue.put((fd, closed))

    def _close_queue(self) -> None:
        while True:
            fd, closed = self._queue.get()
            with suppress(OSError):  # the descriptor is closed all the same: close(2)
                os.close(fd)
            try:
                self._loop.call_soon_threadsafe(self._note_closed, closed)
            except RuntimeError:
                return  # the event loop has ended, and khod with it

    def _note_closed(self, closed: Callable[[], None]) -> None:
        self._waiting -= 1
        closed()
