"""What is seen while an operation runs: a live line on a terminal, plain lines elsewhere."""

import asyncio
import contextlib
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Self

import typer

from khoctl import render
from khod.client import Client, connect
from khod.errors import KhoError
from khod.model import Event, Phase, Status

if TYPE_CHECKING:
    from rich.status import Status as Live

LAST_WORDS = 1.0
"""Seconds the last events have to come in on their own connection, after the answer came on the other."""


class Shown:
    """Prints the events of one operation to standard error, so that standard output stays the answer."""

    def __init__(self) -> None:
        self.last: Phase | None = None
        self.changed = asyncio.Event()
        self._live: Live | None = None
        if sys.stderr.isatty():
            from rich.console import Console  # noqa: PLC0415 - dear to import, and only a terminal needs it

            self._live = Console(stderr=True, highlight=False, markup=False).status("asking khod")

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, event: Event) -> None:
        """Show one event; the first only tells where it began."""
        first, self.last = self.last is None, event.phase
        self.changed.set()
        if self._live:
            self._live.update(f"{render.name(event.phase)}: {event.message}")
        if first:
            return
        if self._live:
            self._live.console.print(render.event(event))
        else:
            typer.echo(render.event(event), err=True)

    async def until(self, phase: Phase | None) -> None:
        """Wait for an event that says `phase`, or any event where it is None."""
        while self.last is not phase if phase else self.last is None:
            self.changed.clear()
            await self.changed.wait()


async def watched(path: Path, operation: Callable[[Client], Awaitable[Status]], *, quiet: bool) -> Status | None:
    """Run an operation while its events are shown; None where the host jumped before khod could answer."""
    async with connect(path) as client:
        if quiet:
            return await operation(client)
        with Shown() as shown:
            async with connect(path) as watcher:
                showing = asyncio.ensure_future(_show(watcher, shown))
                try:
                    await _first(showing, shown)
                    return await operation(client)
                except KhoError:
                    if shown.last is Phase.executing and showing.done():
                        return None
                    raise
                finally:
                    await _last_words(client, showing, shown)


async def _show(client: Client, shown: Shown) -> None:
    async for event in client.monitor():
        shown.show(event)


async def _first(showing: asyncio.Task[None], shown: Shown) -> None:
    """Begin only when the monitor is listening, or has ended."""
    begun = asyncio.ensure_future(shown.until(None))
    await asyncio.wait({showing, begun}, return_when=asyncio.FIRST_COMPLETED)
    begun.cancel()


async def _last_words(client: Client, showing: asyncio.Task[None], shown: Shown) -> None:
    """Let what is already on its way be seen, then stop watching."""
    with contextlib.suppress(KhoError, TimeoutError):
        async with asyncio.timeout(LAST_WORDS):
            if not showing.done():
                await shown.until((await client.status()).phase)
    showing.cancel()
    with contextlib.suppress(asyncio.CancelledError, KhoError):
        await showing
