# SPDX-License-Identifier: LGPL-2.1-or-later
"""QMP sessions with a QEMU, each for a few commands.

This relies on the following behaviour of QEMU, all seen with 7.2, the second also read in its monitor/qmp.c:

- A QMP socket serves one client. The next one connects, and gets its greeting when the one before has left. A few
  clients may wait; for all others connect(2) returns EAGAIN.
- When a client leaves, its waiting commands are dropped. A command that is being carried out is finished before any
  request of a later client. So a client that connects after a cancelled `stop` gets its answer when that `stop` has had
  its effect, or never will have it.
- The answer to such a command is sent to the later client, before the answer to that client's qmp_capabilities.
- SO_PEERCRED names QEMU itself: QEMU calls listen(2) on its socket even if another process had bound it.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from khod.abi.peercred import peer_credentials
from khod.concurrency.bounded import settle_task
from khod.concurrency.sockets import connect_unix
from khod.dataclass import dataclass
from khod.text import one_line

if TYPE_CHECKING:
    from qemu.qmp import QMPClient

HANG_UP_SECONDS = 0.5
"""Seconds that QEMU may delay the end of a session; then the connection is shut down, which QEMU cannot delay."""

PAUSED_STATE = "paused"
RUNNING_STATES = frozenset({"running", "suspended"})
"""States that `stop` changes to `paused`, and `cont` changes back. Before QEMU 9.0 `stop` does not act on a suspended
VM."""
NotYet = Callable[[str, float | None], None]
"""Is told what is waited for, and how much is done (0 to 1, None if that is not known)."""


class VmError(Exception):
    """A VM cannot be handed over, or QEMU refuses a command; the message is the reason."""


class QmpUnavailable(VmError):
    """QEMU cannot be reached over QMP."""


class QmpAbsent(QmpUnavailable):
    """Nothing listens at its socket."""


@dataclass(frozen=True)
class Monitor:
    """A QMP session. `pid` is the process that called listen(2) on the other side (SO_PEERCRED, see unix(7))."""

    client: "QMPClient"
    connection: socket.socket
    not_yet: NotYet
    pid: int

    async def run_state(self) -> str:
        """Return the RunState in QEMU's spelling."""
        answer = await self.execute_command("query-status")
        state = answer.get("status") if isinstance(answer, dict) else None
        if not isinstance(state, str):
            raise QmpUnavailable("its answer to `query-status` names no state")
        return one_line(state)

    async def go_on(self, *, only_paused: bool = True) -> None:
        """Continue the VM if it is paused; VmError if it does not run then.

        Without `only_paused` it is continued from any other state too, such as one that was saved.
        """
        state = await self.run_state()
        if state == PAUSED_STATE or not (only_paused or state in RUNNING_STATES):
            await self.execute_command("cont")
            state = await self.run_state()
        if state not in RUNNING_STATES:
            raise VmError(f"it does not run again: it is `{state}`")

    async def execute_command(self, command: str, **arguments: Any) -> Any:
        """Carry a command out and return its answer; VmError if QEMU refuses, QmpUnavailable if it does not answer."""
        from qemu.qmp import ExecInterruptedError, ExecuteError, QMPError, StateError  # noqa: PLC0415

        self.not_yet(f"waiting for its answer to `{command}`", None)
        try:
            return await self.client.execute(command, arguments or None)
        except ExecuteError as error:
            raise VmError(f"it refuses to `{command}`: {one_line(str(error))}") from None
        except (ExecInterruptedError, StateError):
            cause = await _hang_up(self.client, self.connection)
            raise QmpUnavailable(f"{_end_reason(cause)} (at `{command}`)") from None
        except QMPError as error:
            raise QmpUnavailable(f"{_end_reason(error)} (at `{command}`)") from None

    async def give_fd(self, fd: int, name: str) -> None:
        """Give QEMU a copy of a descriptor under a name, for a later command; raises as `execute_command` does."""
        self.client.send_fd_scm(fd)
        await self.execute_command("getfd", fdname=name)


