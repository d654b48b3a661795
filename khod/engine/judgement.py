# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verdict on the handover into this boot, as its terms judge it: recorded, told and remembered."""

from typing import TYPE_CHECKING

from khod.deferred import defer_module
from khod.engine.recorder import Recorder
from khod.engine.transaction import Transaction
from khod.model import NO_TERMS, Phase, Verdict
from khod.text import join_names

if TYPE_CHECKING:
    from khod.handover import terms as handover_terms
else:
    handover_terms = defer_module("khod.handover.terms")


class Judgement:
    """Concludes the verification; what is found later may change the verdict."""

    def __init__(self, transaction: Transaction, recorder: Recorder) -> None:
        self._transaction = transaction
        self._recorder = recorder

    async def conclude_verdict(self, verdict: Verdict) -> None:
        """Judge a verdict and record it; with a budget the blackout is measured before, by the clocks of both kernels.

        The wall clock is right to a second only, and a verdict that is taken back later has been acted on by then.
        """
        record = self._transaction.record
        if record.arrived_terms.blackout_budget is not None and (
            measured := await self._recorder.measure_arrival(record.arrived_run)
        ):
            await self._transaction.note_timeline(record.arrived_run, measured)
        await self._record_verdict(self._judge_verdict(verdict))

    async def judge_again(self, run: str) -> None:
        """Judge the handover into this boot again if it is `run`: its blackout may be known better now."""
        record = self._transaction.record
        if (
            run != record.arrived_run
            or record.verdict is None
            or record.outcome not in (Phase.verified, Phase.degraded)
        ):
            return
        verdict = self._judge_verdict(record.verdict)
        if verdict != record.verdict:
            await self._record_verdict(verdict)

    def _judge_verdict(self, verdict: Verdict) -> Verdict:
        record = self._transaction.record
        if record.arrived_terms == NO_TERMS:
            return verdict
        blackout = record.blackout_seconds, record.blackout_error_seconds
        return handover_terms.judge_verdict(verdict, record.arrived_terms, *blackout)

    async def _record_verdict(self, verdict: Verdict) -> None:
        arrived = join_names(verdict.arrived)
        count = len(verdict.arrived)
        said = f"the state of {count} producer{'' if count == 1 else 's'} arrived: {arrived}"
        if verdict.unknown:
            said = f"{said}; not known: {join_names(verdict.unknown)}"
        await self._transaction.conclude_verification(verdict, verdict.reason or said)
        self._recorder.conclude_arrival(self._transaction.record)
