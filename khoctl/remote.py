# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl on another host: `khoctl --host USER@HOST ...` runs khoctl there, by the operator's ssh and its configuration.

Commands that stay through a jump (`FOLLOWING`) run here, on khod's connection over ssh, which is made again after the
jump. After one that jumps (`JUMPING`) the handover is followed from here.
"""

import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import click

from khoctl.layout import show_page
from khoctl.session import HOST_KEY, INTERRUPTED, SOCKET_KEY, TIMEOUT_KEY, connect_client, is_colourless, on_terminal
from khod.errors import Denied, Exit, KhoError, Refused, Unreachable, Unsupported, UsageError
from khod.text import printable, shorten

SSH_FAILED, NO_COMMAND = 255, 127
"""ssh's own exit code, and that of a shell for a command that it does not find."""
CONNECT_SECONDS, ALIVE_SECONDS, ALIVE_COUNT = 10, 5, 3
"""When a connection is given up: a kernel that has jumped at once closes none of those it had."""
MAX_SAID_BYTES = 1 << 16
"""How much is kept of what ssh writes on standard error."""
MAX_PROBLEM = 300
FOLLOWING = frozenset(("monitor", "wait", "verify"))
JUMPING = frozenset(("kexec", "handover"))
STAYING = frozenset(("--load-only", "--no-block", "--dry-run", "--help", "-h"))
"""Options with which a command of JUMPING ends without a jump, or before it."""
VALUED = frozenset(("--socket", "--timeout"))
"""Options of every command that take a value."""
NAME_PATTERN = re.compile(r"[^\s'`\"$\\;&<>|(){}*?!#\x00-\x1f\x7f]+")
"""A destination of ssh: nothing that a shell would take, as that of a ProxyCommand."""
UNTOUCHED = "Nothing was changed there."


@dataclass(frozen=True)
class SshFailure:
    """A text by which ssh's own failure is known, what it means for the operator, and what to do next."""

    text: str
    error: type[KhoError]
    what: str
    remedy: str


FAILURES = (
    SshFailure(
        "REMOTE HOST IDENTIFICATION HAS CHANGED",
        Refused,
        "The host key of {host} is not the one that is known here",
        f"{UNTOUCHED} Another machine may answer in its place. Compare the key with the host's own "
        "(ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub there). If it is right: ssh-keygen -R {host}, ssh {host}",
    ),
    SshFailure(
        "Host key verification failed",
        Refused,
        "The host key of {host} is not known here",
        f"{UNTOUCHED} To compare it and to accept it: ssh {{host}}",
    ),
    SshFailure(
        "Permission denied",
        Denied,
        "{host} refuses the login",
        f"{UNTOUCHED} Without a terminal nobody can be asked for a password: use a key or an agent. To try: "
        "ssh {host} true",
    ),
    SshFailure(
        "Too many authentication failures",
        Denied,
        "{host} refuses the login",
        f"{UNTOUCHED} Name the key in ~/.ssh/config (IdentityFile, IdentitiesOnly). To try: ssh {{host}} true",
    ),
    *(
        SshFailure(text, Unreachable, "{host} cannot be reached", f"{UNTOUCHED} To try: ssh {{host}} true")
        for text in (
            "ssh: connect to host",
            "ssh: Could not resolve hostname",
            "kex_exchange_identification",
            "Connection timed out during banner exchange",
            "Unable to negotiate",
            "Bad configuration option",
            "Bad owner or permissions",
        )
    ),
)


def run_on_host(words: Sequence[str], run_here: Callable[[], Any]) -> Any:
    """Run a command line that may have `--host`; `run_here` runs it on this host. Return its exit code."""
    host, rest = split_host(words)
    if host is None:
        return run_here()
    command = _find_command(rest)
    if "--help" not in rest and (command in FOLLOWING or (command == "status" and "--watch" in rest)):
        return run_here()
    if command in JUMPING and not STAYING & set(rest):
        return _run_through_jump(host, rest)
    return _run_khoctl(host, rest)


