# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands of a handover, from check to verify. Each asks khod; exit codes are `khod.errors.Exit`."""

import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import click
import typer

from khoctl import layout, progress, render
from khoctl.next_kernel import NextKernelOptions, spread_options
from khoctl.request import open_request
from khoctl.session import Detached, Json, ask_confirmation, can_repaint, connect_client, is_colourless, on_terminal
from khod.client.handover import Client
from khod.errors import Exit, Refused, Unreachable, Unsupported, UsageError
from khod.model import Check, CheckResult, Phase, Step

app = typer.Typer(rich_markup_mode=None)
CLEAR, ERASE, CLEAR_REST = (
    "\x1b[H",
    "\x1b[K\n",
    "\x1b[J",
)  # to the screen's top; clear a line's rest; clear the screen's rest
KERNEL_FILES = {
    "sys/kernel/kho/active": ("not in the active phase", "in the active phase, the producers may be frozen"),
    "sys/kernel/kexec_loaded": ("no image is loaded", "an image is loaded"),
}
"""What anyone may read, and what 0 and 1 in it mean; the first one is v3's."""

TICK_SECONDS = 1.0
"""Seconds between two paintings of a page that is watched."""
LoadOnly = Annotated[bool, typer.Option("--load-only", help="Stop when the image is loaded.")]
Now = Annotated[
    bool,
    typer.Option(
        "--now",
        help="Sync and jump at once, instead of systemctl kexec. Only with this is a jump that fails rolled back.",
    ),
]
NoBlock = Annotated[bool, typer.Option("--no-block", help="Return when it has begun; it continues in the background.")]
FromProfile = Annotated[
    str | None, typer.Option("--profile", metavar="NAME", help="Take all of this from /etc/kho/handover.d/NAME.toml.")
]


@app.command()
def status(
    as_json: Json = False, watch: Annotated[bool, typer.Option("--watch", help="Stay, and show every change.")] = False
) -> None:
    """Show where the handover stands.

    Exits with 7 after a degraded or cold boot, with 6 where something was not rolled back or is held, with 3 where
    another program uses KHO or kexec.
    """
    if watch:
        _watch_status(as_json=as_json)
    try:
        with connect_client() as khod:
            found = khod.status()
    except Unreachable as error:
        raise Unreachable(
            error.what, where=error.where, remedy=". ".join(filter(None, (error.remedy, kernel_says())))
        ) from None
    _print_answer(found, partial(render.render_status, found), as_json=as_json)
    raise typer.Exit(found.exit_code)


def kernel_says(root: Path = Path("/")) -> str:
    """What can be read of a handover without khod, a sentence; "" where the kernel says nothing."""
    said = []
    for path, texts in KERNEL_FILES.items():
        with suppress(OSError, ValueError):
            said.append(f"{texts[int((root / path).read_text())]} (/{path})")
    return f"The kernel itself says: {', '.join(said)}." if said else ""


def _watch_status(*, as_json: bool) -> NoReturn:
    """Show every change until interrupted; a terminal is painted anew each second, so that its clocks go on."""
    live = can_repaint(sys.stdout) and not as_json
    with connect_client() as asking, connect_client() as following:
        found, events = asking.status(), following.monitor()
        event = next(events)
        try:
            while True:
                if live:
                    layout.write_text(_repaint(render.render_status(found)), color=True, end="")
                else:
                    _print_answer(found, partial(render.render_status, found), as_json=as_json)
                if following.reply_waiting or following.wait_readable(TICK_SECONDS if live else None):
                    event = next(events)
                found = asking.status()
        except Unreachable:
            if event.phase is not Phase.executing:
                raise
            progress.require_jump(found.boot_id)
    _say_jumped(as_json=as_json)


def _repaint(page: str) -> str:
    """A page over the one before it. Where colours are not wanted the cursor still moves."""
    lines = layout.fit_page(click.unstyle(page) if is_colourless() else page, layout.page_width()).split("\n")
    return f"{CLEAR}{''.join(line + ERASE for line in lines)}{CLEAR_REST}"


