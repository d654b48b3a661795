# SPDX-License-Identifier: LGPL-2.1-or-later
"""What this host still tells of a handover that ended as a cold boot, gathered in the background after khod's start."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from khod.abi.calls import Calls
from khod.concurrency.worker import Worker
from khod.deferred import defer_module
from khod.engine.transaction import Transaction
from khod.errors import KhoError
from khod.handover.record import Record
from khod.model import ColdBoot, Phase

if TYPE_CHECKING:
    from khod.handover import cold_boot
    from khod.kernel import host, pstore
    from khod.systemd import boots
else:
    cold_boot = defer_module("khod.handover.cold_boot")
    host = defer_module("khod.kernel.host")
    pstore = defer_module("khod.kernel.pstore")
    boots = defer_module("khod.systemd.boots")

LOG = logging.getLogger(__name__)
T = TypeVar("T")
DEADLINE_SECONDS = 30.0
"""Maximum seconds for each question: a journal of years lies on a disk that has just been mounted."""

BootEnds = Callable[[str, str], "list[boots.BootEnd]"]
"""Returns how the boots before the first id ended, back to the second one."""


async def gather_cold_boot(record: Record, calls: Calls, boot_ends: BootEnds | None = None) -> ColdBoot:
    """Return the explained cold boot of a record in whose boot the host came up cold.

    What cannot be read is named in it. Raises nothing except a cancellation. The questions have a thread of their own:
    one that hangs holds nothing up.
    """
    until = record.cold_boot.boot_id if record.cold_boot else ""
    problems: list[str] = []
    words: list[str] = []
    ends: list[boots.BootEnd] = []
    worker = Worker("cold-boot", "This host")

    async def ask(function: Callable[[], T], what: str, instead: T) -> T:
        try:
            return await worker.call_within(function, what, DEADLINE_SECONDS)
        except (KhoError, OSError) as error:
            problems.append(f"{what} failed: {error}")
        except Exception as error:
            LOG.exception("%s failed", what)
            problems.append(f"{what} failed: khod itself failed: {error!r}")
        return instead

    try:
        watchdog = await ask(lambda: host.reset_by_watchdog(calls), "reading the watchdogs' state", None)
        words = await ask(lambda: pstore.read_last_words(calls, record.begun.at), "reading pstore", words)
        ends = await ask(
            lambda: (boot_ends or boots.read_boot_ends)(record.boot_id, until), "reading the journal", ends
        )
    finally:
        worker.close()
    evidence = cold_boot.ColdBootEvidence(ends, words, watchdog, problems)
    return cold_boot.explain_cold_boot(record, evidence)


class ColdBootInquiry:
    """Finds out why the boot that `transaction` has is a cold one."""

    def __init__(self, transaction: Transaction, calls: Calls, boot_ends: BootEnds | None) -> None:
        self._transaction = transaction
        self._calls = calls
        self._boot_ends = boot_ends

    @property
    def is_due(self) -> bool:
        """Whether this boot is a cold one that no khod has explained yet."""
        known = self._transaction.record.cold_boot
        return self._transaction.record.outcome is Phase.cold_boot and not (known and known.journal_end)

    async def explain_boot(self) -> ColdBoot:
        """Return the explanation, once it is in the record; the host is served meanwhile."""
        found = await gather_cold_boot(self._transaction.record, self._calls, self._boot_ends)
        await self._transaction.note_cold_boot(found)
        return found
