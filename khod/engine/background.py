# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tasks of the engine that nobody waits for."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

LOG = logging.getLogger(__name__)


class Background:
    """Tasks that nobody waits for; they end with khod. The error of one is logged."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn_task(self, work: Coroutine[Any, Any, object]) -> None:
        """Run a task."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_end)

    def cancel_tasks(self) -> None:
        """Cancel every task that has not ended."""
        for task in self._tasks:
            task.cancel()

    def _on_end(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            LOG.error("khod itself failed: %r", error)
