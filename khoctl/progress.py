# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is shown while an operation runs: live lines on a terminal, plain lines elsewhere."""

import selectors
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Self, TypeVar

from khoctl import render
from khoctl.layout import fit_page, show_page
from khoctl.session import TO_SEE, Detached, call_timeout, can_repaint, connect_client, say_slow, socket_path
from khod.client.handover import SLOW_SECONDS, Client
from khod.errors import KhoError, Unreachable
from khod.model import Event, EventKind, Phase, Producer, Status
from khod.text import join_names

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

T = TypeVar("T")
FRAMES = 10
"""How many times a second the producers' lines are drawn."""

FEW_PRODUCERS = 10
"""The number of producers whose lines stay on the terminal at the end."""

RESERVED_LINES = 6
"""Lines of a terminal that stay free for what is printed above the producers' lines."""

COMEBACK_SECONDS = 10.0
"""How long khod may take to answer again after it ended on the way into the next kernel."""

LAST_WORDS_SECONDS = 1.0
"""How long to wait for the last events on their own connection, after the answer came on the other one."""


class ProgressView:
    """Prints the events of one operation to standard error; standard output is for the answer.

    On a terminal each producer has a line of its own below, which changes until the operation ends; elsewhere each of
    its answers is a line.
    """

    _console: "Console | None" = None
    _live: "Live | None" = None

    def __init__(self, *, quiet: bool) -> None:
        self.last: Phase | None = None
        self._quiet = quiet
        self._named: set[tuple[str, str]] = set()
        self.expected = 0
        """The number of producers; one of a later rank sends no event before its rank is called."""
        self._verb, self._since = "", 0.0
        self._producers: dict[str, Producer] = {}
        self._heard: dict[str, float] = {}
        self._refused: dict[str, Producer] = {}
        """Each producer's first refusal, which ended the handover; the answer to its undo must not hide it."""
        self._ended = False
        if can_repaint(sys.stderr) and not quiet:
            from rich.console import Console  # noqa: PLC0415 - slow to import, and only a terminal needs it
            from rich.live import Live  # noqa: PLC0415 - as above

            self._console = Console(stderr=True, highlight=False, markup=False)
            self._live = Live(console=self._console, refresh_per_second=FRAMES, get_renderable=self._producer_lines)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        if self._live:
            self._live.stop()

    def show_event(self, event: Event) -> None:
        """Show one event, except the first, which only gives the phase at the start."""
        first, self.last = self.last is None, event.phase
        if first or self._quiet:
            return
        if event.producer is not None and event.producer.phase:
            self._producers[event.producer.name] = event.producer
            self._heard[event.producer.name] = time.monotonic()
            if render.has_refused(event.producer):
                self._refused.setdefault(event.producer.name, event.producer)
            if event.producer.phase != self._verb:
                self._verb, self._since = event.producer.phase, time.monotonic()
            if self._live or (event.producer.waiting and not event.producer.answer):
                return
        if self._console:
            from rich.text import Text  # noqa: PLC0415 - as above

            self._console.print(
                Text.from_ansi(fit_page(render.render_event(event), self._console.width)), soft_wrap=True
            )
        else:
            show_page(render.render_event(event), err=True)

    def show_waiting(self) -> None:
        """Print whom khod is waiting for, each producer once for each verb, where no live line shows it."""
        waiting = [found for found in self._producers.values() if found.waiting]
        new = [found for found in waiting if (found.name, found.phase) not in self._named]
        if self._live or self._quiet or not new:
            return
        self._named |= {(found.name, found.phase) for found in new}
        names = join_names((f"{found.name} ({found.phase})" for found in new), FEW_PRODUCERS)
        show_page(f"{render.EVENT_INDENT}waiting for {names}", err=True)

    def _producer_lines(self) -> "Text":
        """Return one line for each producer, as many as fit; those that are waited for come first."""
        from rich.text import Text  # noqa: PLC0415 - as above

        if self._ended and len(self._producers) > FEW_PRODUCERS:  # only what the operator must read stays on the screen
            odd = [found for found in self._producers.values() if render.is_notable(found)][:FEW_PRODUCERS]
            summary = f"    {render.count_producers(list(self._producers.values()))}"
            page = [*self._refusal_lines(), *(f"    {render.producer_text(found)}" for found in odd), summary]
            return Text("\n".join(page), no_wrap=True)
        room = max(2, (self._console.height if self._console else 0) - RESERVED_LINES)
        lines = self._refusal_lines() if self._ended else [self.summary()] if self._producers else []
        ordered = sorted(self._producers.values(), key=lambda found: not found.waiting)
        width = self._console.width if self._console else None
        for shown, found in enumerate(ordered):
            line = f"{'  >' if found.waiting else '   '} {render.producer_text(self._as_of_now(found))}"
            if len(lines) >= room:
                waited = sum(found.waiting for found in ordered[shown:])
                waiting = f", {waited} of them waited for" if waited else ""
                lines.append(f"    and {len(ordered) - shown} more{waiting}")
                break
            lines += fit_page(line, width).split("\n")
        return Text("\n".join(lines), no_wrap=True, overflow="ellipsis")

    def _refusal_lines(self) -> list[str]:
        """Return a line for each producer that refused, with its refusal instead of the answer to its undo."""
        width = self._console.width if self._console else None
        noes = [f"  ! {render.producer_text(found)}" for found in self._refused.values()][:FEW_PRODUCERS]
        return [line for no in noes for line in fit_page(no, width).split("\n")]

    def summary(self) -> str:
        """Return how many producers have done the current verb, since when, and the longest time limit."""
        told = [found for found in self._producers.values() if found.phase == self._verb]
        ready = sum(not found.waiting and not render.is_notable(found) for found in told)
        waiting = [found.limit for found in told if found.waiting]
        clock = f", {time.monotonic() - self._since:.1f} s of {max(waiting):g} s" if waiting else ""
        return f"    {self._verb}: {ready} of {max(self.expected, len(told))} ready{clock}"

    def _as_of_now(self, found: Producer) -> Producer:
        """Return a producer with its waiting time up to now."""
        since = time.monotonic() - self._heard[found.name] if found.waiting else 0.0
        return replace(found, seconds=found.seconds + since)