@asynccontextmanager
async def open_monitor(path: str, not_yet: NotYet) -> AsyncIterator[Monitor]:
    """Connect and negotiate; disconnect at the end, also after an error. Waits while another client is served.

    `not_yet` is told what is waited for. Raises QmpUnavailable, and VmError where the library is missing.
    """
    not_yet("waiting for the QMP greeting: another client may hold it, or QEMU is busy", None)
    client, connection = await _open_session(path)
    try:
        yield Monitor(client, connection, not_yet, peer_credentials(connection)[0])
    finally:
        await _hang_up(client, connection)


async def _open_session(path: str) -> "tuple[QMPClient, socket.socket]":
    """Return a client that QEMU has greeted, and its connection."""
    try:
        # Imported here, because that takes 70 ms and only hosts with VMs need it.
        from qemu.qmp import ConnectError, QMPClient, QMPError, Runstate  # noqa: PLC0415
    except ImportError:
        raise VmError("the Python package qemu.qmp is missing: install python3-qemu-qmp") from None
    # The second round is for one case: the first message was the answer to a command of an earlier client, and an
    # error.
    for last in (False, True):
        try:
            connection = await connect_unix(path)
        except OSError as error:
            lost = QmpAbsent if isinstance(error, (FileNotFoundError, ConnectionRefusedError)) else QmpUnavailable
            raise lost(f"its QMP socket {path} cannot be connected to: {error.strerror or error}") from None
        client = QMPClient()
        client.events.event_filter = lambda _event: False  # otherwise it keeps all events, which nobody reads
        try:
            await _negotiate_qmp(client, connection)
            return client, connection
        except ConnectError as error:
            if last or not isinstance(error.exc, QMPError):
                raise QmpUnavailable(f"{_end_reason(error.exc)} (at its greeting)") from None
        except QMPError as error:
            raise QmpUnavailable(f"{_end_reason(error)} (at its greeting)") from None
        finally:
            if client.runstate is not Runstate.RUNNING:
                connection.close()
    raise AssertionError("the last round returns or raises")


async def _negotiate_qmp(client: "QMPClient", connection: socket.socket) -> None:
    """Wait for the greeting and negotiate; if cancelled, the library has HANG_UP_SECONDS to clean up."""
    connecting = asyncio.ensure_future(client.connect(connection))
    try:
        await asyncio.wait({connecting})
    except asyncio.CancelledError:
        connecting.cancel()
        await _finish_session(connecting, connection)
        await _hang_up(client, connection)  # the session may just have been established
        raise
    await connecting


async def _hang_up(client: "QMPClient", connection: socket.socket) -> BaseException | None:
    """End the session, once; return what had ended it before, if anything had."""
    if client.runstate.name == "IDLE":
        return None
    ending = asyncio.ensure_future(client.disconnect())
    await _finish_session(ending, connection)
    return ending.exception() if ending.done() and not ending.cancelled() else None


async def _finish_session(ending: "asyncio.Future[Any]", connection: socket.socket) -> None:
    """Wait for the end of a session, and force it if it does not come: QEMU serves no other client before."""
    try:
        if await settle_task(ending, HANG_UP_SECONDS):
            return
    finally:
        if not ending.done():
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
    if not await settle_task(ending, HANG_UP_SECONDS):
        ending.cancel()
        await settle_task(ending, HANG_UP_SECONDS)


def _end_reason(cause: BaseException | None) -> str:
    """Return what ended a session, without QEMU's own words, which may have any length."""
    if cause is None or isinstance(cause, EOFError | ConnectionError):
        return "it closed the QMP connection"
    if isinstance(cause, OSError):
        return f"the QMP connection broke: {cause.strerror}"
    if getattr(getattr(cause, "exc", cause), "raw", b"").strip() == b"{":  # DeserializationError has the line as `raw`
        return "it spreads each QMP message over several lines: have QEMU start with -qmp, not -qmp-pretty (pretty=on)"
    return "what it says is not QMP"
