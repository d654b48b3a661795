# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands of a handover, from check to verify; each calls khod, and its exit codes are `khod.errors.Exit`."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from khoctl import layout, progress, render
from khoctl.candidates import complete_profiles
from khoctl.next_kernel import NextKernelOptions
from khoctl.option_sets import spread_options
from khoctl.request import open_request
from khoctl.session import Detached, Json, ask_confirmation, connect_client, on_terminal, show_answer
from khoctl.status_page import render_status
from khod.client.handover import Client
from khod.errors import Exit, Refused, Unreachable, Unsupported, UsageError
from khod.model import Check, CheckResult, Phase, Step

if TYPE_CHECKING:
    from khoctl.profile import Profile

app = typer.Typer(rich_markup_mode=None)
KERNEL_FILES = {
    "sys/kernel/kho/active": ("not in the active phase", "in the active phase, the producers may be frozen"),
    "sys/kernel/kexec_loaded": ("no image is loaded", "an image is loaded"),
}
"""Files that every user may read, and the meaning of 0 and 1 in them; the first exists on KHO v3 only."""


LoadOnly = Annotated[bool, typer.Option("--load-only", help="Stop when the image is loaded.")]
Now = Annotated[
    bool,
    typer.Option(
        "--now",
        help="Sync the disks and jump at once. Without it the rest of the host is stopped before the producers.",
    ),
]
NoBlock = Annotated[bool, typer.Option("--no-block", help="Return when it has begun; it continues in the background.")]
FromProfile = Annotated[
    str | None,
    typer.Option(
        "--profile",
        metavar="NAME",
        help="Take all of this from /etc/kho/handover.d/NAME.toml.",
        autocompletion=complete_profiles,
    ),
]

IgnoreWindow = Annotated[
    bool, typer.Option("--ignore-window", help="Begin although the profile's window is closed; this is recorded.")
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
        from khoctl.commands.watching import watch_status  # noqa: PLC0415 - a status that is not watched needs none of it

        watch_status(as_json=as_json)
    try:
        with connect_client() as khod:
            found = khod.status()
    except Unreachable as error:
        raise Unreachable(
            error.what, where=error.where, remedy=". ".join(filter(None, (error.remedy, kernel_says())))
        ) from None
    show_answer(found, partial(render_status, found), as_json=as_json)
    raise typer.Exit(found.exit_code)


def kernel_says(root: Path = Path("/")) -> str:
    """Return what can be read of a handover without khod, as a sentence; "" if the kernel shows nothing."""
    said = []
    for path, texts in KERNEL_FILES.items():
        with suppress(OSError, ValueError):
            said.append(f"{texts[int((root / path).read_text())]} (/{path})")
    return f"The kernel itself says: {', '.join(said)}." if said else ""


@app.command()
@spread_options
def check(
    options: NextKernelOptions,
    now: Annotated[bool, typer.Option("--now", help="Check for a jump at once, which stops nothing before.")] = False,
    from_profile: FromProfile = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 3 for a warning, too.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Leave out what passed or was skipped.")] = False,
    ignore_window: IgnoreWindow = False,
    as_json: Json = False,
) -> None:
    """Run the preflight checks and touch nothing.

    With a kernel given, those of the next kernel run too. Exits with 3 where one fails, with 4 where KHO is not there.
    """
    profile = _load_profile(from_profile)
    terms = profile.make_terms(enforce=False, ignore_window=ignore_window) if profile else None
    with open_request(options, profile, now=now, terms=terms) as (request, fds), connect_client() as khod:
        found = [*khod.check(request, fds), *_check_window(profile, ignored=ignore_window)]
    show_answer(found, partial(render.render_checks, found, quiet=quiet), as_json=as_json)
    warned = strict and any(item.result is CheckResult.warn for item in found)
    raise typer.Exit(_exit_code(found) or (Exit.refused if warned else Exit.done))


@app.command()
@spread_options
def plan(
    options: NextKernelOptions,
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[PROFILE]",
            help="The profile whose handover is planned.",
            show_default=False,
            autocompletion=complete_profiles,
        ),
    ] = None,
    load_only: LoadOnly = False,
    now: Now = False,
    from_profile: FromProfile = None,
    ignore_window: IgnoreWindow = False,
    as_json: Json = False,
) -> None:
    """Print what a handover would do, and touch nothing.

    Each step has its undo beside it, and of a profile stands what it adds: its window, budget, hooks and policy. Exits
    as check, and with 3 where the profile's window is closed.
    """
    if name is not None and from_profile not in (None, name):
        raise UsageError("Two profiles are named", where=f"{name}, --profile {from_profile}", remedy="Name one.")
    profile = _load_profile(from_profile if name is None else name)
    terms = profile.make_terms(enforce=False, ignore_window=ignore_window) if profile else None
    with open_request(options, profile, now=now, load_only=load_only, terms=terms) as (request, fds):
        show_plan(request, fds, profile, ignore_window=ignore_window, as_json=as_json)


def _load_profile(name: str | None) -> "Profile | None":
    if name is None:
        return None
    from khoctl.profile import load_profile  # noqa: PLC0415 - without a profile nothing of it is needed

    return load_profile(name)


def _check_window(profile: "Profile | None", *, ignored: bool) -> list[Check]:
    if profile is None:
        return []
    from khoctl.profile_page import check_window  # noqa: PLC0415 - as in _load_profile

    return check_window(profile, ignored=ignored)


