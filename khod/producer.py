# SPDX-License-Identifier: LGPL-2.1-or-later
"""Take part in a handover: a library for programs that hold state which must outlive the kernel.

    import os
    from khod.producer import Producer

    table = os.memfd_create("table")

    def restore(step):
        global table
        table = step.files["table"]

    Producer("cache", prepare=lambda step: {"table": table}, restore=restore).run()

A handler is called for each verb:

    prepare  work continues, but the state to hand over may not grow any more
    freeze   stop working until thaw
    thaw     continue working: the freeze is undone
    cancel   the handover is aborted: the prepare is undone
    restore  in the next kernel: take back the files in `step.files`
    finish   every producer has its state again

A handler returns nothing, or, from prepare and freeze, files to preserve by name (memfds; the kernel must
have LUO). Raising `Veto` refuses the verb, and so does any other exception.

Uses only the standard library and khod's own modules; the protocol is the Varlink interface io.kho.Producer.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from khod import wire
from khod.client.connection import Connection
from khod.deferred import defer_module
from khod.errors import KhoError, Unreachable
from khod.wire import VERB_SECONDS

if TYPE_CHECKING:
    import logging
    from pathlib import Path
    from typing import Any
else:
    logging = defer_module("logging")  # nothing that a service needs to have its state back

RETRY_SECONDS = 1.0
"""How long to wait between attempts to reach khod after it ended; systemd starts it again."""

START_ATTEMPTS = 10
"""More than systemd makes to start a khod that dies: after the last of them nobody listens at the socket."""

UNDO = {"freeze": ("thaw", "prepare"), "prepare": ("cancel", "")}
"""The undo of each verb, and the verb that still holds after that undo."""


class Veto(Exception):
    """Raised by a handler to refuse a verb, with the reason."""


class CalledOff(Exception):
    """Raised by `Step.not_yet` when khod no longer waits for this verb: leave the handler; the undo follows."""


class Step:
    """One verb of one handover (`run`); `timeout` is in seconds, after which khod gives up."""

    def __init__(
        self,
        verb: str,
        run: str,
        timeout: float,
        files: dict[str, int] | None = None,
        say: Callable[[str, float | None], None] = lambda _reason, _progress: None,
    ) -> None:
        self.verb = verb
        self.run = run
        self.timeout = timeout
        self.files = files or {}
        """With restore, the preserved files by name: open descriptors that the handler now owns."""
        self._say = say
        self._figures: dict[str, float] = {}

    def not_yet(self, reason: str, progress: float | None = None) -> None:
        """Tell the operator why it takes long, and how much is done (0 to 1); raise CalledOff if it was aborted."""
        self._say(reason, progress)

    def note_stopped(self, seconds: float) -> None:
        """With finish: tell how long the work stood still by a clock of its own; khod shows it with its own figure."""
        self._figures["stopped"] = seconds


Handler = Callable[[Step], Mapping[str, int] | None]


class Producer:
    """One producer. `after` and `before` name other producers; `devices` are paths of devices it needs.

    `kind` is what khod shows it as: "vm", or "varlink" where it is empty.

    `socket` is khod's socket; the default is KHOD_SOCKET, or else the usual path.
    """

    def __init__(
        self,
        name: str,
        *,
        prepare: Handler | None = None,
        freeze: Handler | None = None,
        thaw: Handler | None = None,
        cancel: Handler | None = None,
        restore: Handler | None = None,
        finish: Handler | None = None,
        timeout: float = VERB_SECONDS,
        after: Iterable[str] = (),
        before: Iterable[str] = (),
        devices: Iterable[str] = (),
        kind: str = "",
        socket: Path | None = None,
    ) -> None:
        verbs = {"prepare": prepare, "freeze": freeze, "thaw": thaw, "cancel": cancel}
        self._handlers = {**verbs, "restore": restore, "finish": finish}
        self._terms = {
            "name": name,
            "version": wire.PRODUCER_VERSION,
            "timeout": timeout,
            "after": [*after],
            "before": [*before],
            "devices": [*devices],
            **({"kind": kind} if kind else {}),  # a khod that was not upgraded yet does not know it
        }
        self._socket = socket or os.environ.get("KHOD_SOCKET", wire.SOCKET)
        self._connection: Connection | None = None
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self.told = ""
        """The verb that khod assumed to hold at the last registration, "" for none.

        A program that was started again continues what an earlier process of it has stopped, unless this is "freeze".
        """
        self._counts = ""
        self._last_verb = ""
        self._tokens = 0
        self._ahead: tuple[Mapping[str, Any], list[int]] | None = None
        """The command that came as the answer to `not_yet`, with its files, to be done next."""

    def start(self) -> None:
        """Register, restore what was left before the jump, and serve in a thread of its own.

        Returns after `restore` was called, if there was anything to restore; only then decide whether to begin empty.
        Where khod cannot give back what was left, this waits until it can (khoctl producers retry), or until `stop`.
        Raises KhoError if khod cannot be reached or refuses. If khod dies meanwhile, this waits for the next one, which
        has what was left.
        """
        answer = self._begin_service()
        self._thread = threading.Thread(target=self._serve_commands, args=(answer,), name="khod-producer", daemon=True)
        self._thread.start()

    def run(self) -> None:
        """Register and serve until `stop`; KhoError is raised as by `start`, but not later: khod is waited for."""
        self._serve_commands(self._begin_service())

    def stop(self) -> None:
        """Disconnect; while a handover is under way, this is a veto.

        What the producer did for the handover is not undone: khod waits until the process has ended, or has registered
        again and is sent the undo.
        """
        self._stopping.set()
        connection = self._connection
        if connection is not None:
            connection.shutdown()

    def _begin_service(self) -> dict[str, Any]:
        if self._thread is not None and self._stopping.is_set():  # started again after a stop
            self._thread.join()
            self._stopping.clear()
        for _ in range(START_ATTEMPTS - 1):
            try:
                return self._take_back()
            except Unreachable:
                if self._connection is None or self._stopping.wait(RETRY_SECONDS):
                    raise
        return self._take_back()

    def _take_back(self) -> dict[str, Any]:
        """Register, and restore what was left before the jump; return the answer to that, {} if there was nothing."""
        answer: dict[str, Any] = {}
        if self._call_register() == "restore":
            self._last_verb = ""
            while self._last_verb != "restore":  # khod may answer that it cannot send what was left, and tell it later
                answer = self._take_turn(answer)
        return answer

    def _call_register(self) -> str:
        """Connect and register; return the verb that khod assumes to hold, after undoing what was done beyond it."""
        self._drop_connection()
        self._drop_ahead()
        self._connection = connection = Connection(self._socket)
        if self._stopping.is_set():  # `stop` may have seen no connection
            raise Unreachable("The producer is stopped")
        connection.send_call(f"{wire.PRODUCER}.Register", self._terms)
        self.told = told = str(connection.receive_reply()["told"])
        if told == "restore":
            self._counts = ""  # what was frozen has been handed over
        while self._counts and self._counts != told:
            undo, self._counts = UNDO[self._counts]
            self._call_handler(Step(undo, "", 0.0))
        return told

    def _drop_ahead(self) -> None:
        _, fds = self._ahead or ({}, [])
        for fd in fds:
            os.close(fd)
        self._ahead = None

    def _drop_connection(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _serve_commands(self, answer: dict[str, Any]) -> None:
        """Answer and receive commands in a loop; reconnect when the connection to khod ends."""
        try:
            while not self._stopping.is_set():
                try:
                    if self._connection is None:
                        self._call_register()
                        answer = {}
                    answer = self._take_turn(answer)
                except KhoError as error:
                    # A frozen producer stays frozen: khod may have ended because the host is on its way to the next
                    # kernel.
                    _log().warning("%s", error)
                    self._drop_connection()
                    self._stopping.wait(RETRY_SECONDS)
        finally:
            self._drop_connection()

    def _take_turn(self, answer: dict[str, Any]) -> dict[str, Any]:
        """Send an answer, receive the next verb and do it; return the answer to that verb."""
        (command, fds), self._ahead = self._ahead or self._call_next(answer), None
        if command is None:
            return {}
        files = dict(zip(command["names"], fds, strict=True))
        step = Step(
            str(command["verb"]),
            str(command["run"]),
            float(command["timeout"]),
            files,
            lambda reason, progress: self._not_yet(command, reason, progress),
        )
        said = {"serial": command["serial"], **self._call_handler(step)}
        done = {"thaw": "prepare", "cancel": "", "restore": "", "finish": ""}
        self._counts, self._last_verb = done.get(step.verb, step.verb), step.verb
        if not self._counts:
            self._tokens = 0
        return said

    def _call_next(self, answer: dict[str, Any]) -> tuple[Mapping[str, Any] | None, list[int]]:
        """Call Next; return None for a command that khod could not send, after logging its error."""
        connection = self._connection
        if connection is None:
            raise Unreachable("not connected")
        files = answer.pop("files", {})
        fds: tuple[int, ...] = tuple(files.values())
        if fds:
            tokens = [self._tokens + number for number in range(len(fds))]
            self._tokens += len(fds)
            answer |= {"names": list(files), "tokens": tokens, "fds": [*range(len(fds))]}
        connection.send_call(f"{wire.PRODUCER}.Next", answer, fds=fds)
        try:
            return connection.receive_reply(), connection.take_fds()
        except Unreachable:
            raise
        except KhoError as error:
            _log().error("%s", error)
            return None, []

    def _not_yet(self, command: Mapping[str, Any], reason: str, progress: float | None) -> None:
        said = {"serial": command["serial"], "answer": "not_yet", "reason": reason}
        now, fds = self._call_next(said if progress is None else said | {"progress": progress})
        self._drop_ahead()
        self._ahead = (now, fds) if now is not None else None
        if now is None or now["serial"] != command["serial"]:
            raise CalledOff(reason)
        self._drop_ahead()

    def _call_handler(self, step: Step) -> dict[str, Any]:
        """Call the handler and return its result as an answer."""
        handler = self._handlers[step.verb]
        try:
            files = dict((handler(step) if handler is not None else None) or {})
            for fd in files.values():
                os.fstat(fd)  # a file that cannot be sent is the handler's error too
        except Veto as error:
            return {"answer": "veto", "reason": str(error)}
        except CalledOff:
            return {"answer": "veto", "reason": "aborted"}
        except BaseException as error:  # every error of a handler is a veto
            if not isinstance(error, Exception) and threading.current_thread() is threading.main_thread():
                raise  # the process ends, and its connection with it
            _log().exception("%s failed", step.verb)
            return {"answer": "veto", "reason": f"{type(error).__name__}: {error}"}
        if len(files) > wire.MAX_FDS:
            more = f"{len(files)} files, and one message carries {wire.MAX_FDS}: hand some over with freeze"
            return {"answer": "veto", "reason": more}
        return {"answer": "ready", "files": files, **step._figures}


def _log() -> logging.Logger:
    return logging.getLogger(__name__)
