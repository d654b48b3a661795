# SPDX-License-Identifier: LGPL-2.1-or-later
"""The service manager's file descriptor store: descriptors in it outlive khod and, with LUO, the kernel too.

systemd keeps each descriptor sent with `FDSTORE=1` until `FDSTOREREMOVE=1` names it, and passes it to the next khod
(LISTEN_FDNAMES). From 261 on it carries the LUO sessions in the store across `systemctl kexec`.
"""

import os
import select
import threading
from typing import Protocol

from khod.concurrency.worker import Worker
from khod.errors import Failed
from khod.systemd import notification

SETTLE_SECONDS = 10.0
"""Seconds the service manager has to read what it was sent."""
SENT_SECONDS = 1.0
"""Seconds that a message may wait for room in the service manager's socket, as while PID 1 hangs."""


class FdStore(Protocol):
    """A store for descriptors outside khod's process."""

    def store_fd(self, name: str, fd: int) -> None:
        """Store a descriptor under a name; the given one stays the caller's. May be called from any thread."""

    def wait_sent(self) -> None:
        """Block this thread until everything is sent, SENT_SECONDS at most: what was sent outlives khod."""

    def remove_fd(self, name: str) -> None:
        """Remove the descriptor of this name from the store, which closes it."""

    async def wait_settled(self) -> None:
        """Wait until the store has everything sent so far; OSError, or TimeoutError, if it does not take it."""


class ServiceManager:
    """systemd's store; without a service manager (NOTIFY_SOCKET is not set) only khod's own descriptors keep the files.

    A thread of its own sends the messages, in order: khod continues if PID 1 does not read.
    """

    def __init__(self) -> None:
        self._worker = Worker("fdstore", "The service manager")
        self._failed: OSError | None = None

    def store_fd(self, name: str, fd: int) -> None:
        copy = os.dup(fd)  # the given one may be closed before it is sent

        def send() -> None:
            try:
                notification.send_descriptor(name, copy)
            except OSError as error:
                self._failed = error
            finally:
                os.close(copy)

        self._worker.call_later(send)

    def wait_sent(self) -> None:
        sent = threading.Event()
        self._worker.call_later(sent.set)
        sent.wait(SENT_SECONDS)

    def remove_fd(self, name: str) -> None:
        self._worker.call_later(lambda: notification.send_notification(f"FDSTOREREMOVE=1\nFDNAME={name}"))

    async def wait_settled(self) -> None:
        if not os.environ.get("NOTIFY_SOCKET"):
            return
        try:
            await self._worker.call_within(self._send_barrier, "taking a descriptor into its store", SETTLE_SECONDS)
        except Failed as error:
            raise TimeoutError(error.what) from error

    def _send_barrier(self) -> None:
        """Send BARRIER=1, and return when the service manager has closed its descriptor (sd_notify_barrier(3)).

        Raises the OSError of a descriptor that could not be sent before, and TimeoutError after SETTLE_SECONDS.
        """
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed
        reader, writer = os.pipe()
        try:
            try:
                notification.send_notification("BARRIER=1", [writer])
            finally:
                os.close(writer)
            ended = select.poll()
            ended.register(reader, select.POLLHUP)
            if not ended.poll(SETTLE_SECONDS * 1000):
                raise TimeoutError("the service manager has not read what it was sent")
        finally:
            os.close(reader)
