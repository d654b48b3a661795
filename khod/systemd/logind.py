# SPDX-License-Identifier: LGPL-2.1-or-later
"""The inhibitors that block a shutdown, as systemd-logind lists them; `systemctl kexec` asks for the same list.

Every check asks logind, every user may run checks, and the bus limits root's connections. So there is one question at a
time for all callers, and its answer is used again for CACHE_SECONDS.
"""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING

from khod.dataclass import dataclass
from khod.deferred import defer_module
from khod.text import join_names, one_line

if TYPE_CHECKING:
    import jeepney

    from khod.systemd import dbus
else:
    jeepney = defer_module("jeepney")
    dbus = defer_module("khod.systemd.dbus")

LOGIND = ("org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager")
KEPT = "/run/systemd/inhibit"
"""Where logind keeps the inhibitors. If this is missing, logind does not run."""
ASKING = 2.0
"""Seconds logind has to answer."""
MAX_INHIBITORS = 64
"""Maximum number of inhibitors returned: any user may have more, and each is part of every check's answer."""
CACHE_SECONDS = 0.2
"""Seconds that an answer is valid, from the time of the question."""


@dataclass(frozen=True)
class Inhibitor:
    """A program that blocks a shutdown, and its reason, in its own words: one line each, safe for a terminal."""

    who: str
    why: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "who", one_line(self.who))
        object.__setattr__(self, "why", one_line(self.why))


Answer = Sequence[Inhibitor] | None
Inhibitors = Callable[[], Awaitable[Answer]]
"""Lists the inhibitors that block a shutdown; None if nobody can be asked."""


def describe_inhibitors(found: Sequence[Inhibitor]) -> str:
    """Return the sentence that names them."""
    return f"A shutdown is blocked: {join_names(f'{one.who} ({one.why})' for one in found)}"


class _Asked:
    """The last question to logind, with its answer or the task that waits for it."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.asked_at = time.monotonic()
        self.answer: asyncio.Task[Answer] = asyncio.ensure_future(_ask_logind())

    @property
    def is_current(self) -> bool:
        """Whether callers share this question: it is not answered yet, or was asked less than CACHE_SECONDS ago."""
        if self.loop is not asyncio.get_running_loop() or self.answer.cancelled():
            return False
        return not self.answer.done() or time.monotonic() - self.asked_at < CACHE_SECONDS


_last: _Asked | None = None


async def shutdown_inhibitors() -> Answer:
    """Return the inhibitors that block a shutdown, the first MAX_INHIBITORS; None if logind cannot be asked."""
    global _last  # noqa: PLW0603  # there is one logind, and one bus that limits this process's connections
    if not os.access(KEPT, os.F_OK):
        return None
    if _last is None or not _last.is_current:
        _last = _Asked()
    return await asyncio.shield(_last.answer)


async def is_shutting_down() -> bool | None:
    """Whether logind has taken a request to shut the host down, which waits for programs with `delay` locks.

    systemd does not know of it yet. False where there is no logind, None where it does not answer in time.
    """
    if not os.access(KEPT, os.F_OK):
        return False
    properties = "org.freedesktop.DBus.Properties"
    try:
        answer = await _call_logind(properties, "Get", "ss", LOGIND[2], "PreparingForShutdown")
    except TimeoutError:
        return None
    return answer is not None and answer.body == (("b", True),)


async def _ask_logind() -> Answer:
    answer = None
    with suppress(TimeoutError):
        answer = await _call_logind(LOGIND[2], "ListInhibitors")
    if answer is None or answer.header.fields.get(jeepney.HeaderFields.signature) != "a(ssssuu)":
        return None
    blockers = (
        (who, why)
        for what, who, why, mode, _uid, _pid in answer.body[0]
        if mode.startswith("block") and "shutdown" in what.split(":")
    )
    return [Inhibitor(who, why) for who, why in islice(blockers, MAX_INHIBITORS)]


async def _call_logind(interface: str, method: str, signature: str = "", *body: str) -> "jeepney.Message | None":
    """Return logind's answer, None if it is not there or refuses; TimeoutError if none comes within ASKING."""
    try:
        async with asyncio.timeout(ASKING), dbus.system_bus() as bus:
            return await bus.call_method((*LOGIND[:2], interface), method, signature, *body)
    except dbus.BusError:
        return None
