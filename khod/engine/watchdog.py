# SPDX-License-Identifier: LGPL-2.1-or-later
"""The hardware watchdog that watches over the jump: armed before it, disarmed by the next khod, or by the undo.

Nothing here decides how a handover goes: what cannot be armed is said, and the handover goes on. A khod that dies
leaves nothing behind that resets this host: systemd feeds what is armed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from khod.concurrency.bounded import run_within
from khod.deferred import defer_module
from khod.engine.resources import Resources
from khod.engine.transaction import Transaction
from khod.errors import KhoError

if TYPE_CHECKING:
    from khod.kernel import host
    from khod.preflight import watchdog as preflight_watchdog
    from khod.systemd import dbus
    from khod.systemd.watchdog import ManagerWatchdogs
else:
    host = defer_module("khod.kernel.host")
    preflight_watchdog = defer_module("khod.preflight.watchdog")
    dbus = defer_module("khod.systemd.dbus")

ANSWER_SECONDS = 2.0
"""Maximum seconds for all questions to systemd: producers may be frozen."""


class JumpWatchdog:
    """The watchdog of `[watchdog]`. No method raises anything except a cancellation."""

    def __init__(self, transaction: Transaction, resources: Resources, manager: ManagerWatchdogs | None) -> None:
        self._transaction = transaction
        self._settings = resources.settings
        self._kexec = resources.kexec
        self._workers = resources.workers
        self._manager = manager

    async def arm(self, *, at_once: bool) -> None:
        """Arm the watchdog for this jump, if one is configured; the record names it."""
        settings, manager = self._settings.current.watchdog, self._manager
        if not settings.device or manager is None:
            return

        async def arm() -> None:
            watchdogs = await self._workers.queries.call_within(
                lambda: host.list_watchdogs(self._kexec.calls), "listing the watchdogs", ANSWER_SECONDS
            )
            obstacle = preflight_watchdog.find_obstacle(settings, watchdogs, await manager.describe_watchdog())
            if obstacle is not None:
                self._transaction.emit_event(f"no watchdog watches over the jump: {obstacle.why}")
                return
            self._transaction.note_watchdog(settings.device)
            await manager.arm_at_kexec(settings.seconds)  # also at once: the quiesce may leave the jump to systemd
            if at_once:
                await manager.arm_now(settings.seconds)
            when = "now" if at_once else "when the shutdown comes to the kexec"
            self._transaction.emit_event(f"{settings.device} is armed {when}, with {settings.seconds} s")

        await self._try(arm, "no watchdog watches over the jump")

    async def disarm(self) -> None:
        """Undo `arm`, if the record names a watchdog."""
        if self._manager is not None and self._transaction.record.watchdog:
            await self._end(self._manager.release)

    async def take_back(self) -> None:
        """Disarm what was armed for the jump into this boot, or in this one before khod was restarted."""
        manager, seconds = self._manager, self._settings.current.watchdog.seconds
        if manager is not None and self._transaction.record.watchdog:
            await self._end(lambda: manager.take_back(seconds))

    async def _end(self, release: Callable[[], Awaitable[None]]) -> None:
        device = self._transaction.record.watchdog

        async def end() -> None:
            await release()
            self._transaction.emit_event(f"{device} does not watch over a jump any more")
            await self._transaction.clear_watchdog()

        await self._try(end, f"{device} may still be armed")

    async def _try(self, work: Callable[[], Awaitable[None]], gap: str) -> None:
        """Do it within ANSWER_SECONDS; say what did not become of it."""
        try:
            await run_within(ANSWER_SECONDS, work())
        except (KhoError, dbus.BusError, OSError, TimeoutError) as error:
            self._transaction.emit_event(f"{gap}: {error}")
        except Exception as error:  # noqa: BLE001 - the handover goes on
            self._transaction.emit_event(f"{gap}: khod itself failed: {error!r}")