def run_with_progress(begin: Callable[[Client], None], answer: Callable[[Client], T], *, quiet: bool) -> T | None:
    """Run the operation that `begin` calls, and show its events; return None if the host jumped before the answer.

    The operation may take as long as it needs while khod still answers Status, unless the operator gave a time limit.
    Raises Unreachable if khod does not answer, and Detached, at once, if the operator interrupts.
    """
    with connect_client() as calling, connect_client() as watcher, ProgressView(quiet=quiet) as shown:
        before = calling.status()
        shown.expected = len(before.producers)
        watcher.call_method("Monitor", more=True)
        shown.show_event(watcher.receive_event())
        try:
            begin(calling)
            _show_until(calling, watcher, shown)
            found = answer(calling)
        except KeyboardInterrupt:
            raise Detached(shown.last) from None  # at once: khod is not asked again
        except Unreachable:
            drain_events(watcher, shown)  # if khod ended, its last event says why
            if shown.last is not Phase.executing:
                raise
            require_jump(before.boot_id)
            return None
        except KhoError:
            _last_words(calling, watcher, shown)
            raise
        _last_words(calling, watcher, shown)
        return found


def begin_operation(begin: Callable[[Client], None]) -> Status:
    """Call an operation and return the status as soon as it takes a step or is over; khod continues it."""
    limit = call_timeout()
    deadline = None if limit is None else time.monotonic() + limit
    with connect_client() as calling, connect_client() as watcher, selectors.DefaultSelector() as selector:
        watcher.call_method("Monitor", more=True)
        before = watcher.receive_event().phase
        begin(calling)
        for connection in (calling, watcher):
            selector.register(connection, selectors.EVENT_READ)
        has_begun = False
        while not has_begun:  # a producer that registers, as what is checked before, does not mean that it has
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready = [key.fileobj for key, _events in selector.select(left)]
            if calling in ready:
                return calling.receive_status()
            if not ready:
                raise too_long_error()
            events = [watcher.receive_event()]
            while watcher.reply_waiting:
                events.append(watcher.receive_event())
            has_begun = any(event.phase is not before or event.kind is EventKind.step_began for event in events)
    with connect_client() as asking:
        return asking.status()


def require_jump(boot: str) -> None:
    """Raise Unreachable if khod ended on the way into the next kernel and is back in the same boot.

    systemd holds khod's socket and starts khod again. Without an answer, the host is going down. On the simulated
    kernel of the tests and of the demonstration, khod ends with its kernel and comes back in another boot.
    """
    found = None
    with suppress(Unreachable), Client(socket_path(), patience=COMEBACK_SECONDS, on_slow=say_slow) as asking:
        found = asking.status()
    if found is not None and found.boot_id == boot:
        raise Unreachable(
            "khod ended while the host was on its way into the next kernel, and was started again before the jump",
            remedy="What came of it: khoctl status. If the host jumps after all: khoctl verify",
        )


def too_long_error() -> Unreachable:
    """Return the error that --timeout is over; the operation goes on."""
    return Unreachable(
        f"It is not over within {call_timeout():g} s",
        where="--timeout",
        remedy=f"The handover continues in the background. {TO_SEE}",
    )


def _show_until(calling: Client, watcher: Client, shown: ProgressView) -> None:
    """Show events until the operation is answered; while there are none, check that khod still answers."""
    limit = call_timeout()
    ends = None if limit is None else time.monotonic() + limit
    with selectors.DefaultSelector() as selector, ExitStack() as stack:
        for connection in (calling, watcher):
            selector.register(connection, selectors.EVENT_READ)
        probe: Client | None = None
        while not calling.reply_waiting:
            left = SLOW_SECONDS if ends is None else min(SLOW_SECONDS, ends - time.monotonic())
            if left <= 0:
                raise too_long_error()
            ready = [key.fileobj for key, _events in selector.select(left)]
            if not ready:
                shown.show_waiting()
                if probe is None:
                    probe = stack.enter_context(connect_client())
                    probe.call_method("Status")
                    selector.register(probe, selectors.EVENT_READ)
                else:
                    probe.check_overdue()
            if watcher in ready and not show_pending(watcher, shown):
                selector.unregister(watcher)
            if calling in ready:
                calling.receive()
            if probe is not None and probe in ready:
                probe.receive()
                if probe.reply_waiting:
                    selector.unregister(probe)
                    stack.close()
                    probe = None


def show_pending(watcher: Client, shown: ProgressView) -> bool:
    """Show the events that have come; return whether more may come."""
    try:
        watcher.receive()
        while watcher.reply_waiting:
            shown.show_event(watcher.receive_event())
    except KhoError:
        return False
    return watcher.more


def drain_events(watcher: Client, shown: ProgressView, final: Phase | None = None) -> None:
    """Show events until this phase, or until khod closes the connection, for at most LAST_WORDS_SECONDS."""
    deadline = time.monotonic() + LAST_WORDS_SECONDS
    while (
        shown.last is not final and watcher.wait_readable(deadline - time.monotonic()) and show_pending(watcher, shown)
    ):
        pass


def _last_words(calling: Client, watcher: Client, shown: ProgressView) -> None:
    """Show the events that are already on their way."""
    with suppress(KhoError):
        drain_events(watcher, shown, calling.status().phase)