def split_host(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the host of `--host`, None without it, and the other words; raise UsageError if it is no host."""
    hosts: list[str] = []
    rest: list[str] = []
    given = iter(words)
    for word in given:
        if word == "--":
            rest += [word, *given]
        elif word == "--host":
            hosts.append(next(given, ""))
        elif word.startswith("--host="):
            hosts.append(word.removeprefix("--host="))
        else:
            rest.append(word)
    if len(hosts) > 1:
        raise UsageError("Several hosts are named", where="--host", remedy="Name one; for more: khoctl fleet.")
    return (require_host(hosts[0]) if hosts else None), rest


def require_host(name: str) -> str:
    """Return a destination of ssh; raise UsageError for what ssh could take for an option, or that is none."""
    parts = (name, name.rpartition("@")[2], name.removeprefix("ssh://"))
    if not all(parts) or any(part.startswith("-") for part in parts) or not NAME_PATTERN.fullmatch(name):
        raise UsageError(f"{name!r} is not the name of a host", where="--host", remedy="Give USER@HOST or HOST.")
    return name


def ssh_command(
    host: str,
    words: Sequence[str],
    *,
    follows: bool = False,
    fresh: bool = False,
    batch: bool | None = None,
    connect_seconds: float | None = None,
) -> list[str]:
    """Return the command that runs khoctl with `words` on `host`, each word quoted for the shell there.

    Without `follows` it has a terminal there if it has one here. `batch` is that nobody can be asked for a password
    (None: unless there is a terminal), `fresh` that no connection of a ControlMaster is used, `connect_seconds` how
    long a connection may take (None: as ssh is configured).
    """
    options = ["LogLevel=ERROR", f"ServerAliveInterval={ALIVE_SECONDS}", f"ServerAliveCountMax={ALIVE_COUNT}"]
    if fresh or (not on_terminal() if batch is None else batch):
        options.append("BatchMode=yes")
    if fresh:
        options += ["ControlMaster=no", "ControlPath=none"]
    if limit := CONNECT_SECONDS if fresh else connect_seconds:
        options.append(f"ConnectTimeout={math.ceil(limit)}")
    terminal = not follows and sys.stdin.isatty() and sys.stdout.isatty()
    plain = ["env", "NO_COLOR=1"] if is_colourless() else []
    return [
        "ssh",
        *(part for option in options for part in ("-o", option)),
        "-t" if terminal else "-T",
        "--",
        host,
        shlex.join([*plain, "khoctl", *words]),
    ]


def start_ssh(command: Sequence[str], stream: int | None = None) -> "subprocess.Popen[bytes]":
    """Start ssh with standard input and output on `stream` (None: as they are here), and standard error on a pipe."""
    try:
        return subprocess.Popen(command, stdin=stream, stdout=stream, stderr=subprocess.PIPE)  # noqa: S603 - no shell here
    except OSError as error:
        raise Unreachable(f"ssh cannot be started: {error.strerror}", remedy="Install openssh-client.") from None


def explain_failure(host: str, code: int, said: str) -> KhoError:
    """Return the error for an exit code of ssh that is not khoctl's; `said` is what ssh wrote on standard error."""
    if code == NO_COMMAND:
        return Unsupported(f"khoctl is not installed on {host}", remedy=f"{UNTOUCHED} Install the package khod there.")
    problem = last_line(said)
    last = f": {problem}" if problem else ""
    for known in FAILURES:
        if known.text in said:
            return known.error(
                f"{known.what.format(host=host)}{last}".rstrip("."), remedy=known.remedy.format(host=host)
            )
    if code not in (SSH_FAILED, 0) and code > 0:
        return Unreachable(f"khoctl on {host} ended with {code}{last}".rstrip("."))
    return Unreachable(
        f"The connection to {host} has ended{last}".rstrip("."),
        remedy=f"What has begun there goes on. To see: khoctl --host {host} status",
    )


def last_line(said: str) -> str:
    """Return the last line of what ssh, or khoctl there, wrote on standard error; it is fit for a terminal."""
    return shorten(printable(said.strip().rpartition("\n")[2].strip()), MAX_PROBLEM)


def _find_command(words: Sequence[str]) -> str:
    """Return khoctl's command among the words, "" without one."""
    given = iter(words)
    for word in given:
        if word in VALUED:
            next(given, None)
        elif not word.startswith("-"):
            return word
    return ""


def _run_khoctl(host: str, words: Sequence[str]) -> int:
    """Run khoctl there and return its exit code; raise what `explain_failure` makes of ssh's own."""
    process = start_ssh(ssh_command(host, words, connect_seconds=_find_seconds(words)))
    said = bytearray()
    reading = threading.Thread(target=_pass_on, args=(process, said), daemon=True)
    reading.start()
    ends = (signal.SIGTERM, signal.SIGHUP)
    former = [signal.signal(number, lambda *_: process.terminate()) for number in ends]
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.terminate()
        show_page(f"khoctl: What has begun on {host} goes on. To see: khoctl --host {host} status", err=True)
        raise SystemExit(INTERRUPTED) from None
    finally:
        for number, handler in zip(ends, former, strict=True):
            signal.signal(number, handler)
    reading.join(1.0)  # a ControlMaster in the background may keep standard error open
    if code in (SSH_FAILED, NO_COMMAND) or code < 0:
        raise explain_failure(host, code, said.decode(errors="backslashreplace"))
    return code


def _pass_on(process: "subprocess.Popen[bytes]", said: bytearray) -> None:
    """Copy standard error of ssh to our own, and keep the end of it."""
    assert process.stderr is not None
    while data := os.read(process.stderr.fileno(), 1 << 16):
        with suppress(OSError):
            sys.stderr.flush()
            os.write(2, data)
        said += data
        del said[:-MAX_SAID_BYTES]


def _run_through_jump(host: str, words: Sequence[str]) -> int:
    """Run a command that may jump, and follow the handover after it to the verdict; return the exit code."""
    from khoctl.commands.watching import follow_jump  # noqa: PLC0415 - only here

    with _make_context(host, words):
        with connect_client() as asking:
            before = asking.status()
        try:
            code = _run_khoctl(host, words)
        except Unreachable as error:
            code = int(Exit.unreachable)
            show_page(f"khoctl: {error.what}. It is made again.", err=True)
        if code not in (Exit.done, Exit.unreachable):
            return code
        return follow_jump(before, code, as_json="--json" in words)


def _make_context(host: str, words: Sequence[str]) -> click.Context:
    """Return a context with the options of every command that are among the words."""
    context = click.Context(click.Command("khoctl"), info_name="khoctl")
    context.meta[HOST_KEY] = host
    if socket := _find_value(words, "--socket"):
        context.meta[SOCKET_KEY] = socket
    if seconds := _find_seconds(words):
        context.meta[TIMEOUT_KEY] = seconds
    return context


def _find_value(words: Sequence[str], option: str) -> str:
    """Return the value of an option of every command, "" without it."""
    values = dict(zip(words, [*words[1:], ""], strict=True))
    values |= dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
    return values.get(option, "")


def _find_seconds(words: Sequence[str]) -> float | None:
    """Return the value of --timeout, None without one that khoctl accepts."""
    with suppress(ValueError):
        seconds = float(_find_value(words, "--timeout"))
        return seconds if 0 < seconds < math.inf else None
    return None
