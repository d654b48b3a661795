# SPDX-License-Identifier: LGPL-2.1-or-later
"""The hardware watchdog, which only one process can have open: PID 1, so khod asks systemd for it.

What systemd promises (org.freedesktop.systemd1(5), systemd-system.conf(5); checked with 262): the manager's properties
RuntimeWatchdogUSec and KExecWatchdogUSec can be written, and replace the setting of the same name until they are set to
USEC_INFINITY. With the first one systemd arms the device at once, and feeds it until reboot(2). With the second one it
arms the device when it ends itself for systemd-shutdown and its kexec: a shutdown that is called off before has armed
nothing. In both cases the device goes on running over the jump, with all of its time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from khod.dataclass import dataclass
from khod.deferred import defer_module

if TYPE_CHECKING:
    from khod.systemd import dbus, manager
    from khod.systemd.dbus import Bus
else:
    dbus = defer_module("khod.systemd.dbus")
    manager = defer_module("khod.systemd.manager")

RUNTIME, KEXEC, DEVICE = "RuntimeWatchdogUSec", "KExecWatchdogUSec", "WatchdogDevice"
USEC_INFINITY = (1 << 64) - 1
"""Ends an override; manager_override_watchdog() in src/core/manager.c."""
USEC = 1_000_000
DEFAULT_DEVICE = "/dev/watchdog0"
"""What systemd opens where WatchdogDevice= is not set."""


@dataclass(frozen=True)
class ManagerWatchdog:
    """The watchdog that systemd opens, and the seconds with which it feeds it now (0: it does not)."""

    device: str
    runtime_seconds: float


class ManagerWatchdogs:
    """Calls about the watchdog. Each method connects anew, and raises BusError."""

    async def describe_watchdog(self) -> ManagerWatchdog:
        """Return the device and whether systemd feeds it."""
        async with dbus.systemd_bus() as bus:
            device, usec = await _read(bus, DEVICE, "s"), await _read(bus, RUNTIME, "t")
        return ManagerWatchdog(device or DEFAULT_DEVICE, 0.0 if usec == USEC_INFINITY else usec / USEC)

    async def arm_now(self, seconds: int) -> None:
        """Arm the device, for a jump that systemd knows nothing of; systemd feeds it as long as it runs."""
        async with dbus.systemd_bus() as bus:
            await _write(bus, RUNTIME, seconds * USEC)

    async def arm_at_kexec(self, seconds: int) -> None:
        """Have systemd arm the device at the end of a shutdown into the kexec."""
        async with dbus.systemd_bus() as bus:
            await _write(bus, KEXEC, seconds * USEC)

    async def release(self) -> None:
        """End both overrides: without RuntimeWatchdogSec= systemd disarms the device."""
        async with dbus.systemd_bus() as bus:
            await _write(bus, KEXEC, USEC_INFINITY)
            await _write(bus, RUNTIME, USEC_INFINITY)

    async def take_back(self, seconds: int) -> None:
        """Disarm a device that an earlier kernel armed; where systemd feeds it already, it is systemd's.

        systemd disarms only what it has opened, and opens only what it arms.
        """
        async with dbus.systemd_bus() as bus:
            if not await _read(bus, RUNTIME, "t"):
                await _write(bus, RUNTIME, seconds * USEC)
        await self.release()


async def _read(bus: Bus, name: str, signature: str) -> Any:
    answer = await bus.call_method(
        (manager.SYSTEMD, manager.MANAGER[1], manager.PROPERTIES), "Get", "ss", manager.MANAGER[2], name
    )
    found, value = answer.body[0]
    if found != signature:
        raise dbus.BusError(f"systemd says {name} with another type than it is documented to")
    return value


async def _write(bus: Bus, name: str, usec: int) -> None:
    await bus.call_method(
        (manager.SYSTEMD, manager.MANAGER[1], manager.PROPERTIES), "Set", "ssv", manager.MANAGER[2], name, ("t", usec)
    )
