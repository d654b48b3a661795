"""What is seen while an operation runs: a live line on a terminal, plain lines elsewhere."""

import asyncio
import contextlib
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import typer

from khoctl import render
from khod.client import Client, connect
from khod.errors import KhoError
from khod.model import Event, Phase, Status


class Shown:
    """Prints events of one operation to standard error, so that standard output stays the answer."""

    def __init__(self) -> None:
        self.last: Phase | None = None
        self._live = None
        if sys.stderr.isatty():
            from rich.console import Console  # noqa: PLC0415 - dear to import, and only a terminal needs it

            self._live = Console(stderr=True, highlight=False).status("asking khod")

    def __enter__(self) -> "Shown":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, event: Event) -> None:
        """Show one event; the first only tells where it began."""
        first, self.last = self.last is None, event.phase
        if self._live:
            self._live.update(f"{render.name(event.phase)}: {event.message}")
        if not first:
            typer.echo(render.event(event), err=True)


async def watched(path: Path, operation: Callable[[Client], Awaitable[Status]], *, quiet: bool) -> Status | None:
    """Run an operation while its events are shown; None where the host jumped before khod could answer."""
    async with connect(path) as client:
        if quiet:
            return await operation(client)
        with Shown() as shown:
            async with connect(path) as watcher:
                ready = asyncio.Event()
                showing = asyncio.ensure_future(_show(watcher, shown, ready))
                await asyncio.wait({showing, asyncio.ensure_future(ready.wait())}, return_when=asyncio.FIRST_COMPLETED)
                try:
                    return await operation(client)
                except KhoError:
                    # Let what is already on its way be seen before the error is said.
                    await asyncio.sleep(0)
                    if shown.last is Phase.executing and showing.done():
                        return None
                    raise
                finally:
                    showing.cancel()
                    with contextlib.suppress(asyncio.CancelledError, KhoError):
                        await showing


async def _show(client: Client, shown: Shown, ready: asyncio.Event) -> None:
    async for event in client.monitor():
        shown.show(event)
        ready.set()
