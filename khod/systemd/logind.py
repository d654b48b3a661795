# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who blocks a shutdown, by systemd-logind's word: `systemctl kexec` asks the same.

Every check asks, and everyone may have checks made, while the bus bounds root's connections: so there is one at a time
for everybody, and what was answered counts for a moment.
"""

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from jeepney import HeaderFields

from khod.systemd.dbus import BusError, system_bus
from khod.text import one_line

LOGIND = ("org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager")
KEPT = "/run/systemd/inhibit"
"""Where logind keeps them; where it is not there logind does not run, and a call would start it."""
ASKING = 2.0
"""Seconds logind has to answer."""
MAX_INHIBITORS = 64
"""How many are told: any user may have more, and each is a part of every check's answer."""
CACHE_SECONDS = 1.0
"""How long an answer counts, from when it was asked for."""


@dataclass(frozen=True)
class Inhibitor:
    """Somebody who blocks a shutdown, and why, in its own words: one line each, fit for a terminal."""

    who: str
    why: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "who", one_line(self.who))
        object.__setattr__(self, "why", one_line(self.why))


Answer = Sequence[Inhibitor] | None


class _Asked:
    """The last question: its answer, or that it is under way."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.asked_at = time.monotonic()
        self.answer: asyncio.Task[Answer] = asyncio.ensure_future(_ask_logind())

    @property
    def is_current(self) -> bool:
        """Whether another question would be answered no better, or is not allowed yet."""
        if self.loop is not asyncio.get_running_loop() or self.answer.cancelled():
            return False
        return not self.answer.done() or time.monotonic() - self.asked_at < CACHE_SECONDS


_last: _Asked | None = None


async def shutdown_inhibitors() -> Answer:
    """Everyone who blocks a shutdown, the first MAX_INHIBITORS; None where logind cannot be asked."""
    global _last  # noqa: PLW0603  # there is one logind, and one bus that bounds this process's connections
    if not os.access(KEPT, os.F_OK):
        return None
    if _last is None or not _last.is_current:
        _last = _Asked()
    return await asyncio.shield(_last.answer)


async def _ask_logind() -> Answer:
    try:
        async with asyncio.timeout(ASKING), system_bus() as bus:
            answer = await bus.call_method(LOGIND, "ListInhibitors")
    except (BusError, TimeoutError):
        return None
    if answer.header.fields.get(HeaderFields.signature) != "a(ssssuu)":
        return None
    blockers = (
        (who, why)
        for what, who, why, mode, _uid, _pid in answer.body[0]
        if mode.startswith("block") and "shutdown" in what.split(":")
    )
    return [Inhibitor(who, why) for who, why in islice(blockers, MAX_INHIBITORS)]
