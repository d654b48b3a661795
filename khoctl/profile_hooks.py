# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands of a profile before and after its handover.

What is to run after it is written down before the first command runs: whatever ends the handover or khoctl, also in
another boot, somebody finds it there.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from khoctl.layout import show_page
from khoctl.profile import PATH, Command, HookCommands, Profile
from khod.errors import Exit, Failed, KhoError, Refused, errno_text
from khod.model import Phase, Status
from khod.text import one_line, printable
from khod.values import ANY_FIELD, decode_value, encode_value

STATE = Path("/var/lib/kho-profiles")
ENVIRONMENT = "STATE_DIRECTORY"
"""The variable of systemd.exec(5) that names another directory than STATE."""
TAIL_BYTES = 64 << 10
"""Bytes of a command's standard error that are shown, from its end."""
PIPE_SECONDS = 1.0
"""Seconds that what a command has left behind may keep its standard error open."""
REFUSED, ROLLED_BACK = "refused", "rolled_back"
"""Verdicts that are not phases: nothing was begun, and everything was put back."""


@dataclass(frozen=True)
class Pending:
    """The commands that are due after a handover.

    `boot_id` is the boot in which they became due, `arrived_run` the handover that had led to it, and `earlier_run` the
    last one that had begun. `verdict` is how the handover ended, "" while that is not known, with the exit code and the
    reason.
    """

    profile: str
    asked_by: str
    boot_id: str
    arrived_run: str
    commands: list[list[str]]
    seconds: float
    earlier_run: str = ""
    verdict: str = ""
    exit_code: int = 0
    reason: str = ""
    run: str = ""

    @property
    def path(self) -> Path:
        """Where it is kept."""
        return state_directory() / f"{self.profile}.json"

    def write(self) -> None:
        """Keep it over the end of khoctl and of the host; Failed if that is not possible."""
        try:
            new = self.path.with_suffix(".new")
            with new.open("w") as file:
                json.dump(encode_value(self), file)
                file.flush()
                os.fsync(file.fileno())
            new.rename(self.path)
            directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            raise _unkept_error(self.path, error) from None

    def remove(self) -> None:
        """Forget it: nothing is due any more."""
        self.path.unlink(missing_ok=True)


def state_directory() -> Path:
    """Return where the commands are kept that are due."""
    return Path(os.environ.get(ENVIRONMENT) or STATE)


@contextmanager
def lock_runs(*, waits: bool = False) -> Iterator[None]:
    """Let nobody else run commands of a profile, or change what is due; Refused if somebody does, unless it `waits`.

    The kernel frees the lock where khoctl is killed.
    """
    directory = state_directory()
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _unkept_error(directory, error) from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise Refused(
            "The run of a profile is under way, or what is due after one",
            where=str(directory),
            remedy="Wait until it has ended: systemctl list-units 'kho-handover@*' 'kho-after*'",
        ) from None
    finally:
        os.close(fd)


def _unkept_error(path: Path, error: OSError) -> Failed:
    return Failed(
        f"The commands that are due after the handover cannot be kept: {errno_text(error)}",
        where=str(path),
        remedy="Free some space, or mount the file system writable. Nothing was begun.",
    )


def list_pending() -> list[str]:
    """Return the names of the profiles with commands that are due."""
    return sorted(path.stem for path in state_directory().glob("*.json"))