def _print_answer(found: object, page: Callable[[], str], *, as_json: bool) -> None:
    """Print an answer: JSON is one line, a page is fitted to the terminal."""
    if as_json:
        typer.echo(render.as_json(found))
    else:
        layout.show_page(page())


@app.command()
@spread_options
def check(
    options: NextKernelOptions,
    now: Annotated[bool, typer.Option("--now", help="Check for a jump at once, which stops nothing before.")] = False,
    from_profile: FromProfile = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 3 for a warning, too.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Leave out what passed or was skipped.")] = False,
    as_json: Json = False,
) -> None:
    """Run the preflight checks and touch nothing.

    With a kernel those of the next one too. Exits with 3 where one fails, with 4 where KHO is not there.
    """
    with open_request(options, from_profile, now=now) as (request, fds), connect_client() as khod:
        found = khod.check(request, fds)
    _print_answer(found, partial(render.render_checks, found, quiet=quiet), as_json=as_json)
    warned = strict and any(item.result is CheckResult.warn for item in found)
    raise typer.Exit(_exit_code(found) or (Exit.refused if warned else Exit.done))


@app.command()
@spread_options
def plan(
    options: NextKernelOptions,
    load_only: LoadOnly = False,
    now: Now = False,
    from_profile: FromProfile = None,
    as_json: Json = False,
) -> None:
    """Print what a handover would do, and touch nothing.

    Each step has its undo beside it. Exits as check.
    """
    with open_request(options, from_profile, now=now, load_only=load_only) as (request, fds):
        _show_plan(request, fds, as_json=as_json)


def _show_plan(request: dict[str, Any], fds: tuple[int, ...], *, as_json: bool) -> NoReturn:
    with connect_client() as khod:
        found = khod.plan(_plan_parameters(request), fds)
    _print_answer(found, partial(render.render_plan, found), as_json=as_json)
    raise typer.Exit(_exit_code(found.checks))


def _plan_parameters(request: dict[str, Any]) -> dict[str, Any]:
    """What Plan takes of a request of Kexec's."""
    return {name: value for name, value in request.items() if name != "hold"}


def _exit_code(found: list[Check]) -> Exit:
    results = {item.result for item in found}
    if CheckResult.unsupported in results:
        return Exit.unsupported
    return Exit.refused if CheckResult.fail in results else Exit.done


@app.command()
def activate(no_block: NoBlock = False, as_json: Json = False) -> None:
    """Freeze the producers and serialize the kernel's state.

    What is left to do is `khoctl kexec`, or `khoctl abort`.
    """
    _run_operation(lambda khod: khod.call_method("Activate"), as_json=as_json, block=not no_block)


@app.command()
def abort(
    force: Annotated[bool, typer.Option("--force", help="Also put back what khod did not do.")] = False,
    no_block: NoBlock = False,
    as_json: Json = False,
) -> None:
    """Put everything back and thaw the producers.

    The image is unloaded, the active phase left, every producer thawed and cancelled.
    """
    _run_operation(
        lambda khod: khod.call_method("Abort", {"force": force}), as_json=as_json, block=not no_block, may_stop=False
    )


@app.command()
@spread_options
def kexec(
    options: NextKernelOptions,
    load_only: LoadOnly = False,
    now: Now = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Begin without a question on a terminal.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do what `khoctl plan` does: nothing.")] = False,
    no_block: NoBlock = False,
    hold: Annotated[bool, typer.Option("--hold", help="Stay where a failure happens instead of rolling back.")] = False,
    from_profile: FromProfile = None,
    as_json: Json = False,
) -> None:
    """Do what is left of the handover and jump.

    It goes on from wherever the handover stands. Whatever fails before systemd takes the host down is rolled back.
    After that nothing is: where reboot(2) fails, systemd goes on to an ordinary reboot, and nothing arrives.
    """
    with open_request(options, from_profile, now=now, load_only=load_only, hold=hold) as (request, fds):
        if dry_run:
            _show_plan(request, fds, as_json=as_json)
        if not yes and on_terminal():
            _ask_before_jump(request, fds)
        _run_operation(lambda khod: khod.call_method("Kexec", request, fds=fds), as_json=as_json, block=not no_block)


