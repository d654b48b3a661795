# SPDX-License-Identifier: LGPL-2.1-or-later
"""Waiting within the event loop that the test shares with what it tests."""

import asyncio
from collections.abc import Callable


async def until(condition: Callable[[], bool]) -> None:
    """Let the event loop go round until the condition is true; the test's deadline bounds it."""
    while not condition():  # noqa: ASYNC110  # each turn of the event loop may bring it about
        await asyncio.sleep(0)
