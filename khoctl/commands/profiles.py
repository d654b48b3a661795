# SPDX-License-Identifier: LGPL-2.1-or-later
"""Handovers by a profile: `handover` has systemd start the profile's unit, the other commands are what units run."""

import os
from contextlib import suppress
from typing import Annotated

import typer

from khoctl import layout, profile_hooks, render
from khoctl.candidates import complete_profiles
from khoctl.commands.handover import IgnoreWindow, NoBlock, ask_before_jump, begin_kexec, say_jumped
from khoctl.follow import ENDED, Follower
from khoctl.next_kernel import NextKernelOptions
from khoctl.profile import list_profiles, load_profile, profile_directory
from khoctl.profile_unit import is_stopping, profile_unit, start_and_follow, start_unit
from khoctl.request import open_request
from khoctl.session import Json, call_timeout, connect_client, on_terminal, say_slow, show_answer, socket_path
from khoctl.status_page import render_status
from khod.client.profiles import ProfileClient
from khod.errors import Failed, KhoError, Refused, Unreachable, UsageError
from khod.model import Phase, Status

app = typer.Typer(rich_markup_mode=None)
Name = Annotated[str, typer.Argument(metavar="NAME", help="The profile.", show_default=False)]
OptionalName = Annotated[
    str | None,
    typer.Argument(
        metavar="[NAME]",
        help="The profile; not needed where there is one.",
        show_default=False,
        autocompletion=complete_profiles,
    ),
]
UNKNOWN_USER = "an unknown user"
"""Who asks for a unit that systemd was told to start: it does not say for whom."""
UNDER_WAY = frozenset(Phase) - ENDED
TICK_SECONDS = 1.0
"""How often it is looked whether the host is shut down, while khod is away."""


@app.command()
def handover(
    name: OptionalName = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Begin without a question on a terminal.")] = False,
    ignore_window: IgnoreWindow = False,
    no_block: NoBlock = False,
    as_json: Json = False,
) -> None:
    """Hand over as a profile says, in a unit of its own.

    The unit is kho-handover@NAME.service: it goes on if khoctl ends, or its terminal is lost. Without NAME it is the
    only profile in /etc/kho/handover.d. Exits as kexec, with 2 where there are several, with 3 where the window of the
    profile is closed.
    """
    profile = load_profile(_only_profile() if name is None else name)
    terms = profile.make_terms(enforce=True, ignore_window=ignore_window)
    with open_request(NextKernelOptions(), profile, now=False, load_only=False, hold=False, terms=terms) as asked:
        if not yes and on_terminal():  # the files are opened again by the unit, which runs when this has ended
            ask_before_jump(*asked)
    _announce_run(profile.name, ignore_window=ignore_window)
    unit = profile_unit(profile.name)
    try:
        if no_block:
            start_unit(unit)
            show_answer({"unit": unit}, lambda: f"{unit} is started. To follow: khoctl monitor", as_json=as_json)
            return
        jumped = start_and_follow(unit, quiet=as_json)
    except KhoError:
        with suppress(KhoError), _connect() as khod:  # of a unit that did not start
            khod.take_announcement(profile.name)
        raise
    if jumped:
        say_jumped(as_json=as_json)
    with connect_client() as khod:
        found = khod.status()
    show_answer(found, lambda: render_status(found), as_json=as_json)


def _connect() -> ProfileClient:
    return ProfileClient(socket_path(), patience=call_timeout(), on_slow=say_slow)


def _only_profile() -> str:
    """Return the name of the only profile; UsageError, with the list of them, if it is not the only one."""
    known = list_profiles()
    if len(known) == 1:
        return known[0]
    where = str(profile_directory())
    if not known:
        raise UsageError("There is no profile", where=where, remedy="Copy example.toml.sample there to NAME.toml.")
    raise UsageError("Name a profile", where=where, remedy=f"There are: {', '.join(known)}.")


def _announce_run(name: str, *, ignore_window: bool) -> None:
    """Tell khod who asks: systemd starts the unit, and that does not know it."""
    sudo_user = os.environ.get("SUDO_UID", "")
    with _connect() as khod:
        khod.announce(name, ignore_window=ignore_window, sudo_user=int(sudo_user) if sudo_user.isdecimal() else None)