def _ask_before_jump(request: dict[str, Any], fds: tuple[int, ...]) -> None:
    """Ask somebody at the terminal before anything begins; never where it has begun: they may be frozen by now."""
    if "kernel" not in request:  # what is loaded was agreed to, and without anything loaded it is refused
        return
    with connect_client() as khod:
        found = khod.plan(_plan_parameters(request), fds)
    if not found.steps or found.steps[0].step != Step.prepare.value:
        return
    for item in found.checks:
        if item.result in render.FAILED_RESULTS:  # as khod would say it: nobody is asked about what cannot begin
            error = Unsupported if item.result is CheckResult.unsupported else Refused
            raise error(item.evidence, where=f"check {item.name}", remedy=item.remedy)
    layout.show_page(render.short_plan(found), err=True)
    if not ask_confirmation("Begin the handover?"):
        raise Refused("Not begun", remedy="Nothing was changed.")


@app.command()
def monitor(as_json: Json = False) -> None:
    """Print every change, one line each, until interrupted."""
    with connect_client() as khod:
        for event in khod.monitor():
            _print_answer(event, partial(render.render_event, event), as_json=as_json)
            sys.stdout.flush()


@app.command()
def wait(
    phase: Annotated[str, typer.Argument(metavar="PHASE", help="The phase to wait for, as status names it.")],
    as_json: Json = False,
) -> None:
    """Wait until the handover is in a phase.

    PHASE is one as status names it, such as idle or loaded. With --timeout it exits with 5 where that does not come.
    """
    wanted = next((known for known in Phase if phase in (known.value, render.phase_name(known))), None)
    if wanted is None:
        known = ", ".join(one.value for one in Phase)
        raise UsageError(f"There is no phase {phase!r}", where="PHASE", remedy=f"One of: {known}.")
    with connect_client() as khod:
        for event in khod.monitor():
            if event.phase is wanted:
                break
    _print_answer(event, partial(render.render_event, event), as_json=as_json)


@app.command()
def verify(as_json: Json = False) -> None:
    """Wait until this boot's verification is over.

    Exits with 7 where some state did not arrive.
    """
    with connect_client() as following, connect_client() as asking:
        for event in following.monitor():
            if event.phase not in (Phase.verifying, Phase.rolling_back):  # of a start that is not over yet
                break
        found = asking.status()
    _print_answer(found, partial(render.render_status, found), as_json=as_json)
    others = found.exit_code == Exit.refused  # what somebody else does now is no matter of this boot's verification
    raise typer.Exit(Exit.done if others else found.exit_code)


def _run_operation(
    begin: Callable[[Client], None], *, as_json: bool, block: bool = True, may_stop: bool = True
) -> None:
    """Begin what changes something, and show what happens until it is over."""
    try:
        found = (
            progress.run_with_progress(begin, Client.receive_status, quiet=as_json)
            if block
            else progress.begin_operation(begin)
        )
    except Detached as detached:
        if not may_stop or not _ask_to_stop(detached.phase):
            raise
        _run_operation(_abort_handover, as_json=as_json, may_stop=False)
        raise typer.Exit(Exit.failed) from None
    if found is None:
        _say_jumped(as_json=as_json)
    _print_answer(found, partial(render.render_status, found), as_json=as_json)


def _say_jumped(*, as_json: bool) -> NoReturn:
    said = "The host jumped. After the boot: khoctl status"
    if as_json:
        typer.echo(render.as_json({"phase": Phase.executing, "summary": said, "exit_code": Exit.done}))
    layout.show_page(said, err=True)
    raise typer.Exit(Exit.done)


def _abort_handover(khod: Client) -> None:
    khod.call_method("Abort", {"force": False})


def _ask_to_stop(phase: Phase | None) -> bool:
    """Ask whether khod is to stop what it goes on with; no where there is nobody to ask."""
    goes_on = f"Detached: the handover goes on{f' ({render.phase_name(phase)})' if phase else ''}. Abort it?"
    with suppress(KeyboardInterrupt):
        return on_terminal() and ask_confirmation(goes_on)
    return False
