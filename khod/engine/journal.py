# SPDX-License-Identifier: LGPL-2.1-or-later
"""What khod sends to systemd: readiness, status text, watchdog messages, and the records of `journal_fields`.

Threads of their own send it: a journald or a PID 1 that does not read blocks the sender, and reports about a handover
must not decide how it goes. What cannot be sent is dropped.
"""

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any

from khod.concurrency.worker import Worker
from khod.deferred import defer_module
from khod.engine.journal_fields import Message, event_fields, message_fields
from khod.errors import KhoError
from khod.handover.record import Record
from khod.model import Event, EventKind
from khod.producers.barrier import READY
from khod.systemd.journal_record import send_record
from khod.systemd.notifier import MAX_WAITING, notify_manager, start_notifier
from khod.text import one_line

if TYPE_CHECKING:
    from khod.systemd import journald
else:
    journald = defer_module("khod.systemd.journald")

STATUS_REST_SECONDS = 0.1
"""Minimum seconds between two status texts."""
SLOW_SECONDS = 1.0
"""Seconds after which a yes gets a record too."""
FLUSH_SECONDS = 1.0
"""Seconds that khod waits at its end for the records, and for the notifications."""
JOURNAL_SECONDS = 2.0
"""Seconds that journald has before the jump."""
EXTEND_SECONDS = 30.0
"""Seconds by which a timeout is extended, again and again, during a start or a stop."""

MAX_STATUS_CHARACTERS = 500
"""Maximum characters of the status text."""


def start_workers() -> None:
    """Start the threads that send to journald and to the service manager.

    Not while this is imported: a thread that is there when khod enters its AppArmor profile stays outside.
    """
    _start_recorder()
    start_notifier()


@cache
def _start_recorder() -> Worker:
    return Worker("journal", "The journal", max_waiting=MAX_WAITING)


def _queue_for_journald(send: Callable[[], object]) -> None:
    _start_recorder().call_later(send)


def write_event(event: Event, *, entered: bool, record: Record) -> None:
    """Write a journal record of an event; a producer that does at once what it is told gets none.

    `entered` says whether the phase differs from that of the event before: the record then has the phase's MESSAGE_ID.
    `record` is the handover's.
    """
    if not _is_routine(event):
        _send_record(*event_fields(event, entered=entered, record=record))


def write_message(message: Message, text: str, *, run: str = "", **fields: str) -> None:
    """Write a record that is not an event's; `fields` without a text are left out."""
    _send_record(text, message_fields(message, run, fields))


def _send_record(text: str, fields: dict[str, Any]) -> None:
    _queue_for_journald(lambda: send_record({"MESSAGE": text, **fields}))


def write_stderr(what: str) -> None:
    """Queue a line for standard error; it is dropped if nothing reads there."""

    def send() -> None:
        with suppress(OSError, ValueError):
            sys.stderr.write(f"{what}\n")
            sys.stderr.flush()

    _queue_for_journald(send)


class Handler(logging.Handler):
    """Sends log records to standard error through the same thread."""

    def emit(self, record: logging.LogRecord) -> None:
        write_stderr(self.format(record))


def _is_routine(event: Event) -> bool:
    """Whether a thousand producers would cause the same event within a second: journald would then drop records."""
    if event.kind is EventKind.producer_called:
        return True
    ready = event.producer is not None and event.producer.answer == READY
    return event.kind is EventKind.producer_answered and ready and (event.duration or 0.0) < SLOW_SECONDS


def flush_workers() -> None:
    """Wait until everything queued so far is sent, at most FLUSH_SECONDS for each thread: khod ends."""
    for worker in (start_notifier(), _start_recorder()):
        said = threading.Event()
        worker.call_later(said.set)
        said.wait(FLUSH_SECONDS)


async def settle_journal() -> None:
    """Return once journald has every record queued so far, and has the journal on the disk: the host jumps.

    At most JOURNAL_SECONDS pass: the producers are frozen.
    """
    with suppress(OSError, EOFError, KhoError, asyncio.LimitOverrunError):  # TimeoutError is an OSError
        async with asyncio.timeout(JOURNAL_SECONDS):
            await _start_recorder().call_within(lambda: None, "sending the records", None)
            await journald.synchronize_journal()


async def extend_timeout() -> None:
    """Ask the service manager for more time, again and again.

    A rollback has its own time limit, and must not be killed before it ends.
    """
    while True:
        notify_manager(f"EXTEND_TIMEOUT_USEC={int(EXTEND_SECONDS * 1e6)}")
        await asyncio.sleep(EXTEND_SECONDS / 3)


class StatusText:
    """The unit's status text: the first change is sent at once, the next ones every STATUS_REST_SECONDS.

    A thousand producers may answer within one second, and PID 1 reads each message.
    """

    def __init__(self, text: Callable[[], str]) -> None:
        """Take the function that returns the current text."""
        self._text = text
        self._changed = False
        self._resting = False

    def mark_changed(self) -> None:
        """Note that the text has changed."""
        self._changed = True
        if not self._resting:
            self._send_text()

    def _send_text(self) -> None:
        self._resting = self._changed
        if self._changed:
            self._changed = False
            notify_manager(f"STATUS={one_line(self._text(), MAX_STATUS_CHARACTERS)}")
            asyncio.get_running_loop().call_later(STATUS_REST_SECONDS, self._send_text)


def notify_reloading() -> None:
    """Announce a reload as Type=notify-reload requires, with the time it began (CLOCK_MONOTONIC, in microseconds)."""
    notify_manager(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")


async def feed_watchdog() -> None:
    """Report twice in each interval of the unit's watchdog that the event loop runs; return if the unit has none."""
    usec = os.environ.get("WATCHDOG_USEC", "")
    if not usec.isdecimal() or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return
    while True:
        notify_manager("WATCHDOG=1")
        await asyncio.sleep(int(usec) / 2e6)
