# SPDX-License-Identifier: LGPL-2.1-or-later
"""VMs by their QMP sockets: paused at `freeze`, continued at `thaw`. There is nothing to restore in the next kernel."""

import asyncio
import enum
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace

from khod.dataclass import dataclass
from khod.handover.record import Process
from khod.producers.barrier import GONE, NOT_RECORDED, ParticipantVeto, ProducerCall, Verb
from khod.producers.configured import Configured, one_line
from khod.producers.identity import process_of, wait_ended
from khod.vm.monitor import PAUSED_STATE, RUNNING_STATES, Monitor, QmpAbsent, QmpUnavailable, VmError, open_monitor

GRACE_SECONDS = 1.0
"""Seconds a process has to end after its socket was closed."""
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
        try:
            return await step(telling) if step else None
        except VmError as error:
            raise ParticipantVeto(str(error)) from None

    async def _check_running(self, telling: ProducerCall) -> None:
        async with open_monitor(self.socket, telling.not_yet) as vm:
            state = await vm.run_state()
            if state != PAUSED_STATE and state not in RUNNING_STATES:
                raise ParticipantVeto(f"it is `{state}`: {UNFIT_STATES.get(state, 'not a state that khod knows')}")
            telling.note = str(_Note(_Reached.prepared, state, _process_of(vm), self.socket))

    async def _pause_guest(self, telling: ProducerCall) -> None:
        note = _Note.parse_note(telling.note)
        telling.note = str(replace(note, reached=_Reached.untouched))
        async with open_monitor(note.socket or self.socket, telling.not_yet) as vm:
            _require_process(vm, note.process)
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
                async with open_monitor(self.socket, telling.not_yet) as vm:
                    if await vm.run_state() == PAUSED_STATE:
                        await vm.go_on()
            except QmpAbsent:
                return GONE
            return None
        note = _Note.parse_note(telling.note)
        if note.state == PAUSED_STATE or note.reached is _Reached.untouched:
            return None
        try:
            async with open_monitor(note.socket or self.socket, telling.not_yet) as vm:
                _require_process(vm, note.process)
                await vm.go_on()
        except QmpUnavailable as error:
            if not await _has_ended(note.process):
                raise ParticipantVeto(f"{error}; process {note.process.pid} lives, and may be paused") from None
        return None


def _process_of(vm: Monitor) -> Process:
    if (process := process_of(vm.pid)) is None:
        raise QmpUnavailable(f"process {vm.pid}, which listens at its QMP socket, cannot be seen from here")
    return process


def _require_process(vm: Monitor, process: Process) -> None:
    if _process_of(vm) != process:
        raise QmpUnavailable(f"process {vm.pid} has its QMP socket now, and not {process.pid} as at prepare")


async def _has_ended(process: Process) -> bool:
    """Return whether a process has ended, at the latest after GRACE_SECONDS."""
    try:
        async with asyncio.timeout(GRACE_SECONDS):
            await wait_ended(process)
    except TimeoutError:
        return False
    return True
