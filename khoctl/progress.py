"""What is seen while an operation runs: a live line on a terminal, plain lines elsewhere."""

import selectors
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self

import typer

from khoctl import render
from khod.client import Client
from khod.errors import KhoError, Unreachable
from khod.model import Event, Phase, Status

if TYPE_CHECKING:
    from rich.status import Status as Live

LAST_WORDS = 1.0
"""Seconds the last events have to come in on their own connection, after the answer came on the other."""


class Shown:
    """Prints the events of one operation to standard error, so that standard output stays the answer."""

    def __init__(self) -> None:
        self.last: Phase | None = None
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
        if self._live:
            self._live.update(f"{render.name(event.phase)}: {event.message}")
        if first:
            return
        if self._live:
            self._live.console.print(render.event(event))
        else:
            typer.echo(render.event(event), err=True)


def watched(path: Path, begin: Callable[[Client], None], *, quiet: bool) -> Status | None:
    """Run the operation that `begin` calls, and show its events; None where the host jumped before an answer."""
    with Client(path) as client:
        if quiet:
            begin(client)
            return client.answer()
        with Client(path) as watcher, Shown() as shown:
            watcher.send("Monitor", more=True)
            shown.show(watcher.event())
            begin(client)
            try:
                _show_until(client, watcher, shown)
                return client.answer()
            except Unreachable:
                if shown.last is Phase.executing:
                    return None
                raise
            finally:
                _last_words(client, watcher, shown)


def _show_until(client: Client, watcher: Client, shown: Shown) -> None:
    """Show events until the operation is answered."""
    with selectors.DefaultSelector() as selector:
        for connection in (client, watcher):
            selector.register(connection, selectors.EVENT_READ)
        while not client.waiting:
            for key, _events in selector.select():
                ready = key.fileobj
                if ready is client:
                    client.receive()
                    continue
                try:
                    watcher.receive()
                    while watcher.waiting:
                        shown.show(watcher.event())
                except KhoError:
                    selector.unregister(watcher)


def _last_words(client: Client, watcher: Client, shown: Shown) -> None:
    """Let what is already on its way be seen."""
    deadline = time.monotonic() + LAST_WORDS
    with suppress(KhoError), selectors.DefaultSelector() as selector:
        final = client.status().phase
        selector.register(watcher, selectors.EVENT_READ)
        while shown.last is not final and selector.select(max(0.0, deadline - time.monotonic())):
            watcher.receive()
            while watcher.waiting:
                shown.show(watcher.event())
