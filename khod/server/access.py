# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who is asking and what it may do: root, the operators' group, the producers' group, everyone else."""

import asyncio
import contextvars
import enum
import grp
import logging
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from khod.abi.peercred import peer_credentials, peer_groups
from khod.config import Access
from khod.errors import Denied

CALLER: "contextvars.ContextVar[Caller]" = contextvars.ContextVar("CALLER")
"""Who makes the call that is being served."""
LOG = logging.getLogger(__name__)
DEFAULTS = (Access.group, Access.producers)
"""Groups that the package makes: where khod runs without it, root is enough."""
LOOKUP_WAIT_SECONDS = 2.0
"""How long a call waits for a lookup of the groups that is under way."""
RETRY_SECONDS = 30.0
"""A group that was not found is looked up again after so long, when somebody asks for it."""


class Standing(enum.Enum):
    """What a caller is by the kernel's word and [access] of the configuration."""

    other = "other"
    producer = "producer"
    operator = "operator"
    root = "root"


class Caller:
    """Who is at the other end, as the kernel noted at connect(2)."""

    def __init__(self, sock: socket.socket) -> None:
        self.pid, self.uid, self._gid = peer_credentials(sock)
        self._socket = sock
        self._known: dict[int, bool] = {}

    def is_in(self, gid: int | None) -> bool:
        """Tell whether it has a group: its primary one, or any of however many supplementary ones."""
        if gid is None or gid == self._gid:
            return gid is not None
        if gid not in self._known:  # not all of them are kept: there may be 65536
            try:
                self._known[gid] = gid in peer_groups(self._socket)
            except OSError:  # the connection has ended
                return False
        return self._known[gid]


class Groups:
    """The groups that [access] names, by number.

    The lookup may hang (LDAP), so it has a thread of its own, at the start and after each reload. Until it has
    ended a group counts as before, and one that is new counts for nobody.
    """

    def __init__(self, access: Callable[[], Access]) -> None:
        """Look up the groups of `access`, which is asked for anew each time."""
        self._access = access
        self._seen: Access | None = None
        self._looked_up_for: Access | None = None
        self._gids: dict[str, int | None] = {}
        self._thread: threading.Thread | None = None
        self._looked_up = asyncio.Event()
        self._asked_at = 0.0
        self._loop = asyncio.get_running_loop()
        self._changes = 0
        self._check_config()

    @property
    def count_changes(self) -> int:
        """How often somebody's standing may have changed, a reload that nobody has asked after yet included."""
        self._check_config()
        return self._changes

    def _check_config(self) -> None:
        """Note a configuration that is another one, and begin a lookup; one that hangs is not begun twice."""
        access = self._access()
        if access is not self._seen:
            self._seen = access
            self._changes += 1
        if access is not self._looked_up_for and self._thread is None:
            self._looked_up_for = access
            self._look_up([name for name in (access.group, access.producers) if name])

    def standing_of(self, caller: Caller) -> Standing:
        """Tell what a caller is now."""
        self._check_config()
        if caller.uid == 0:
            return Standing.root
        access = self._access()
        if access.group and caller.is_in(self._gids.get(access.group)):
            return Standing.operator
        if access.producers and caller.is_in(self._gids.get(access.producers)):
            return Standing.producer
        return Standing.other

    @property
    def is_pending(self) -> bool:
        """Whether somebody's standing may change soon."""
        return not self._looked_up.is_set()

    async def wait_lookup(self) -> None:
        """Wait for the lookup under way, not for ever."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LOOKUP_WAIT_SECONDS):
                await self._looked_up.wait()

    def refusal_error(self, caller: Caller, what: str, *, producers: bool = False) -> Denied:
        """Make the error for a caller that has not the right to do something."""
        access = self._access()
        named = [group for group in (access.group, access.producers if producers else "") if group]
        unknown = [group for group in named if self._gids.get(group) is None]
        if unknown and not self.is_pending and time.monotonic() - self._asked_at > RETRY_SECONDS:
            self._look_up(named)
        return Denied(
            f"User {caller.uid} may not {what}",
            where=f"process {caller.pid}",
            remedy=f"Run it as root{f' or join group {named[-1]}' if named else ''}.",
        )

    def _look_up(self, names: list[str]) -> None:
        self._looked_up.clear()
        self._asked_at = time.monotonic()
        self._thread = threading.Thread(target=self._run_lookup, args=(names,), name="groups", daemon=True)
        self._thread.start()

    def _run_lookup(self, names: list[str]) -> None:
        gids = {name: gid_of(name) for name in names}
        with suppress(RuntimeError):  # the event loop has ended meanwhile
            self._loop.call_soon_threadsafe(self._note_gids, gids)

    def _note_gids(self, gids: dict[str, int | None]) -> None:
        for name, gid in gids.items():
            if gid is None and name not in DEFAULTS and name not in self._gids:
                LOG.warning("[access] of the configuration names the group %r, which does not exist", name)
        self._gids |= gids
        self._changes += 1
        self._thread = None
        self._looked_up.set()
        self._check_config()  # there may have been a reload meanwhile


def gid_of(name: str) -> int | None:
    """Look a group up, which may take for ever; None where it is not known."""
    try:
        return grp.getgrnam(name).gr_gid
    except (KeyError, OSError):
        return None
