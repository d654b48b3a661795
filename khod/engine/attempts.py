# SPDX-License-Identifier: LGPL-2.1-or-later
"""The attempt of the handover under way, made from the record where there is none, and the guard that watches it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Protocol

from khod.deferred import defer_module
from khod.engine.observer import Observer
from khod.engine.quiescence import Quiescence
from khod.engine.resources import Resources
from khod.engine.transaction import Transaction
from khod.engine.watchdog import JumpWatchdog
from khod.errors import KhoError
from khod.handover.machine import remaining_steps
from khod.model import Phase, Step
from khod.producers.barrier import Barrier, Participant, Verb
from khod.producers.claim import read_frozen_files
from khod.producers.registry import ProducerRegistry

if TYPE_CHECKING:
    from khod.engine import attempt as attempts
    from khod.engine.attempt import Attempt
else:
    attempts = defer_module("khod.engine.attempt")

LOG = logging.getLogger(__name__)


class Watcher(Protocol):
    """What watches the host's devices: `khod.engine.guard.Guard`."""

    def start(self, abort: Iterable[str], record: Iterable[str], devices: Mapping[str, Iterable[str]]) -> None:
        """Watch from now on for devices of these subsystems, and for those of the producers."""

    def stop(self) -> None:
        """Stop watching."""

    def process_pending(self) -> None:
        """Report the events that wait, at once."""


class Attempts:
    """Makes attempts and attaches them to the transaction; `guard` watches the devices of one, `watchdog` its jump."""

    def __init__(
        self,
        transaction: Transaction,
        observer: Observer,
        registry: ProducerRegistry,
        guard: Watcher,
        watchdog: JumpWatchdog,
        resources: Resources,
        quiescence: Quiescence,
    ) -> None:
        self._transaction = transaction
        self._observer = observer
        self._registry = registry
        self._guard = guard
        self.watchdog = watchdog
        self._resources = resources
        self._quiescence = quiescence

    def current_attempt(self) -> Attempt:
        """Return the attempt under way; make one if there is none yet (at a start, or before a first step)."""
        found = self._transaction.attempt
        if found is not None and not found.barrier.broken:
            return found
        changed, record = self._transaction.on_member_changed, self._transaction.record
        machine = self._transaction.machine
        if machine.done:
            told = {Step.freeze: Verb.freeze, Step.prepare: Verb.prepare}  # neither: another program's image
            last = next((verb for step, verb in told.items() if step in machine.done), None)
            if self._transaction.phase is Phase.failed and record.producers:
                last = None
            barrier = self._registry.resume_barrier(record.run, changed, record.producers, last)
        else:
            barrier = self._registry.make_barrier(record.run, changed)
        attempt = self.make_attempt(barrier, everyone=self._registry.all_producers)
        attempt.adopt_steps(machine)
        self._transaction.attach_attempt(attempt)
        return attempt

    def make_attempt(self, barrier: Barrier, *, everyone: Callable[[], list[Participant]] = list) -> Attempt:
        """Return an attempt with the producers of this barrier, which is attached to nothing."""
        return attempts.Attempt(
            self._observer.probed.kernel,
            self._resources.kexec,
            self._resources.workers,
            self._resources.store,
            self._resources.settings,
            barrier,
            everyone=everyone,
            joined=self.watch_devices,
            frozen=self._read_frozen_files,
            shutdown=self._resources.shutdown,
            quiescence=self._quiescence,
            units=lambda: self._transaction.record.quiesced,
            terms=lambda: self._transaction.record.terms,
        )

    async def _read_frozen_files(self) -> None:
        claims = [peer.claim for peer in self._registry.peers.taking_part()]
        await read_frozen_files(self._resources.sessions.kept_files, claims)

    def remaining_steps(self, last: Step, *, quiesces: bool = False) -> tuple[Step, ...]:
        """Return the steps of the handover under way that are not done, up to `last`; quiesce only with `quiesces`."""
        order = self._observer.require_kernel.order
        return remaining_steps(self._transaction.machine, order, last, quiesces=quiesces)

    async def roll_back(
        self, cause: KhoError | None, *, interrupted: Phase | None = None, because: KhoError | None = None
    ) -> None:
        """Roll back the handover under way, as `Transaction.roll_back` does, also if an earlier khod began it."""
        self.current_attempt()
        try:
            await self._transaction.roll_back(cause, interrupted=interrupted, because=because)
        finally:
            await self.watchdog.disarm()

    def watch_devices(self, attempt: Attempt) -> None:
        """Watch for devices that appear or disappear during this attempt; Failed if that is not possible."""
        settings = self._resources.settings.current.guard
        devices = {member.producer.name: member.producer.devices for member in attempt.barrier.members}
        self._guard.start(settings.abort, settings.record, devices)

    def stop_watching(self) -> None:
        """Stop watching devices."""
        try:
            self._guard.stop()
        except Exception:  # the handover it watched is over
            LOG.exception("The guard could not be stopped")
