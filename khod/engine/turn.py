# SPDX-License-Identifier: LGPL-2.1-or-later
"""The frame of an operation: one at a time, and what has ended the handover meanwhile is acted on."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from khod import model
from khod.deferred import defer_module
from khod.engine.attempts import Attempts
from khod.engine.queries import Queries
from khod.engine.restoration import Restoration
from khod.engine.signals import Signals
from khod.engine.transaction import Transaction, told_error
from khod.errors import Busy, KhoError, NotRolledBack
from khod.handover.machine import HELD, RESTING
from khod.model import Phase
from khod.producers.barrier import Verb

if TYPE_CHECKING:
    from khod.preflight import handover as preflight_handover
else:
    preflight_handover = defer_module("khod.preflight.handover")


class Turn:
    """Whose turn it is to change the host."""

    def __init__(
        self,
        transaction: Transaction,
        attempts: Attempts,
        restoration: Restoration,
        queries: Queries,
        signals: Signals,
    ) -> None:
        self._transaction = transaction
        self._attempts = attempts
        self._restoration = restoration
        self._queries = queries
        self._busy = signals.busy
        self._started = signals.started

    @property
    def is_taken(self) -> bool:
        """Whether an operation is under way."""
        return self._busy.locked()

    @asynccontextmanager
    async def one_operation(self) -> AsyncIterator[None]:
        """Run one operation at a time; a second one is refused, not queued: the first may change what it would do."""
        await self._started.wait()
        if self._busy.locked() and not self._restoration.make_way():
            resting = self._transaction.phase in RESTING
            begun = model.Begun() if resting else self._transaction.record.begun
            raise Busy(
                f"Another operation is under way ({self._transaction.phase.value})"
                f"{f', begun by {begun.by}' if begun.by else ''}",
                where="khod",
                remedy=preflight_handover.WAIT,
            )
        async with self.at_work():
            await self.act_on_cause()
            try:
                yield
            except KhoError as error:
                self._say_what_stays(error)
                raise
            except Exception as error:  # every error reaches the operator as a sentence
                raise told_error(error) from error
            finally:
                await self.act_on_cause()

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        """Hold the lock of the handover; afterwards the guard watches on only if the handover waits half-way."""
        try:
            async with self._busy:
                try:
                    yield
                finally:
                    if self._transaction.phase not in HELD:
                        self._attempts.stop_watching()
        finally:
            self._restoration.resume_claims()

    async def act_on_cause(self, *, quiet: bool = False) -> None:
        """Roll back for a cause that has ended the handover and was not acted on; raise the cause, unless `quiet`."""
        cause = self._transaction.cancellation.cause
        if cause is None:
            return
        if self._transaction.phase not in HELD:
            self._transaction.cancellation.settle()
            return
        try:
            await self._attempts.roll_back(cause)
        except KhoError:
            if not quiet:  # it is in the record, and every listener was told
                raise

    async def give_up_jump(self, cause: KhoError) -> None:
        """Roll back a jump that does not happen."""
        async with self.at_work():
            if self._transaction.phase is Phase.executing:
                with suppress(KhoError):  # it is in the record, and every listener was told
                    await self._attempts.roll_back(cause)

    def _say_what_stays(self, error: KhoError) -> None:
        """Add the handover's phase to an error's remedy: it did not change, and producers may still be frozen."""
        phase = self._transaction.phase
        if phase in HELD and not isinstance(error, NotRolledBack):
            frozen = sum(member.told is Verb.freeze for member in self._queries.members)
            held = f", {frozen} producer{'' if frozen == 1 else 's'} frozen" if frozen else ""
            stays = f"The handover stays as it was: {phase.value}{held}. Try again, or: khoctl abort"
            error.remedy = f"{error.remedy} {stays}".strip()
