# SPDX-License-Identifier: LGPL-2.1-or-later
"""When the host has the services that hooks and health checks may need: kho-hooks.service is ordered after them.

khod itself starts before them.
"""

import asyncio
from typing import TYPE_CHECKING

from khod.deferred import defer_module

if TYPE_CHECKING:
    from khod.systemd import dbus, manager
else:
    dbus = defer_module("khod.systemd.dbus")
    manager = defer_module("khod.systemd.manager")

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
                    async with dbus.systemd_bus() as bus:
                        await manager.Systemd(bus, HOOKS_UNIT).run_job("StartUnit", "fail")
                    return
                except dbus.Disconnected:  # systemd starts anew: daemon-reexec
                    await asyncio.sleep(RECONNECT_SECONDS)
    except (dbus.BusError, TimeoutError):
        return
