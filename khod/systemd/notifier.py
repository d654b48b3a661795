# SPDX-License-Identifier: LGPL-2.1-or-later
"""Messages to the service manager that delay nobody, from a thread of their own.

A service manager that does not read blocks the sender: what a service reports must not decide how a handover goes.
"""

from functools import cache, partial

from khod.concurrency.worker import Worker
from khod.systemd.notification import send_notification

MAX_WAITING = 1024
"""Maximum number of messages that wait to be sent to systemd, or of records to journald; further ones are dropped."""


@cache
def start_notifier() -> Worker:
    """Start the thread, once."""
    return Worker("notify", "The service manager", max_waiting=MAX_WAITING)


def notify_manager(text: str) -> None:
    """Queue a message; without effect if there is no service manager, or if it does not read."""
    start_notifier().call_later(partial(send_notification, text))
