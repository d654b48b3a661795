"""Who blocks a shutdown, by systemd-logind's word: `systemctl kexec` asks the same."""

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass

from jeepney import HeaderFields

from khod.producers.barrier import Veto
from khod.producers.unit import system_bus
from khod.text import one_line

LOGIND = ("org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager")
KEPT = "/run/systemd/inhibit"
"""Where logind keeps them; where it is not there logind does not run, and a call would start it."""
ASKING = 2.0
"""Seconds logind has to answer."""


@dataclass(frozen=True)
class Inhibitor:
    """Somebody who blocks a shutdown, and why, in its own words: a short printable line each."""

    who: str
    why: str


async def blocking() -> Sequence[Inhibitor] | None:
    """Everyone who blocks a shutdown; None where logind cannot be asked."""
    if not os.access(KEPT, os.F_OK):
        return None
    try:
        async with asyncio.timeout(ASKING), system_bus() as bus:
            answer = await bus.call(LOGIND, "ListInhibitors")
    except (Veto, TimeoutError):
        return None
    if answer.header.fields.get(HeaderFields.signature) != "a(ssssuu)":
        return None
    return [
        Inhibitor(one_line(who), one_line(why))
        for what, who, why, mode, _uid, _pid in answer.body[0]
        if mode.startswith("block") and "shutdown" in what.split(":")
    ]
