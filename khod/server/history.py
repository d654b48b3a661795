# SPDX-License-Identifier: LGPL-2.1-or-later
"""The calls about past attempts, and what of an attempt only root and the operators' group may read."""

from dataclasses import replace

from asyncvarlink import varlinkmethod

from khod.engine import Engine
from khod.errors import UsageError
from khod.history.database import MAX_PAGE
from khod.history.model import AttemptRecord, AttemptSummary, KernelFacts, RunTarget
from khod.model import Event
from khod.server.access import ANSWERED
from khod.server.interface import Handover, HistoryReply
from khod.server.rules import OPERATORS

PAGE_ATTEMPTS = 100
"""The number of attempts in a page whose size the caller does not give."""
PRIVATE_CHECKS = ("cmdline", "initrd", "boot_cost")
"""Checks whose evidence quotes words of a command line."""


class HistoryCalls(Handover):
    """The part of io.kho.Handover that reads the history."""

    def __init__(self, engine: Engine) -> None:
        self._history = engine.history
        self._queries = engine.queries
        """For calls that every user may make."""

    @varlinkmethod
    async def History(self, *, before: str | None = None, limit: int | None = None) -> HistoryReply:
        if limit is not None and not 0 < limit <= MAX_PAGE:
            raise UsageError(f"`limit` is {limit}", where="limit", remedy=f"Give a number from 1 to {MAX_PAGE}.")
        page = await self._history.page(before or "", limit or PAGE_ATTEMPTS)
        return {"attempts": _permitted_summaries(page.attempts), "more": page.more, "note": page.note}

    @varlinkmethod(return_parameter="attempt")
    async def Attempt(self, *, run: str | None = None) -> AttemptRecord:
        found = await self._history.attempt(run or "")
        return found if _may_read_all() else hide_private(found)

    @varlinkmethod(return_parameter="attempts")
    async def Chain(self) -> list[AttemptSummary]:
        boot_id = (await self._queries.status()).boot_id
        return _permitted_summaries(await self._history.chain(boot_id))


def _may_read_all() -> bool:
    return ANSWERED.get() in OPERATORS


def _permitted_summaries(found: list[AttemptSummary]) -> list[AttemptSummary]:
    return found if _may_read_all() else [_hide_asker(summary) for summary in found]


def hide_private(attempt: AttemptRecord) -> AttemptRecord:
    """Return an attempt without who asked, command lines, and the logs that a cold boot left, which may have them."""
    return replace(
        attempt,
        summary=_hide_asker(attempt.summary),
        origin=_hide_cmdline(attempt.origin),
        target=attempt.target and _hide_target(attempt.target),
        arrived=attempt.arrived and _hide_cmdline(attempt.arrived),
        events=[_hide_words(event) for event in attempt.events],
        checks=[
            replace(check, evidence="", remedy="") if check.name in PRIVATE_CHECKS else check
            for check in attempt.checks
        ],
        cold_boot=attempt.cold_boot and replace(attempt.cold_boot, last_words=[], journal_end=""),
    )


def _hide_asker(summary: AttemptSummary) -> AttemptSummary:
    return replace(summary, by="")


def _hide_cmdline(kernel: KernelFacts) -> KernelFacts:
    return replace(kernel, cmdline="")


def _hide_target(target: RunTarget) -> RunTarget:
    return replace(target, kernel=_hide_cmdline(target.kernel), costs=[])


def _hide_words(event: Event) -> Event:
    """Return an event without a command line; the message of an event with `words` has it, too."""
    return event if event.words is None else replace(event, words=None, message="")
