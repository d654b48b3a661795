# SPDX-License-Identifier: LGPL-2.1-or-later
"""The caller and its rights: root, the operators' group, the producers' group, everyone else."""

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
"""The caller of the call that is being served."""
ANSWERED: "contextvars.ContextVar[Standing]" = contextvars.ContextVar("ANSWERED")
"""The standing of those whose question is being answered: an operator's, or of one who is not an operator."""
LOG = logging.getLogger(__name__)
DEFAULTS = (Access.group, Access.producers)
"""Groups that the package creates; if khod runs without the package, root is enough."""
LOOKUP_WAIT_SECONDS = 2.0
"""How long a call waits for a running lookup of the groups."""
RETRY_SECONDS = 30.0
"""How long after a failed lookup a group is looked up again, when a caller needs it."""


class Standing(enum.Enum):
    """The rights of a caller, by the kernel's credentials and [access] of the configuration."""

    other = "other"
    producer = "producer"
    operator = "operator"
    root = "root"


class Caller:
    """The process at the other end, as the kernel recorded it at connect(2)."""

    def __init__(self, sock: socket.socket) -> None:
        self.pid, self.uid, self._gid = peer_credentials(sock)
        self._socket = sock
        self._known: dict[int, bool] = {}

    def is_in(self, gid: int | None) -> bool:
        """Whether it is in a group, by its primary or any of its supplementary groups."""
        if gid is None or gid == self._gid:
            return gid is not None
        if gid not in self._known:  # only the answers are kept: there may be 65536 groups
            try:
                self._known[gid] = gid in peer_groups(self._socket)
            except OSError:  # the connection has ended
                return False
        return self._known[gid]


class Groups:
    """The groups that [access] names, by number.

    A lookup may hang (LDAP), so it has a thread of its own, at the start and after each reload. Until it ends, known
    groups keep their numbers, and a new group has no members.
    """

    def __init__(self, access: Callable[[], Access]) -> None:
        """Look up the groups of `access`, which is called each time."""
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
        """How often the standing of callers may have changed, including by a reload that was not noticed yet."""
        self._check_config()
        return self._changes

    def _check_config(self) -> None:
        """Notice a changed configuration and start a lookup, unless one is running."""
        access = self._access()
        if access is not self._seen:
            self._seen = access
            self._changes += 1
        if access is not self._looked_up_for and self._thread is None:
            self._looked_up_for = access
            self._look_up([name for name in (access.group, access.producers) if name])

    def standing_of(self, caller: Caller) -> Standing:
        """Return the current standing of a caller."""
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
        """Whether the standing of callers may change soon."""
        return not self._looked_up.is_set()

    async def wait_lookup(self) -> None:
        """Wait for the running lookup, for at most LOOKUP_WAIT_SECONDS."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LOOKUP_WAIT_SECONDS):
                await self._looked_up.wait()

    def refusal_error(self, caller: Caller, what: str, *, producers: bool = False) -> Denied:
        """Return the error for a caller without the right to do `what`."""
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
    """Look up a group, which may block for ever; return None if it is not known."""
    try:
        return grp.getgrnam(name).gr_gid
    except (KeyError, OSError):
        return None