def read_pending(profile: str) -> Pending | None:
    """Return what is due after the handover of a profile, None for nothing; Failed if that cannot be read."""
    path = state_directory() / f"{profile}.json"
    try:
        return decode_value(Pending, json.loads(path.read_bytes()), may_lack=ANY_FIELD, may_exceed=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise Failed(
            f"What is due after the handover of profile {printable(profile)} cannot be read: {error}",
            where=str(path),
            remedy="Run its commands by hand, then remove this file.",
        ) from None


def keep_pending(profile: Profile, asked_by: str, status: Status) -> Pending:
    """Write down what is due after the handover of this profile that is about to begin in this boot."""
    commands = [list(command) for command in profile.after.commands]
    boot = status.boot_id, status.arrived_run
    pending = Pending(profile.name, asked_by, *boot, commands, profile.after.seconds, status.run)
    pending.write()
    return pending


def run_before(profile: Profile, asked_by: str) -> None:
    """Run the commands before the handover, in their order; Refused at the first that fails."""
    for command in profile.before.commands:
        environment = {"KHO_NAME": profile.name, "KHO_VERB": "before", "KHO_ASKED_BY": asked_by}
        if why := run_command(command, profile.before, environment):
            raise Refused(
                f"{printable(command[0])}, which profile {profile.name} runs before its handover, {why}",
                where="hooks.before",
                remedy="Nothing was begun. Repair the cause, and try again.",
            )


def run_after(pending: Pending, status: Status) -> None:
    """Run the commands that are due, all of them, and forget them; Failed, and they stay due, if one fails."""
    environment = {
        "KHO_NAME": pending.profile,
        "KHO_VERB": "after",
        "KHO_ASKED_BY": pending.asked_by,
        "KHO_VERDICT": pending.verdict,
        "KHO_EXIT_CODE": str(pending.exit_code),
        "KHO_REASON": one_line(pending.reason),
        "KHO_RUN": pending.run,
        "KHO_RELEASE": status.kernel_release,
    }
    if pending.verdict in (Phase.verified.value, Phase.degraded.value) and status.blackout_seconds is not None:
        environment["KHO_BLACKOUT_SECONDS"] = f"{status.blackout_seconds:.6f}"
        environment["KHO_BLACKOUT_ERROR_SECONDS"] = f"{status.blackout_error_seconds:.6f}"
    hook = HookCommands(tuple(map(tuple, pending.commands)), pending.seconds)
    failed = [f"{command[0]} {why}" for command in hook.commands if (why := run_command(command, hook, environment))]
    if failed:
        raise Failed(
            f"After the handover of profile {pending.profile} ({pending.verdict}): {'; '.join(map(printable, failed))}",
            where="hooks.after",
            remedy=f"Repair the cause, then: systemctl start kho-after@{pending.profile}",
        )
    pending.remove()


def run_command(command: Command, hook: HookCommands, environment: Mapping[str, str]) -> str:
    """Run one command to its end; return why it failed, "" if it did not. At its deadline its session is killed."""
    show_page(f"khoctl: {environment['KHO_VERB']}: {' '.join(map(printable, command))}", err=True)
    try:
        process = subprocess.Popen(  # noqa: S603 - the operator's own command
            command,
            env={"PATH": PATH, **environment},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        return f"cannot be started: {errno_text(error) if isinstance(error, OSError) else error}"
    tail = bytearray()
    reading = threading.Thread(target=_keep_tail, args=(process, tail), daemon=True)
    reading.start()
    why = ""
    try:
        code = process.wait(hook.seconds)
    except subprocess.TimeoutExpired:
        why = f"did not end within {hook.seconds:g} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    reading.join(PIPE_SECONDS)  # what the command leaves behind may keep it open
    said = _show_errors(bytes(tail))
    if why or code == 0:
        return why
    ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
    return f"{ended}{f': {said}' if said else ''}"


def _keep_tail(process: "subprocess.Popen[bytes]", tail: bytearray) -> None:
    """Read the standard error of a command, and keep its end: a file with all of it could fill the host's memory."""
    assert process.stderr is not None
    while data := os.read(process.stderr.fileno(), TAIL_BYTES):
        tail += data
        del tail[:-TAIL_BYTES]


def _show_errors(tail: bytes) -> str:
    """Copy what a command wrote to its standard error to ours; return its last line."""
    lines = [line for line in tail.decode(errors="replace").splitlines() if line.strip()]
    for line in lines:
        show_page(printable(line), err=True)
    sys.stderr.flush()
    return one_line(lines[-1]) if lines else ""


def judge_error(pending: Pending, error: KhoError, status: Status) -> Pending:
    """Return what is due with the verdict on a handover that ended in this error, in the same boot."""
    return replace(
        pending,
        verdict=_judge_here(pending, status),
        exit_code=int(error.exit),
        reason=str(error),
        run="" if status.run == pending.earlier_run else status.run,
    )


def judge_status(pending: Pending, status: Status) -> Pending:
    """Return what is due with the verdict on its handover, which has ended; khoctl may have been killed meanwhile."""
    if pending.verdict:
        return pending
    if status.boot_id == pending.boot_id:
        verdict = _judge_here(pending, status)
        code = status.exit_code if verdict == Phase.failed.value else Exit.failed.value
    elif status.arrived_run != pending.arrived_run and status.outcome is not Phase.idle:
        verdict, code = status.outcome.value, status.exit_code
    else:  # the host was booted anew in the middle of it
        verdict, code = Phase.cold_boot.value, Exit.degraded.value
    run = "" if status.run == pending.earlier_run else status.run
    return replace(pending, verdict=verdict, exit_code=code, reason=status.last_error, run=run)


def _judge_here(pending: Pending, status: Status) -> str:
    """Return the verdict on a handover that has ended in the boot in which it was to begin."""
    if status.run == pending.earlier_run:
        return REFUSED
    return Phase.failed.value if status.phase is Phase.failed else ROLLED_BACK
