# SPDX-License-Identifier: LGPL-2.1-or-later
"""What other units bring, for a khod that is started before them: it waits by itself for what is not there yet.

systemd starts all units that wait for nothing in one wave, and notices what has ended after that. Seen with 262 on
7.3.4 in emulation: a service ordered after one command of that wave was started 1.3 s later than the wave's own.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING

from khod.deferred import defer_module
from khod.kernel import apparmor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from khod.systemd import dbus, manager
else:
    dbus = defer_module("khod.systemd.dbus")
    manager = defer_module("khod.systemd.manager")

LOG = logging.getLogger(__name__)
HOOKS_UNIT = "kho-hooks.service"
"""It is ordered after the services that hooks and health checks may need."""
DEBUGFS = "/sys/kernel/debug"
EARLY_UNITS: Mapping[str, Callable[[], bool]] = {
    "kho-apparmor.service": apparmor.enter_profile,
    "sys-kernel-debug.mount": lambda: os.path.ismount(DEBUGFS),
}
"""What khod needs before it looks at the kernel: the unit that brings it, and whether it is there (or is entered)."""
EARLY_SECONDS = 15.0
MAX_SECONDS = 600.0
"""Seconds after which a host that still starts its services is no longer waited for."""


async def wait_early_units() -> None:
    """Return when EARLY_UNITS have brought what they bring, or cannot; in a host's start most have when khod comes."""
    for unit, is_there in EARLY_UNITS.items():
        if is_there():
            continue
        await _wait_unit(unit, EARLY_SECONDS)
        if not is_there():
            LOG.warning("khod starts without what %s brings. To see why: systemctl status %s", unit, unit)


async def wait_hooks_unit() -> None:
    """Return when systemd has started kho-hooks.service, or cannot start it, as in a shutdown."""
    await _wait_unit(HOOKS_UNIT, MAX_SECONDS)


async def _wait_unit(unit: str, seconds: float) -> None:
    """Return when systemd has started the unit, or cannot start it."""
    try:
        async with asyncio.timeout(seconds):
            await dbus.ask_again(lambda: _start_unit(unit))
    except (dbus.BusError, TimeoutError):
        return


async def _start_unit(unit: str) -> None:
    async with dbus.systemd_bus() as bus:
        await manager.Systemd(bus, unit).run_job("StartUnit", "fail")
