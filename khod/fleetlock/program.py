# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod-fleetlock: get, confirm and release this host's lock, see khod-fleetlock(8).

khod runs `lock`, `check` and `settle` as it runs the commands of a hook; khod-fleetlock@settle.service runs `settle` at
every start of the host.
"""

import argparse
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from khod import wire
from khod.client.handover import Client
from khod.errors import Degraded, Failed, KhoError, Refused
from khod.fleetlock.server import LOCK, UNLOCK, FleetLockServer, NotGranted
from khod.fleetlock.settings import FleetLockSettings, load_settings, node_id
from khod.model import Phase, Status

SETTLE_UNIT = "khod-fleetlock@settle.service"
MANAGED = Path("/run/systemd/system")
"""The directory is there where systemd manages the host; see sd_booted(3)."""
STEADY = (Phase.idle, Phase.verified)
ENDED = (Phase.degraded, Phase.cold_boot)
HOST_KEEPS = "This host keeps its lock, and no other host is let in its place"


class HostLock:
    """The lock of one host. `pause` waits between two requests, for seconds."""

    def __init__(self, settings: FleetLockSettings, node: str, pause: Callable[[float], None] = time.sleep) -> None:
        self._settings = settings
        self._server = FleetLockServer(settings, node)
        self._whose = f"node {node}, group {settings.group}"
        self._pause = pause

    def lock(self) -> str:
        """Get the lock, by the deadline of the settings; Refused or Failed without it.

        A release of the lock that SETTLE_UNIT still tries would take it away again: that ends first.
        """
        self._request(LOCK, "The lock was not obtained", self._settings.deadline)
        return f"The lock is held ({self._whose})."

    def check(self) -> str:
        """Confirm that the lock is held; where the server says no, that is final."""
        lost = "The lock is not held any more"
        self._request(LOCK, lost, self._settings.deadline, denial_is_final=True)
        return f"The lock is still held ({self._whose})."

    def unlock(self, *, once: bool = False, require: Callable[[], None] = lambda: None) -> str:
        """Release the lock, whether it is held or not; with `once` a request that fails is not repeated.

        `require` is called before each request, and raises what speaks against it.
        """
        deadline = 0.0 if once else self._settings.deadline
        self._request(UNLOCK, "The lock was not released", deadline, require=require)
        return f"The lock is released ({self._whose})."

    def settle(self, ask: Callable[[], Status], *, rolled_back: bool = False) -> str:
        """Release the lock if the host is in its steady state; Degraded if it keeps the lock after a bad handover.

        Failed while a handover is under way, or where khod has not put everything back. `ask` is called before each
        request: a handover may have begun since. With `rolled_back` khod is at the end of a rollback, which waits: one
        request is sent.
        """
        return self.unlock(once=rolled_back, require=lambda: self._require_steady(ask(), rolled_back=rolled_back))

    def _require_steady(self, status: Status, *, rolled_back: bool) -> None:
        if status.outcome in ENDED and status.outcome.value in self._settings.keep_after:
            raise Degraded(
                f"{HOST_KEEPS}: {status.summary or status.outcome.value}",
                where=self._settings.url,
                remedy="Look at it with: khoctl status. Then release the lock: khod-fleetlock unlock",
            )
        if status.phase not in (*STEADY, *ENDED) and not rolled_back:
            raise Failed(
                f"{HOST_KEEPS}: khod is not in its steady state, but {status.phase.value}",
                where=self._settings.url,
                remedy="Look at it with: khoctl status",
            )

    def _request(
        self,
        endpoint: str,
        failed: str,
        seconds: float,
        *,
        denial_is_final: bool = False,
        require: Callable[[], None] = lambda: None,
    ) -> None:
        """Send a request until the server says yes, at most for `seconds` after the first one.

        The pauses grow, and have a random part, so that hosts that were refused together do not return together.
        """
        began, longest, requests = time.monotonic(), self._settings.backoff, 0
        while True:
            requests += 1
            require()
            try:
                return self._server.send_request(endpoint)
            except NotGranted as error:
                left = began + seconds - time.monotonic()
                if error.final or left <= 0 or (denial_is_final and error.denied):
                    raise self._describe(failed, error, requests) from None
                # Only the last line is the reason of a veto; the others are for the journal.
                sys.stderr.write(f"{self._settings.url}: {error}; the request is repeated.\n")
            self._pause(min(left, longest * random.uniform(0.5, 1.0)))  # noqa: S311 - no secret
            longest = min(2 * longest, self._settings.backoff_max)

    def _describe(self, failed: str, error: NotGranted, requests: int) -> KhoError:
        kind = Refused if error.denied else Failed
        many = f"{requests} requests, " if requests > 1 else ""
        remedy = f"Look at the server, or try again later ({many}{self._whose})."
        return kind(f"{failed}: {error}", where=self._settings.url, remedy=remedy)


def main(arguments: Sequence[str] | None = None) -> int:
    """Get, confirm or release the lock that a FleetLock server has for this host."""
    parser = argparse.ArgumentParser(prog="khod-fleetlock", description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--root", type=Path, default=Path("/"), help="where etc/ is (default: /)")
        if name == "settle":
            command.add_argument("--socket", type=Path, default=Path(wire.SOCKET), help="khod's socket")
            rolled_back = (
                f"khod is at the end of a rollback: send one request; if the lock is kept, start {SETTLE_UNIT}"
            )
            command.add_argument("--rolled-back", action="store_true", help=rolled_back)
    found = parser.parse_args(arguments)
    try:
        print(_run(found, load_settings(found.root)))  # noqa: T201 - a program's output
    except KhoError as error:
        sys.stderr.write(f"{error}\n")
        return int(error.exit)
    return 0


COMMANDS = {
    "lock": "get the lock, or confirm that it is held",
    "check": "confirm that the lock is held, and take no for an answer",
    "unlock": "release the lock",
    "settle": "release the lock if this host is in its steady state",
}


def _run(found: argparse.Namespace, settings: FleetLockSettings) -> str:
    lock = HostLock(settings, node_id(settings, found.root))
    is_managed = found.root == Path("/") and MANAGED.is_dir()
    if found.command == "lock":
        if is_managed:
            subprocess.run(["systemctl", "stop", SETTLE_UNIT], check=False)  # noqa: S603, S607
        return lock.lock()
    if found.command == "check":
        return lock.check()
    if found.command == "unlock":
        return lock.unlock()

    def ask() -> Status:
        with Client(found.socket, patience=settings.timeout) as client:
            return client.status()

    try:
        return lock.settle(ask, rolled_back=found.rolled_back)
    except KhoError:
        if found.rolled_back and is_managed:
            subprocess.run(["systemctl", "--no-block", "restart", SETTLE_UNIT], check=False)  # noqa: S603, S607
        raise