def show_plan(
    request: dict[str, Any],
    fds: tuple[int, ...],
    profile: "Profile | None",
    *,
    ignore_window: bool = False,
    as_json: bool,
) -> NoReturn:
    """Print the plan of a request, with what its profile adds, and exit as check does."""
    with connect_client() as khod:
        found = khod.plan(_plan_parameters(request), fds)
    if profile is None:
        show_answer(found, partial(render.render_plan, found), as_json=as_json)
    else:
        from khoctl import profile_page  # noqa: PLC0415 - as in _load_profile

        found = replace(found, checks=[*found.checks, *_check_window(profile, ignored=ignore_window)])
        rows = profile_page.list_profile_rows(profile)
        answer = profile_page.join_plan(found, profile) if as_json else found
        show_answer(answer, lambda: render.render_plan(found, rows), as_json=as_json)
    raise typer.Exit(_exit_code(found.checks))


def _plan_parameters(request: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of a Kexec request that Plan accepts."""
    return {name: value for name, value in request.items() if name != "hold"}


def _exit_code(found: list[Check]) -> Exit:
    results = {item.result for item in found}
    if CheckResult.unsupported in results:
        return Exit.unsupported
    return Exit.refused if CheckResult.fail in results else Exit.done


@app.command()
def activate(no_block: NoBlock = False, as_json: Json = False) -> None:
    """Freeze the producers and serialize the kernel's state.

    The next command is `khoctl kexec`, or `khoctl abort`.
    """
    _run_operation(lambda khod: khod.call_method("Activate"), as_json=as_json, block=not no_block)


@app.command()
def abort(
    force: Annotated[bool, typer.Option("--force", help="Also put back what khod did not do.")] = False,
    no_block: NoBlock = False,
    as_json: Json = False,
) -> None:
    """Put everything back and thaw the producers.

    It unloads the image, leaves the active phase, and thaws and cancels every producer.
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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what `khoctl plan` prints.")] = False,
    no_block: NoBlock = False,
    hold: Annotated[bool, typer.Option("--hold", help="Stay where a failure happens instead of rolling back.")] = False,
    from_profile: FromProfile = None,
    ignore_window: IgnoreWindow = False,
    as_json: Json = False,
) -> None:
    """Do what is left of the handover and jump.

    It continues from the phase the handover is in. A failure before systemd takes the host down is rolled back. After
    that nothing is rolled back: where reboot(2) fails, systemd continues with an ordinary reboot, and no state arrives.
    """
    profile = _load_profile(from_profile)
    if profile is not None and profile.has_hooks and not dry_run:
        raise UsageError(
            f"Profile {profile.name} has hooks, which run in its unit",
            where="--profile",
            remedy=f"khoctl handover {profile.name}",
        )
    terms = profile.make_terms(enforce=not dry_run, ignore_window=ignore_window) if profile else None
    with open_request(options, profile, now=now, load_only=load_only, hold=hold, terms=terms) as (request, fds):
        if dry_run:
            show_plan(request, fds, profile, ignore_window=ignore_window, as_json=as_json)
        if not yes and on_terminal():
            ask_before_jump(request, fds)
        begin_kexec(request, fds, as_json=as_json, block=not no_block)


def begin_kexec(request: dict[str, Any], fds: tuple[int, ...], *, as_json: bool, block: bool = True) -> None:
    """Have khod hand over, and show its progress until the answer; typer.Exit if the host has jumped."""
    _run_operation(lambda khod: khod.call_method("Kexec", request, fds=fds), as_json=as_json, block=block)


def ask_before_jump(request: dict[str, Any], fds: tuple[int, ...]) -> None:
    """Ask for confirmation before anything begins.

    There is no question if the handover has begun: the producers may be frozen by now.
    """
    if "kernel" not in request:  # a loaded image was confirmed before; without one, khod refuses the call
        return
    with connect_client() as khod:
        found = khod.plan(_plan_parameters(request), fds)
    if not found.steps or found.steps[0].step != Step.prepare.value:
        return
    for item in found.checks:
        if item.result in render.FAILED_RESULTS:  # with khod's words: what cannot begin needs no confirmation
            error = Unsupported if item.result is CheckResult.unsupported else Refused
            raise error(item.evidence, where=f"check {item.name}", remedy=item.remedy)
    layout.show_page(render.short_plan(found), err=True)
    if not ask_confirmation("Begin the handover?"):
        raise Refused("Not begun", remedy="Nothing was changed.")


def _run_operation(
    begin: Callable[[Client], None], *, as_json: bool, block: bool = True, may_stop: bool = True
) -> None:
    """Begin an operation, and show its progress until it is over."""
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
        say_jumped(as_json=as_json)
    show_answer(found, partial(render_status, found), as_json=as_json)


def say_jumped(*, as_json: bool) -> NoReturn:
    """Print that the host has jumped, and exit with 0."""
    said = "The host jumped. After the boot: khoctl status"
    if as_json:
        typer.echo(render.as_json({"phase": Phase.executing, "summary": said, "exit_code": Exit.done}))
    layout.show_page(said, err=True)
    raise typer.Exit(Exit.done)


def _abort_handover(khod: Client) -> None:
    khod.call_method("Abort", {"force": False})


def _ask_to_stop(phase: Phase | None) -> bool:
    """Ask whether khod should stop the operation it continues; False if no person can be asked."""
    goes_on = f"Detached: the handover goes on{f' ({render.phase_name(phase)})' if phase else ''}. Abort it?"
    with suppress(KeyboardInterrupt):
        return on_terminal() and ask_confirmation(goes_on)
    return False
