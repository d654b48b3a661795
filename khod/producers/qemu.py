# SPDX-License-Identifier: LGPL-2.1-or-later
"""VMs by their QMP sockets: paused at `freeze`, continued at `thaw`. There is nothing to restore in the next kernel.

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
import enum
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from khod.concurrency.bounded import settle_task
from khod.concurrency.sockets import connect_unix
from khod.handover.record import Process
from khod.producers.barrier import GONE, NOT_RECORDED, ParticipantVeto, ProducerCall, Verb
from khod.producers.configured import Configured, one_line
from khod.producers.identity import process_of, wait_ended

if TYPE_CHECKING:
    from qemu.qmp import QMPClient

GRACE_SECONDS = 1.0
"""Seconds a process has to end after its socket was closed."""
HANG_UP_SECONDS = 0.5
"""Seconds that QEMU may delay the end of a session; then the connection is shut down, which QEMU cannot delay."""

PAUSED_STATE = "paused"
RUNNING_STATES = frozenset({"running", "suspended"})
"""States that `stop` changes to `paused`, and `cont` changes back. Before QEMU 9.0 `stop` does not act on a suspended
VM."""

UNFIT_STATES = {
    "debug": "a debugger holds it and may let it go at any time",
    "inmigrate": "it is still arriving from another host, and `stop` would only say how it starts there",
    "internal-error": "QEMU cannot run it any further without a reset",
    "io-error": "it waits for its storage, with requests that are not done",
    "postmigrate": "the guest lives on another host, and must not live twice",
    "prelaunch": "it has not been started, and whoever set it up may start it at any time",
    "finish-migrate": "it is leaving for another host",
    "restore-vm": "a snapshot is being loaded",
    "save-vm": "a snapshot is being saved",
    "shutdown": "the guest has shut down",
    "watchdog": "its watchdog has fired",
    "guest-panicked": "the guest has panicked",
    "colo": "it is one half of a pair that COLO keeps in step",
}
"""The other values of QEMU's RunState (qapi/run-state.json), each with the reason why it refuses a handover."""


class QmpUnavailable(ParticipantVeto):
    """QEMU cannot be reached over QMP."""


class _Absent(QmpUnavailable):
    """Nothing listens at its socket."""


class _Reached(enum.Enum):
    """How far a freeze has come: what a `thaw` must assume if it cannot ask QEMU."""

    prepared = "prepared"
    """What is recorded before `freeze`: a khod that has only this may have sent `stop`."""
    untouched = "untouched"
    """`freeze` was told, and ended before `stop` was sent."""
    asked = "asked"
    """`stop` was sent, or was about to be."""


@dataclass(frozen=True)
class _Note:
    """What later verbs must know: the state at `prepare`, the process, and its socket."""

    reached: _Reached
    state: str
    process: Process
    socket: str = ""
    """"" in the note of an earlier khod: then the socket in the file counts."""

    def __str__(self) -> str:
        return f"{self.reached.value} {self.state} {self.process.pid} {self.process.started} {self.socket}"

    @classmethod
    def parse_note(cls, text: str) -> "_Note":
        """Parse what `str` made; ParticipantVeto if it is anything else."""
        try:
            reached, state, pid, started, *path = text.split(" ", 4)
            return cls(_Reached(reached), state, Process(int(pid), int(started)), *path)
        except ValueError:
            raise ParticipantVeto(f"it was not prepared: its note is {one_line(text)!r}") from None


@dataclass(frozen=True)
class Qemu(Configured):
    """A VM whose QMP socket is at the path `socket`. A VM that is not paused is paused from `freeze` to `thaw`."""

    socket: str = ""
    kind: str = "qemu"

    @classmethod
    def by_note(cls, name: str, note: str) -> "Qemu | None":
        """Return the producer that left this note; None if the note does not name the socket."""
        with suppress(ParticipantVeto):
            if path := _Note.parse_note(note).socket:
                return cls(name, socket=path)
        return None

    async def _carry_out(self, telling: ProducerCall) -> str | None:
        steps: dict[Verb, Callable[[ProducerCall], Awaitable[str | None]]] = {
            Verb.prepare: self._check_running,
            Verb.freeze: self._pause_guest,
            Verb.thaw: self._continue_guest,
        }
        step = steps.get(telling.verb)
        return await step(telling) if step else None

    async def _check_running(self, telling: ProducerCall) -> None:
        async with _open_monitor(self.socket, telling) as vm:
            state = await vm.run_state()
            if state != PAUSED_STATE and state not in RUNNING_STATES:
                raise ParticipantVeto(f"it is `{state}`: {UNFIT_STATES.get(state, 'not a state that khod knows')}")
            telling.note = str(_Note(_Reached.prepared, state, vm.process, self.socket))

    async def _pause_guest(self, telling: ProducerCall) -> None:
        note = _Note.parse_note(telling.note)
        telling.note = str(replace(note, reached=_Reached.untouched))
        async with _open_monitor(note.socket or self.socket, telling) as vm:
            vm.require_process(note.process)
            if (state := await vm.run_state()) != note.state:
                # Another program is changing this VM; and thaw must restore the state it had at `prepare`.
                raise ParticipantVeto(f"it was `{note.state}` when it prepared and is `{state}` now")
            if state == PAUSED_STATE:
                return
            telling.note = str(replace(note, reached=_Reached.asked))
            await vm.execute_command("stop")
            if (state := await vm.run_state()) != PAUSED_STATE:
                raise ParticipantVeto(f"asked to pause, it is `{state}`")

    async def _continue_guest(self, telling: ProducerCall) -> str | None:
        """Continue the VM if it was running.

        If QEMU cannot be asked: success if its process is gone or was never asked to pause, else ParticipantVeto. Only
        QMP shows whether a VM is paused: its threads sleep in either case. Without a record a VM that is paused is
        continued, and GONE is returned if nothing listens at its socket.
        """
        if telling.note == NOT_RECORDED:
            try:
                async with _open_monitor(self.socket, telling) as vm:
                    if await vm.run_state() == PAUSED_STATE:
                        await vm.go_on()
            except _Absent:
                return GONE
            return None
        note = _Note.parse_note(telling.note)
        if note.state == PAUSED_STATE or note.reached is _Reached.untouched:
            return None
        try:
            async with _open_monitor(note.socket or self.socket, telling) as vm:
                vm.require_process(note.process)
                await vm.go_on()
        except QmpUnavailable as error:
            if not await _has_ended(note.process):
                raise ParticipantVeto(f"{error}; process {note.process.pid} lives, and may be paused") from None
        return None


