# SPDX-License-Identifier: LGPL-2.1-or-later
"""When the host has the services that hooks and health checks may need: kho-hooks.service is ordered after them.

khod itself starts before them.
"""

import asyncio

from khod.systemd.dbus import BusError, Disconnected, systemd_bus
from khod.systemd.manager import Systemd

HOOKS_UNIT = "kho-hooks.service"
MAX_SECONDS = 600.0
"""Seconds after which a host that still starts its services is no longer waited for."""
RECONNECT_SECONDS = 0.2


async def wait_hooks_unit() -> None:
    """Return when systemd has started kho-hooks.service, or cannot start it, as in a shutdown."""
    try:
        async with asyncio.timeout(MAX_SECONDS):
            while True:
                try:
                    async with systemd_bus() as bus:
                        await Systemd(bus, HOOKS_UNIT).run_job("StartUnit", "fail")
                    return
                except Disconnected:  # systemd starts anew: daemon-reexec
                    await asyncio.sleep(RECONNECT_SECONDS)
    except (BusError, TimeoutError):
        return
