# SPDX-License-Identifier: LGPL-2.1-or-later
"""What systemd reports about itself and its units, for callers in a thread of their own: each call blocks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from khod.deferred import defer_module
from khod.systemd.watchdog import ManagerWatchdog, ManagerWatchdogs

if TYPE_CHECKING:
    from khod.systemd import dbus, manager
    from khod.systemd.manager import Manager, Systemd
else:
    dbus = defer_module("khod.systemd.dbus")
    manager = defer_module("khod.systemd.manager")

T = TypeVar("T")

BOOTED = "/run/systemd/system"  # sd_booted(3)


class SystemdFacts:
    """Questions to systemd; each returns None if systemd does not answer within ASK_SECONDS."""

    def describe_manager(self) -> Manager | None:
        """Return which systemd runs this host, and in what kind of virtual machine."""
        return _ask_systemd(lambda systemd: systemd.describe_manager())

    def describe_watchdog(self) -> ManagerWatchdog | None:
        """Return the hardware watchdog that systemd opens."""

        async def ask() -> ManagerWatchdog | None:
            with suppress(dbus.BusError, TimeoutError):
                async with asyncio.timeout(manager.ASK_SECONDS):
                    return await ManagerWatchdogs().describe_watchdog()
            return None

        return asyncio.run(ask())

    def read_units(self, names: Iterable[str]) -> dict[str, dict[str, Any]] | None:
        """Return the properties of services and scopes, by the names of the unit and of the property."""

        async def read(systemd: Systemd) -> dict[str, dict[str, Any]]:
            found: dict[str, dict[str, Any]] = {}
            for name in names:
                found[name] = await systemd.read_properties(name, "Unit")
                if name.endswith(".service"):
                    found[name] |= await systemd.read_properties(name, "Service")
            return found

        return _ask_systemd(read)

    def list_stored_files(self) -> dict[str, list[str]] | None:
        """Return the paths of the files in file descriptor stores, by service; empty stores are left out."""

        async def read(systemd: Systemd) -> dict[str, list[str]]:
            found: dict[str, list[str]] = {}
            for name, path in (await systemd.list_units("*.service")).items():
                if await systemd.count_stored_files(path):
                    found[name] = await systemd.list_stored_files(name)
            return found

        return _ask_systemd(read)


def _ask_systemd(question: Callable[[Systemd], Coroutine[Any, Any, T]]) -> T | None:
    return asyncio.run(manager.ask_systemd(question, manager.ASK_SECONDS))
