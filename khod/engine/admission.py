# SPDX-License-Identifier: LGPL-2.1-or-later
"""What must hold before a handover begins or goes on: its phase, the checks, and an image to load."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from khod.deferred import defer_module
from khod.engine import status
from khod.engine.observer import Observer
from khod.engine.queries import Queries, new_run
from khod.engine.recorder import Recorder
from khod.engine.resources import Resources
from khod.engine.transaction import Transaction
from khod.errors import AlreadyLoaded, NoKernelGiven, Refused
from khod.handover.machine import HELD, RESTING
from khod.handover.record import Record
from khod.model import NO_TERMS, Check, Step
from khod.producers.registry import ProducerRegistry

if TYPE_CHECKING:
    from khod import preflight
    from khod.history import origins
    from khod.preflight import handover as preflight_handover
    from khod.target.target import Request, Target
else:
    origins = defer_module("khod.history.origins")
    preflight = defer_module("khod.preflight")
    preflight_handover = defer_module("khod.preflight.handover")


class Admission:
    """Refuses a handover before anything is changed; every wait ends if the handover is cancelled."""

    def __init__(
        self,
        transaction: Transaction,
        queries: Queries,
        observer: Observer,
        registry: ProducerRegistry,
        resources: Resources,
        recorder: Recorder,
    ) -> None:
        self._transaction = transaction
        self._queries = queries
        self._observer = observer
        self._registry = registry
        self._resources = resources
        self._recorder = recorder

    async def check_may_start(self, request: Request | None, *, by: str) -> Record:
        """Refuse before anything is changed; else return the record to continue with, a new one if at rest.

        Without a request there is neither a load nor a jump.
        """
        if self._resources.settings.error is not None:
            raise self._resources.settings.error
        deadline = self._resources.settings.current.deadlines.activate
        observed = await self._transaction.cancellation.wait_interruptibly(self._observer.observe_kernel(deadline))
        phase = self._transaction.phase
        if phase not in RESTING | HELD:
            raise Refused(
                f"A handover cannot go on from here ({phase.value}): {self._transaction.reason}",
                where="khod",
                remedy=status.PHASE_TEXT[phase][1],
            )
        if waiting := self._queries.absent_producers:
            names = ", ".join(found.name for found in waiting)
            self._transaction.emit_event(f"waiting for producers to connect again: {names}")
            returned = self._registry.peers.wait_returned({found.name for found in waiting})
            await self._transaction.cancellation.wait_interruptibly(returned)
        if started := await self._transaction.cancellation.wait_interruptibly(self._registry.start_supervisors()):
            self._transaction.emit_event(f"waiting for khod-vm, which systemd starts: {', '.join(started)}")
            await self._transaction.cancellation.wait_interruptibly(self._registry.peers.wait_connected(started))
        checks = await self._transaction.cancellation.wait_interruptibly(
            self._queries.run_checks(observed, request=request)
        )
        to_come = {"kexec": request is not None and Step.load not in self._transaction.machine.done}
        to_come["sessions"] = request is not None and not request.load_only  # only the jump ends them
        self._require_checks([check for check in checks if to_come.get(check.name, True)])
        if phase in HELD:
            return self._transaction.record
        generation = self._observer.require_kernel.generation
        terms = request.terms if request is not None else NO_TERMS
        return self._transaction.record.begin_run(new_run(), observed, generation, by, terms)

    def check_window(self) -> None:
        """Refuse to begin a handover after the end of its window; one that has begun goes on."""
        terms = self._transaction.record.terms
        if self._transaction.machine.done or terms.begin_before is None or time.time() < terms.begin_before:
            return
        raise Refused(
            f"The window of the handover has closed ({terms.window or 'no time is named'})",
            where=f"profile {terms.profile}" if terms.profile else "terms.begin_before",
            remedy="Wait until it opens again, or give it more time.",
        )

    async def check_target(self, target: Target) -> None:
        """Refuse a next kernel that would not do; called after check_may_start."""
        observed = self._observer.require_last
        self._require_checks(
            await self._transaction.cancellation.wait_interruptibly(self._queries.run_checks(observed, target))
        )
        for origin in target.origins:
            if origin.refusal:
                self._transaction.emit_event(f"going on all the same, as checks.provenance says: {origin.refusal}")
            elif origin.pinned_by or origin.signers:
                self._transaction.emit_event(f"verified: {origins.describe_origin(origin)}")
        self._transaction.emit_event(f"the next command line: {target.cmdline}", words=target.words)

    def _require_checks(self, checks: list[Check]) -> None:
        self._recorder.note_checks(checks)
        preflight.require_passed(checks)
        for line in preflight.overridden_findings(checks):
            self._transaction.emit_event(line)

    async def build_target(self, request: Request, run: str) -> Target | None:
        """Return the next kernel in memory, None if it is loaded already."""
        if request.kernel is None:
            if Step.load not in self._transaction.machine.done:
                raise NoKernelGiven(
                    "No kernel is loaded and none was given",
                    remedy="Name one with `kernel`.",
                )
            return None
        if Step.load in self._transaction.machine.done:
            raise AlreadyLoaded(
                "An image is already loaded: another cannot replace it",
                where="`kernel.image`",
                remedy=preflight_handover.JUMP_OR_BEGIN_AGAIN,
            )
        observed = self._observer.require_last
        return await self._transaction.cancellation.wait_interruptibly(
            self._queries.take_target(request, observed, run)
        )