@dataclass(frozen=True)
class _Monitor:
    """A QMP session, and the process at its other end. Any problem with an answer is a ParticipantVeto."""

    client: "QMPClient"
    connection: socket.socket
    telling: ProducerCall
    process: Process

    def require_process(self, process: Process) -> None:
        if self.process != process:
            raise QmpUnavailable(
                f"process {self.process.pid} has its QMP socket now, and not {process.pid} as at prepare"
            )

    async def run_state(self) -> str:
        """Return the RunState in QEMU's spelling."""
        answer = await self.execute_command("query-status")
        state = answer.get("status") if isinstance(answer, dict) else None
        if not isinstance(state, str):
            raise QmpUnavailable("its answer to `query-status` names no state")
        return one_line(state)

    async def go_on(self) -> None:
        """Continue the VM if it is paused; ParticipantVeto if it does not run then."""
        if (state := await self.run_state()) == PAUSED_STATE:
            await self.execute_command("cont")
            state = await self.run_state()
        if state not in RUNNING_STATES:
            raise ParticipantVeto(f"it does not run again: it is `{state}`")

    async def execute_command(self, command: str) -> Any:
        """Carry a command out and return its answer."""
        from qemu.qmp import ExecInterruptedError, ExecuteError, QMPError, StateError  # noqa: PLC0415

        self.telling.not_yet(f"waiting for its answer to `{command}`", None)
        try:
            return await self.client.execute(command)
        except ExecuteError as error:
            raise ParticipantVeto(f"it refuses to `{command}`: {one_line(str(error))}") from None
        except (ExecInterruptedError, StateError):
            cause = await _hang_up(self.client, self.connection)
            raise QmpUnavailable(f"{_end_reason(cause)} (at `{command}`)") from None
        except QMPError as error:
            raise QmpUnavailable(f"{_end_reason(error)} (at `{command}`)") from None


@asynccontextmanager
async def _open_monitor(path: str, telling: ProducerCall) -> AsyncIterator[_Monitor]:
    """Connect and negotiate; disconnect at the end, also after an error. Waits while another client is served."""
    telling.not_yet("waiting for the QMP greeting: another client may hold it, or QEMU is busy", None)
    client, connection = await _open_session(path)
    try:
        yield _Monitor(client, connection, telling, _listening_process(connection))
    finally:
        await _hang_up(client, connection)


async def _open_session(path: str) -> "tuple[QMPClient, socket.socket]":
    """Return a client that QEMU has greeted, and its connection."""
    try:
        # Imported here, because that takes 70 ms and only hosts with VMs need it.
        from qemu.qmp import ConnectError, QMPClient, QMPError, Runstate  # noqa: PLC0415
    except ImportError:
        raise ParticipantVeto("the Python package qemu.qmp is missing: install python3-qemu-qmp") from None
    # The second round is for one case: the first message was the answer to a command of an earlier client, and an
    # error.
    for last in (False, True):
        try:
            connection = await connect_unix(path)
        except OSError as error:
            lost = _Absent if isinstance(error, (FileNotFoundError, ConnectionRefusedError)) else QmpUnavailable
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


def _listening_process(connection: socket.socket) -> Process:
    """Return the process that called listen(2) on the other side (SO_PEERCRED, see unix(7)).

    QmpUnavailable if that process cannot be seen from here.
    """
    credentials = struct.Struct("3i")  # struct ucred: pid, uid, gid
    pid, _, _ = credentials.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size))
    if (process := process_of(pid)) is None:
        raise QmpUnavailable(f"process {pid}, which listens at its QMP socket, cannot be seen from here")
    return process


async def _has_ended(process: Process) -> bool:
    """Return whether a process has ended, at the latest after GRACE_SECONDS."""
    try:
        async with asyncio.timeout(GRACE_SECONDS):
            await wait_ended(process)
    except TimeoutError:
        return False
    return True


def _end_reason(cause: BaseException | None) -> str:
    """Return what ended a session, without QEMU's own words, which may have any length."""
    if cause is None or isinstance(cause, EOFError | ConnectionError):
        return "it closed the QMP connection"
    if isinstance(cause, OSError):
        return f"the QMP connection broke: {cause.strerror}"
    if getattr(getattr(cause, "exc", cause), "raw", b"").strip() == b"{":  # DeserializationError has the line as `raw`
        return "it spreads each QMP message over several lines: have QEMU start with -qmp, not -qmp-pretty (pretty=on)"
    return "what it says is not QMP"
