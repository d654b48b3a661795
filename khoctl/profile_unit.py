# SPDX-License-Identifier: LGPL-2.1-or-later
"""The unit of a profile: systemd starts it, and khoctl shows what khod tells meanwhile."""

import os
import selectors
import subprocess
import time
from contextlib import suppress

from khoctl.progress import ProgressView, drain_events, show_pending, too_long_error
from khoctl.session import Detached, call_timeout, connect_client
from khod.errors import (
    Exit,
    Failed,
    KhoError,
    NotRolledBack,
    Refused,
    Unreachable,
    Unsupported,
    UsageError,
    errno_text,
)
from khod.model import Phase
from khod.text import printable

ASK_SECONDS = 10.0
"""Seconds that systemd and the journal have to answer what was asked after the end of the unit."""
ERRORS: dict[int, type[KhoError]] = {
    Exit.usage: UsageError,
    Exit.refused: Refused,
    Exit.unsupported: Unsupported,
    Exit.unreachable: Unreachable,
    Exit.not_rolled_back: NotRolledBack,
}
"""The errors by the exit code of the unit's khoctl; any other code is that of Failed."""
PREFIX = "khoctl: "


def profile_unit(name: str) -> str:
    """Return the name of the unit that runs a profile; `-` and `.` need no escape in an instance's name."""
    return f"kho-handover@{name}.service"


def start_unit(unit: str) -> None:
    """Have systemd start a unit, and return at once; Failed if it does not."""
    with _start(unit, "--no-block") as starting:
        if starting.wait():
            raise _not_started_error(unit)


def start_and_follow(unit: str, *, quiet: bool) -> bool:
    """Have systemd start a unit, and show the handover's events until that has ended; return whether the host jumped.

    Raises the error in which the unit's khoctl ended, and Detached if the operator interrupts: the unit goes on.
    """
    earlier = _read_properties(unit).get("InvocationID", "")
    limit = call_timeout()
    ends = None if limit is None else time.monotonic() + limit
    with connect_client() as watcher, ProgressView(quiet=quiet) as shown, selectors.DefaultSelector() as selector:
        watcher.call_method("Monitor", more=True)
        shown.show_event(watcher.receive_event())
        starting = _start(unit)
        ended = os.pidfd_open(starting.pid)
        try:
            selector.register(watcher, selectors.EVENT_READ)
            selector.register(ended, selectors.EVENT_READ)
            while starting.poll() is None:
                if not (found := selector.select(None if ends is None else max(0.0, ends - time.monotonic()))):
                    raise too_long_error()
                ready = [key.fileobj for key, _events in found]
                if watcher in ready and not show_pending(watcher, shown):
                    selector.unregister(watcher)
        except KeyboardInterrupt:
            raise Detached(shown.last) from None
        finally:
            starting.terminate()  # after an error or an interrupt; it only waits for the unit, which goes on
            os.close(ended)
        drain_events(watcher, shown, _ask_phase())
        if starting.returncode:
            raise _describe_failure(unit, earlier)
        return shown.last is Phase.executing


def _ask_phase() -> Phase | None:
    """Return the phase in which khod is, None if it does not answer: the host has jumped, or is about to."""
    with suppress(KhoError), connect_client() as asking:
        return asking.status().phase
    return None


def _start(unit: str, *options: str) -> "subprocess.Popen[bytes]":
    """Run systemctl in a session of its own: an interrupt and a lost terminal are for khoctl alone."""
    try:
        return subprocess.Popen(  # noqa: S603 - the name of a profile was checked
            ["systemctl", "start", *options, unit],  # noqa: S607 - as journalctl: the operator's PATH
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        raise Unsupported(
            f"systemctl cannot be started: {errno_text(error)}",
            where=unit,
            remedy="A profile runs in a unit of systemd. One without commands runs with: khoctl kexec --profile NAME",
        ) from None


def _describe_failure(unit: str, earlier: str) -> KhoError:
    """Return the error in which the unit's khoctl has ended, with its last line; `earlier` is the run before this."""
    values = _read_properties(unit)
    code, run = values.get("ExecMainStatus", "0"), values.get("InvocationID", "")
    if code in ("", "0") or run == earlier:
        return _not_started_error(unit)
    command = ["journalctl", "--quiet", "--no-pager", "--output=cat", f"--unit={unit}", f"_SYSTEMD_INVOCATION_ID={run}"]
    own = [line.removeprefix(PREFIX) for line in _ask(command).splitlines() if line.startswith(PREFIX)]
    error = ERRORS.get(int(code) if code.isdecimal() else 0, Failed)
    what = printable(own[-1]) if own else f"The unit has failed with status {printable(code)}"
    return error(what.rstrip("."), where=unit, remedy=f"All of it: journalctl -u {unit}")


def _read_properties(unit: str) -> dict[str, str]:
    """Return how the last run of the unit has ended, and its id; {} if systemd does not say."""
    said = _ask(["systemctl", "show", "--property=ExecMainStatus,InvocationID", unit])
    return dict(line.partition("=")[::2] for line in said.splitlines())


def _not_started_error(unit: str) -> KhoError:
    return Failed("systemd has not started the unit", where=unit, remedy=f"Look at: systemctl status {unit}")


def is_stopping() -> bool:
    """Whether systemd shuts the host down; False if it does not say."""
    return _ask(["systemctl", "is-system-running"]).strip() == "stopping"


def _ask(command: list[str]) -> str:
    """Return what a command prints, "" if it cannot be run."""
    try:
        ended = subprocess.run(  # noqa: S603 - as in _start
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=ASK_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ended.stdout.decode(errors="replace")
