# SPDX-License-Identifier: LGPL-2.1-or-later
"""kho.prom, the file of node_exporter's textfile collector, in the directory that `[metrics]` names.

It is written when khod has started and when a handover has ended, never during one. The directory may be missing, full,
not writable, or on a file system that hangs: the journal then says so, and nothing else follows from it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from khod.concurrency.worker import Worker
from khod.deferred import defer_module
from khod.engine.journal import write_message
from khod.engine.journal_fields import Message
from khod.errors import KhoError, errno_text
from khod.handover.machine import RESTING
from khod.model import Phase

if TYPE_CHECKING:
    from khod.metrics import text
    from khod.metrics.table import MetricFacts
else:
    text = defer_module("khod.metrics.text")

FILE_NAME = "kho.prom"
NEW_NAME = f".{FILE_NAME}.new"
"""The file while it is written: a collector reads `*.prom` only."""
WRITE_SECONDS = 10.0
"""Seconds that the directory has for one write."""
SETTLED = RESTING | {Phase.failed, Phase.foreign, Phase.inconsistent}
"""The phases in which no handover is under way."""
REMEDY = (
    "khod may write there only where a drop-in of kho-handover.service says so: ReadWritePaths= with this directory; "
    "see METRICS in khod(8)"
)


class TextFile:
    """Writes the metrics into a directory."""

    def __init__(self, directory: Callable[[], str], facts: Callable[[], Awaitable[MetricFacts]]) -> None:
        """`directory` returns the directory, "" for none; it is called each time, because of reloads."""
        self._directory = directory
        self._facts = facts
        self._worker = Worker("metrics", "The directory of the metrics", max_waiting=1)
        self._phase = Phase.idle
        self._is_due = False
        self._writing: asyncio.Task[None] | None = None

    def note_phase(self, phase: Phase) -> None:
        """Begin to write the file if a handover has ended with this change of phase."""
        if phase in SETTLED and self._phase not in SETTLED:
            self.update_soon()
        self._phase = phase

    def update_soon(self) -> None:
        """Begin to write the file, and return at once; while it is written, it is written once more afterwards."""
        self._is_due = True
        if self._writing is None or self._writing.done():
            self._writing = asyncio.ensure_future(self._write_while_due())

    async def wait_written(self) -> None:
        """Wait until nothing is due."""
        if self._writing is not None:
            await self._writing

    async def _write_while_due(self) -> None:
        while self._is_due:
            self._is_due = False
            await self.update()

    async def update(self) -> None:
        """Write the file, if there is a directory for it and no handover is under way.

        What goes wrong is a record in the journal.
        """
        if not (directory := self._directory()):
            return
        path = Path(directory, FILE_NAME)
        try:
            facts = await self._facts()
            if facts.status.phase in SETTLED:
                rendered = text.render_text(facts)
                await self._worker.call_within(lambda: replace_file(path, rendered), str(path), WRITE_SECONDS)
        except OSError as error:
            _report_failure(path, errno_text(error))
        except Exception as error:  # noqa: BLE001 - no handover depends on it
            _report_failure(path, error.what if isinstance(error, KhoError) else str(error))


def replace_file(path: Path, text: str) -> None:
    """Replace a file by rename(2), readable by everyone; raises OSError.

    It is not synced: what a power failure takes is written again at the next start. Whoever may write to the directory
    can lead khod to no other file, because the new one must not exist yet.
    """
    new = path.with_name(NEW_NAME)
    with suppress(FileNotFoundError):
        new.unlink()
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with open(fd, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fchmod(fd, 0o644)
        new.rename(path)
    except OSError:
        with suppress(OSError):
            new.unlink()
        raise


def _report_failure(path: Path, why: str) -> None:
    write_message(
        Message.metrics_unwritten, f"The metrics are not written to {path}: {why}. {REMEDY}", KHO_PATH=str(path)
    )
