# SPDX-License-Identifier: LGPL-2.1-or-later
"""When a handover stops the rest of the host before it freezes the producers, and which units it keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from khod.config import Config, Settings
from khod.errors import Refused
from khod.model import Step
from khod.producers.registry import ProducerRegistry
from khod.quiesce.outcome import Started
from khod.systemd.logind import Inhibitors, describe_inhibitors

if TYPE_CHECKING:
    from khod.quiesce.host import Host, Survey
    from khod.target.target import Request


class Quiescence:
    """The rest of this host, which `make_host` returns, None where nobody can stop it. Methods raise KhoError.

    `inhibitors` returns the function that lists the inhibitors at this time, or None.
    """

    def __init__(
        self,
        make_host: Callable[[], Host] | None,
        settings: Settings,
        registry: ProducerRegistry,
        inhibitors: Callable[[], Inhibitors | None],
    ) -> None:
        self._make_host = make_host
        self._settings = settings
        self._registry = registry
        self._inhibitors = inhibitors
        self._is_at_rest = False

    @cached_property
    def _host(self) -> Host | None:
        return self._make_host() if self._make_host is not None else None

    def is_due(self, request: Request | None, done: tuple[Step, ...]) -> bool:
        """Whether a handover with this request stops the host: once the producers are frozen it is too late."""
        jumps = request is not None and not request.now and not request.load_only
        return (
            jumps and self._make_host is not None and self._settings.current.quiesce.enabled and Step.freeze not in done
        )

    def units_to_keep(self, callers: Sequence[str]) -> dict[str, str]:
        """Return the units that stay, with the reason: the caller's, the configuration's, and the producers'."""
        kept = dict.fromkeys(callers, "the handover was asked for from there")
        kept |= dict.fromkeys(self._settings.current.quiesce.keep, "quiesce.keep names it")
        return kept | self._registry.needed_units()

    @property
    def awaited_units(self) -> list[str]:
        """The units whose stop or start is waited for now."""
        return sorted(self._host.awaited_units) if self._host is not None else []

    async def survey_host(self, callers: Sequence[str]) -> Survey:
        """Return what a quiesce would do now; `callers` are the units in which the caller runs."""
        assert self._host is not None, "as is_due says"
        return await self._host.survey_units(self.units_to_keep(callers))

    async def guard_filesystems(self) -> None:
        """Have the file systems thawed if khod dies at the jump: with that they may be frozen for it."""
        if self._host is not None:
            await self._host.guard_filesystems()

    async def release_filesystems(self) -> None:
        """End the guard: there was no jump."""
        if self._host is not None:
            await self._host.release_filesystems()

    async def stop_host(self, names: Sequence[str], callers: Sequence[str]) -> tuple[str, ...]:
        """Stop these units, as recorded; return those that have files now which only `systemctl kexec` hands over."""
        assert self._host is not None, "as is_due says"
        deadline = self._settings.current.deadlines.quiesce
        stores = await self._host.stop_units(names, self.units_to_keep(callers), deadline)
        self._is_at_rest = True
        return stores

    async def require_rest(self, config: Config) -> None:
        """Refused if a unit was started since stop_host, or if a program blocks a shutdown; nothing without stop_host.

        `config` is that of the handover.
        """
        if self._host is not None and self._is_at_rest:
            await self._host.require_rest()
            await self.require_uninhibited(config)

    async def require_uninhibited(self, config: Config) -> None:
        """Refused if a program blocks a shutdown by now: before a jump that khod makes itself nobody else would ask."""
        ask = self._inhibitors()
        if ask is None or config.checks.inhibitors in ("warn", "off"):
            return
        if found := await ask():
            raise Refused(
                describe_inhibitors(found),
                where="inhibitors",
                remedy="End that first (systemd-inhibit --list). To jump at once: `Kexec(now)`",
            )

    async def start_host(self, names: tuple[str, ...]) -> Started:
        """Start again what was stopped."""
        self._is_at_rest = False
        if self._host is None:
            return Started(dict.fromkeys(names, "systemd does not run this host"))
        return await self._host.start_units(names, self._settings.current.deadlines.quiesce_undo)
