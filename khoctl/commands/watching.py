# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands that stay and watch a handover: monitor, wait, verify, and `status --watch`."""

import re
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, NoReturn

import click
import typer

from khoctl import layout, render
from khoctl.candidates import complete_phases
from khoctl.follow import AT_REST, ENDED, Follower
from khoctl.session import TO_SEE, Json, call_timeout, can_repaint, is_colourless, show_answer
from khoctl.status_page import render_outcome, render_status
from khod.errors import Exit, Refused, Unreachable, UsageError
from khod.model import Event, Phase, Status

app = typer.Typer(rich_markup_mode=None)
CLEAR, ERASE, CLEAR_REST = (
    "\x1b[H",
    "\x1b[K\n",
    "\x1b[J",
)  # cursor to the top; clear the rest of a line; clear the rest of the screen
RUN_PATTERN = re.compile("[0-9a-f]+")
"""The id of a handover, or its beginning."""
TICK_SECONDS = 1.0
"""Seconds between two updates of a watched page."""


def watch_status(*, as_json: bool) -> NoReturn:
    """Show every change until interrupted, or until the verdict after a jump.

    On a terminal the page is drawn each second, so that the times advance.
    """
    live = can_repaint(sys.stdout) and not as_json
    with Follower() as follower:
        while True:
            _show_watched(follower, live=live, as_json=as_json)
            if follower.has_verdict:
                raise typer.Exit(follower.status.exit_code)
            follower.wait_event(TICK_SECONDS if live else None)
            follower.refresh_status()


def _show_watched(follower: Follower, *, live: bool, as_json: bool) -> None:
    """Show the status; while khod is away, that it is."""
    away = follower.away_seconds
    if live:
        page = render_status(follower.status)
        if away is not None:
            page = f"{page}\n\n{render.render_event(follower.note)} ({away:.0f} s)"
        layout.write_text(_repaint(page), color=True, end="")
    elif away is not None:
        show_answer(follower.note, partial(render.render_event, follower.note), as_json=as_json)
    else:
        show_answer(follower.status, partial(render_status, follower.status), as_json=as_json)
    sys.stdout.flush()


def _repaint(page: str) -> str:
    """Return a page that overwrites the one before it; the cursor moves also if colours are off."""
    lines = layout.fit_page(click.unstyle(page) if is_colourless() else page, layout.page_width()).split("\n")
    return f"{CLEAR}{''.join(line + ERASE for line in lines)}{CLEAR_REST}"


@app.command()
def monitor(as_json: Json = False) -> None:
    """Print every change, one line each, until interrupted.

    It stays through a jump, and ends with its verdict and the exit code of status. Exits with 5 where khod does not
    come back within --timeout, which is 600 s without it.
    """
    with Follower() as follower:
        _show_event(follower.event, as_json=as_json)
        while not follower.has_verdict:
            if (event := follower.wait_event()) is not None:
                _show_event(event, as_json=as_json)
        follower.refresh_status()
        raise typer.Exit(_show_outcome(follower.status, rolled_back=False, as_json=as_json))


def _show_event(event: Event, *, as_json: bool) -> None:
    show_answer(event, partial(render.render_event, event), as_json=as_json)
    sys.stdout.flush()


@app.command()
def wait(
    until: Annotated[
        str | None,
        typer.Argument(
            metavar="PHASE|RUN",
            help="A phase as status names it, or the id of the handover under way.",
            autocompletion=complete_phases,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Wait until the handover has ended, or is in a phase.

    It stays through the jump, and ends with the exit code of status, or with 1 where the handover was rolled back.
    Without a handover it ends at once. Exits with 5 where it is not over within --timeout.
    """
    phase = next((known for known in Phase if until in (known.value, render.phase_name(known))), None)
    if phase is None and until is not None and not RUN_PATTERN.fullmatch(until):
        known = ", ".join(one.value for one in Phase)
        raise UsageError(f"There is no phase {until!r}", where="PHASE", remedy=f"One of: {known}.")
    with Follower() as follower:
        if phase is not None:
            _wait_until(follower, lambda: follower.away_seconds is None and follower.event.phase is phase)
            _show_event(follower.event, as_json=as_json)
            return
        if until is not None and not follower.event.run.startswith(until):
            raise Refused(f"No handover {until} is under way", where="RUN", remedy="khoctl status says more.")
        before = follower.event.phase
        _wait_until(follower, lambda: follower.has_ended)
        follower.refresh_status()
        in_this_boot = not follower.is_other_boot and before not in ENDED | {Phase.verifying}
        rolled_back = in_this_boot and follower.status.phase in AT_REST
        raise typer.Exit(_show_outcome(follower.status, rolled_back=rolled_back, as_json=as_json))


def _wait_until(follower: Follower, is_over: Callable[[], bool]) -> None:
    """Wait for a condition, at most for --timeout; Unreachable after that."""
    limit = call_timeout()
    ends = None if limit is None else time.monotonic() + limit
    while not is_over():
        left = None if ends is None else ends - time.monotonic()
        if left is not None and left <= 0:
            raise Unreachable(f"It is not over within {limit:g} s", where="--timeout", remedy=TO_SEE)
        event = follower.wait_event(left)
        if event is not None and event is not follower.event:
            layout.show_page(f"khoctl: {event.message}", err=True)


def _show_outcome(found: Status, *, rolled_back: bool, as_json: bool) -> int:
    """Print the outcome in one line, and return the exit code.

    After a rollback the status is that of the handover into this boot.
    """
    show_answer(found, partial(render_outcome, found, rolled_back=rolled_back), as_json=as_json)
    return Exit.failed if rolled_back else found.exit_code


def follow_jump(before: Status, code: int, *, as_json: bool) -> int:
    """Follow a handover that was begun on another host, from the end of that connection; return its exit code.

    `before` is the status before it was begun, `code` that of the command: with Exit.done it may have ended without a
    jump, with another the connection was lost.
    """
    with Follower(before) as follower:
        while not follower.has_ended:
            event = follower.wait_event()
            if event is not None:
                layout.show_page(render.render_event(event), err=True)
            stays = follower.away_seconds is None and not follower.is_other_boot
            if code == Exit.done and stays and follower.event.phase is not Phase.executing:
                return code  # it has loaded the next kernel, for example
        follower.refresh_status()
    rolled_back = not follower.is_other_boot and follower.status.phase in AT_REST
    return _show_outcome(follower.status, rolled_back=rolled_back, as_json=as_json)


@app.command()
def verify(as_json: Json = False) -> None:
    """Wait until this boot's verification is over.

    Exits with 7 where some state did not arrive.
    """
    with Follower() as follower:
        starting = (Phase.verifying, Phase.rolling_back)  # khod's start is not over yet
        _wait_until(follower, lambda: follower.event.phase not in starting)
        follower.refresh_status()
        found = follower.status
    show_answer(found, partial(render_status, found, verbose=True), as_json=as_json)
    others = found.exit_code == Exit.refused  # another program's use of KHO does not concern this verification
    raise typer.Exit(Exit.done if others else found.exit_code)
