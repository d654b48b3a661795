# SPDX-License-Identifier: LGPL-2.1-or-later
"""What khod sends to systemd: readiness, status text, watchdog messages, and journal records with fields.

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
from typing import Any

import systemd.daemon
import systemd.journal

from khod.concurrency.worker import Worker
from khod.handover.machine import RESTING, STEPS
from khod.handover.record import Record
from khod.model import Event, EventKind, Phase
from khod.text import one_line

# One MESSAGE_ID for each phase: `journalctl MESSAGE_ID=...` finds every time it was entered. The catalogue
# (systemd/catalog) has them too: `journalctl -x` shows what each means and what to do.
MESSAGE_ID: dict[Phase, str] = {
    Phase.idle: "f959b6f37f394c8f9cc571383da7a9f0",
    Phase.preparing: "1772bfd698e5465aa40855894a615dc8",
    Phase.prepared: "059b2629a82c44078af7d73e6a50c6dd",
    Phase.freezing: "6ed80f157a86486e86ae0f9b48f47b0c",
    Phase.frozen: "7a1c533f926e4521baeefaf89142d89b",
    Phase.activating: "ca49721426904c95b910458386083bbf",
    Phase.active: "57d019edc95b4d90b3635fb6cd74d119",
    Phase.loading: "5c28ec0c5d344f13a7112e102028d623",
    Phase.loaded: "e6a61ab289d7493486b06151b4ea63f3",
    Phase.executing: "38cd4e6d43a24ccdb77ff22d3ec5232c",
    Phase.verifying: "0f0b7746f4e4408fb5178d4f839fb761",
    Phase.verified: "03053606e86346b3969bc1092e30937a",
    Phase.degraded: "68425e8121ed4ac2bdb7586746187593",
    Phase.cold_boot: "d5be68c9e6fa48ae809e682a7d16d5f9",
    Phase.rolling_back: "7bf92476698849a193a7a247d20adf9e",
    Phase.failed: "6ffa26cb0a0b4dbb95721cfe54213321",
    Phase.foreign: "720250eaedd047ba9461aee99e278aee",
    Phase.inconsistent: "9de339c0b2424de088a7c783673d2460",
}
REFUSAL_ID = "09339c4f209b425199c51ad7a46893be"
"""The MESSAGE_ID of a producer's answer that is not a yes."""
STATUS_REST_SECONDS = 0.1
"""Minimum seconds between two status texts."""
SLOW_SECONDS = 1.0
"""Seconds after which a yes gets a record too."""
READY = "ready"
ERR, WARNING, INFO = 3, 4, 6  # syslog priorities
PRIORITY = {
    Phase.failed: ERR,
    Phase.cold_boot: ERR,
    Phase.degraded: ERR,
    Phase.inconsistent: ERR,
    Phase.foreign: WARNING,
    Phase.rolling_back: WARNING,
}


STEP_OF_PHASE = {row.doing: step.value for step, row in STEPS.items()}
"""The step that is under way in each phase."""
MAX_WAITING = 1024
"""Maximum number of records, and of notifications, that wait to be sent; further ones are dropped."""
FLUSH_SECONDS = 1.0
"""Seconds that khod waits at its end for the records, and for the notifications."""
EXTEND_SECONDS = 30.0
"""Seconds by which a timeout is extended, again and again, during a start or a stop."""

MAX_STATUS_CHARACTERS = 500
"""Maximum characters of the status text."""

_journald = Worker("journal", "The journal", max_waiting=MAX_WAITING)
_manager = Worker("notify", "The service manager", max_waiting=MAX_WAITING)


def write_event(event: Event, *, entered: bool, record: Record) -> None:
    """Write a journal record of an event; a producer that does at once what it is told gets none.

    `entered` says whether the phase differs from that of the event before: the record then has the phase's MESSAGE_ID.
    `record` is the handover's.
    """
    if _is_routine(event):
        return
    message, found = record_fields(event, entered=entered, record=record)
    _journald.call_later(lambda: systemd.journal.send(message, **found))


def record_fields(event: Event, *, entered: bool, record: Record) -> tuple[str, dict[str, Any]]:
    """Return the text and the fields of a journal record."""
    found: dict[str, Any] = {
        "PRIORITY": PRIORITY.get(event.phase, INFO),
        "KHO_PHASE": event.phase.value,
        "KHO_EVENT": event.kind.value,
        "KHO_RUN": event.run,
        "SYSLOG_IDENTIFIER": "khod",
        "CODE_FUNC": "",  # the place in khod is of no use, and systemd would search the stack for it
    }
    if entered:
        found["MESSAGE_ID"] = MESSAGE_ID[event.phase]
    if record.begun.at and event.phase not in RESTING:
        found |= {"KHO_BY": record.begun.by, "KHO_IMAGE": record.begun.image}
    if event.step or event.phase in STEP_OF_PHASE:
        found["KHO_STEP"] = event.step or STEP_OF_PHASE[event.phase]
    if event.duration is not None:
        found["KHO_SECONDS"] = f"{event.duration:.3f}"
    if (producer := event.producer) is not None:
        found |= {"KHO_PRODUCER": producer.name, "KHO_KIND": producer.kind}
        if producer.phase:
            found |= {"KHO_VERB": producer.phase, "KHO_SECONDS": f"{producer.seconds:.3f}"}
            if event.kind is EventKind.producer_answered and producer.answer != READY:
                found |= {"PRIORITY": min(WARNING, found["PRIORITY"]), "MESSAGE_ID": REFUSAL_ID}
    return f"{event.phase.value.replace('_', ' ')}: {event.message}", found


def write_stderr(what: str) -> None:
    """Queue a line for standard error; it is dropped if nothing reads there."""

    def send() -> None:
        with suppress(OSError, ValueError):
            sys.stderr.write(f"{what}\n")
            sys.stderr.flush()

    _journald.call_later(send)


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


def notify_manager(state: str) -> None:
    """Queue a message to the service manager; without effect if there is none, or if it does not read."""
    _manager.call_later(lambda: systemd.daemon.notify(state))


def flush_workers() -> None:
    """Wait until everything queued so far is sent, at most FLUSH_SECONDS for each thread: khod ends."""
    for worker in (_manager, _journald):
        said = threading.Event()
        worker.call_later(said.set)
        said.wait(FLUSH_SECONDS)


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
