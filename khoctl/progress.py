"""What is seen while an operation runs: a live line on a terminal, plain lines elsewhere."""

import selectors
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

import typer

from khoctl import render
from khod.client import Client
from khod.errors import KhoError, Unreachable
from khod.model import Event, Phase, Producer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

T = TypeVar("T")
FRAMES = 10
"""Times a second the producers' lines are drawn."""

FEW = 10
"""Producers whose lines stay on the terminal at the end."""

ROOM = 6
"""Lines of a terminal left for what is printed above the producers'."""

LAST_WORDS = 1.0
"""Seconds the last events have to come in on their own connection, after the answer came on the other."""


class Shown:
    """Prints the events of one operation to standard error, so that standard output stays the answer.

    On a terminal each producer has one line of its own below, which changes until the operation ends;
    elsewhere each of its answers is a line.
    """

    _console: "Console | None" = None
    _live: "Live | None" = None

    def __init__(self) -> None:
        self.last: Phase | None = None
        self._producers: dict[str, Producer] = {}
        self._heard: dict[str, float] = {}
        self._ended = False
        if sys.stderr.isatty():
            from rich.console import Console  # noqa: PLC0415 - dear to import, and only a terminal needs it
            from rich.live import Live  # noqa: PLC0415 - as above

            self._console = Console(stderr=True, highlight=False, markup=False)
            self._live = Live(console=self._console, refresh_per_second=FRAMES, get_renderable=self._lines)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        if self._live:
            self._live.stop()

    def show(self, event: Event) -> None:
        """Show one event; the first only tells where it began."""
        first, self.last = self.last is None, event.phase
        if first:
            return
        if event.producer is not None and event.producer.phase:
            self._producers[event.producer.name] = event.producer
            self._heard[event.producer.name] = time.monotonic()
            if self._live or (event.producer.waiting and not event.producer.answer):
                return
        if self._console:
            from rich.text import Text  # noqa: PLC0415 - as above

            self._console.print(Text.from_ansi(render.event(event)))
        else:
            typer.echo(render.event(event), err=True)

    def _lines(self) -> "Text":
        """One line a producer: those that are waited for first, as many as there is room for."""
        from rich.text import Text  # noqa: PLC0415 - as above

        if self._ended and len(self._producers) > FEW:  # what stays on the screen is what the operator must read
            odd = [found for found in self._producers.values() if render.odd(found)][:FEW]
            summary = f"    {render.counted(list(self._producers.values()))}"
            return Text("\n".join([*(f"    {render.producer(found)}" for found in odd), summary]), no_wrap=True)
        ordered = sorted(self._producers.values(), key=lambda found: not found.waiting)
        room = max(1, (self._console.height if self._console else 0) - ROOM)
        lines = [f"{'  >' if found.waiting else '   '} {render.producer(self._now(found))}" for found in ordered[:room]]
        if len(ordered) > room:
            waited = sum(found.waiting for found in ordered[room:])
            lines.append(f"    and {len(ordered) - room} more" + (f", {waited} of them waited for" if waited else ""))
        return Text("\n".join(lines), no_wrap=True, overflow="ellipsis")

    def _now(self, found: Producer) -> Producer:
        """A producer as it is by now: what it is waited for goes on."""
        since = time.monotonic() - self._heard[found.name] if found.waiting else 0.0
        return replace(found, seconds=found.seconds + since)


def watched(path: Path, begin: Callable[[Client], None], answer: Callable[[Client], T], *, quiet: bool) -> T | None:
    """Run the operation that `begin` calls, and show its events; None where the host jumped before the answer."""
    with Client(path) as client:
        if quiet:
            begin(client)
            return answer(client)
        with Client(path) as watcher, Shown() as shown:
            watcher.ask("Monitor", more=True)
            shown.show(watcher.event())
            begin(client)
            try:
                _show_until(client, watcher, shown)
                return answer(client)
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
                else:
                    if not watcher.more:
                        selector.unregister(watcher)


def _last_words(client: Client, watcher: Client, shown: Shown) -> None:
    """Let what is already on its way be seen."""
    deadline = time.monotonic() + LAST_WORDS
    with suppress(KhoError), selectors.DefaultSelector() as selector:
        final = client.status().phase
        if not watcher.more:
            return
        selector.register(watcher, selectors.EVENT_READ)
        while shown.last is not final and selector.select(max(0.0, deadline - time.monotonic())):
            watcher.receive()
            while watcher.waiting:
                shown.show(watcher.event())