@app.command("run-profile", hidden=True)
def run_profile(name: Name, ignore_window: IgnoreWindow = False) -> None:
    """Hand over as a profile says, with its hooks; kho-handover@NAME.service runs this."""
    profile = load_profile(name)
    with _connect() as khod:
        announced, status = khod.take_announcement(name), khod.status()
    ignore_window, asked_by = ignore_window or announced.ignore_window, announced.by or UNKNOWN_USER
    profile.make_terms(enforce=True, ignore_window=ignore_window)  # before anything is run
    profile.check_files(profile.options)
    if not profile.has_hooks:
        _hand_over(name, ignore_window=ignore_window, asked_by=asked_by)
        return
    if status.phase in UNDER_WAY:
        raise Refused(
            f"A handover is under way ({render.phase_name(status.phase)}); no command of the profile was run",
            where=f"profile {name}",
            remedy="Wait until it has ended: khoctl wait. To put it back: khoctl abort",
        )
    with profile_hooks.lock_runs():
        _run_due(name, status)
        pending = profile_hooks.keep_pending(profile, asked_by, status)
        try:
            profile_hooks.run_before(profile, asked_by)
            _hand_over(name, ignore_window=ignore_window, asked_by=asked_by)
        except KhoError as error:
            _end_here(pending, error)
            raise


def _run_due(name: str, status: Status) -> None:
    """Run what is still due after an earlier handover by this profile; Refused if that is not possible.

    It would be lost: what is due after this one is written in its place.
    """
    try:
        if pending := profile_hooks.read_pending(name):
            profile_hooks.run_after(profile_hooks.judge_status(pending, status), status)
    except Failed as error:
        raise Refused(error.what, where=error.where, remedy=error.remedy) from None


def _hand_over(name: str, *, ignore_window: bool, asked_by: str) -> None:
    """Have khod hand over, if the window is open still: the commands before may have taken their time."""
    profile = load_profile(name)
    terms = profile.make_terms(enforce=True, ignore_window=ignore_window, asked_by=asked_by)
    flags = dict.fromkeys(("now", "load_only", "hold"), False)
    with open_request(NextKernelOptions(), profile, **flags, terms=terms) as (request, fds):
        begin_kexec(request, fds, as_json=False)


def _end_here(pending: profile_hooks.Pending, error: KhoError) -> None:
    """Run what is due after a handover that has ended in this boot; one that may still go on is left to its unit."""
    try:
        with connect_client() as khod:
            status = khod.status()
    except Unreachable:
        return
    if status.phase in UNDER_WAY:
        return
    judged = profile_hooks.judge_error(pending, error, status)
    judged.write()
    try:
        profile_hooks.run_after(judged, status)
    except KhoError as failure:  # the handover's own error is what is reported
        layout.show_page(f"khoctl: {failure}", err=True)


@app.command("finish-profile", hidden=True)
def finish_profile(name: OptionalName = None) -> None:
    """Run what is due after the handover of a profile, or of every profile, once it has ended.

    kho-after@NAME.service runs this behind kho-handover@NAME.service, kho-after.service at every start of the host.
    """
    failed: KhoError | None = None
    for profile in profile_hooks.list_pending() if name is None else [name]:
        try:
            _finish_pending(profile)
        except KhoError as error:
            failed = failed or error
            if name is None:
                layout.show_page(f"khoctl: {error}", err=True)
    if failed is not None:
        raise failed


def _finish_pending(name: str) -> None:
    """Run what is due after a handover by one profile, once that has ended, and while nobody else runs commands."""
    if profile_hooks.read_pending(name) is None:
        return
    with profile_hooks.lock_runs(waits=True):
        # Read again: what was due may have been run meanwhile, or may be that of a later run.
        if pending := profile_hooks.read_pending(name):
            _run_when_ended(pending)


def _run_when_ended(pending: profile_hooks.Pending) -> None:
    with Follower() as follower:
        while not follower.has_ended:
            follower.wait_event(TICK_SECONDS)
            if follower.away_seconds is not None and is_stopping():
                return  # the host is in the jump, or shut down: at its next start
        follower.refresh_status()
        status = follower.status
    if is_stopping():  # whatever it is that the commands bring back, the host goes down
        layout.show_page(f"khoctl: The host is shut down; what is due after {pending.profile} stays due", err=True)
        return
    profile_hooks.run_after(profile_hooks.judge_status(pending, status), status)
