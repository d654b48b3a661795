"""A thin typed client of io.kho.Handover: one connection, methods that return the model or raise KhoError."""

import json
import os
import socket
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from khod import wire
from khod.errors import Unreachable
from khod.model import Check, Event, Status

T = TypeVar("T")
START = "Start it with: systemctl start kho-handover"
JOURNAL = "Look at: journalctl -u kho-handover"
ANSWER = 60.0
"""Seconds khod has to say how it stands; its start, a rollback included, comes before."""

CHUNK = 1 << 16
MAX_FDS = 253  # SCM_MAX_FD, the most one message carries


class Client:
    """One connection to khod. Every method raises KhoError; Unreachable where the connection ends."""

    def __init__(self, path: Path = Path(wire.SOCKET)) -> None:
        """Connect; Unreachable names the socket and the likely cause."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._path = str(path)
        self._text = b""
        self._messages: deque[bytes] = deque()
        self._fds: list[int] = []
        try:
            self._socket.connect(str(path))
        except OSError as error:
            self._socket.close()
            why = {
                FileNotFoundError: "khod is not running: its socket is not there",
                ConnectionRefusedError: "khod is not running: nothing listens on its socket",
            }.get(type(error), f"khod cannot be reached: {error.strerror or error}")
            raise Unreachable(why, where=str(path), remedy=START) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for fd in self._fds:
            os.close(fd)
        self._socket.close()

    def fileno(self) -> int:
        """The connection, for select(2)."""
        return self._socket.fileno()

    def status(self) -> Status:
        """How it stands; Unreachable where khod takes the call and is silent (it may be starting over and over)."""
        self._socket.settimeout(ANSWER)
        try:
            self.send("Status")
            return self.answer()
        finally:
            self._socket.settimeout(None)

    def answer(self) -> Status:
        """Wait for the status that a call of Status, Activate, Abort or Kexec is answered with."""
        return self._decoded(Status, self.reply(), "status")

    def check(self) -> list[Check]:
        """The preflight checks."""
        self.send("Check")
        return self._decoded(list[Check], self.reply(), "checks")

    def tree(self, side: str) -> dict[str, bytes]:
        """A state tree's blobs by name, the root's is ""."""
        self.send("Tree", {"side": side})
        parameters = self.reply()
        names, indexes = parameters["names"], parameters["blobs"]
        return {name: _contents(self._fds[index]) for name, index in zip(names, indexes, strict=True)}

    def monitor(self) -> Iterator[Event]:
        """Every change from now on, beginning with how it stands; ends with khod."""
        self.send("Monitor", more=True)
        while True:
            yield self.event()

    def event(self) -> Event:
        """The next change, after a call of Monitor."""
        return self._decoded(Event, self.reply(), "event")

    def send(
        self, method: str, parameters: Mapping[str, Any] | None = None, *, fds: tuple[int, ...] = (), more: bool = False
    ) -> None:
        """Send a call; descriptors stay the caller's, parameters name them by their index."""
        call = {
            "method": f"{wire.INTERFACE}.{method}",
            "parameters": parameters or {},
            **({"more": True} if more else {}),
        }
        data = json.dumps(call).encode() + b"\0"
        try:
            sent = socket.send_fds(self._socket, [data], fds) if fds else 0
            self._socket.sendall(data[sent:])
        except OSError:
            raise Unreachable("khod closed the connection", remedy=JOURNAL) from None

    def reply(self) -> Mapping[str, Any]:
        """Wait for the next reply and give its parameters; one of our errors is raised."""
        while not self._messages:
            self.receive()
        try:
            message = json.loads(self._messages.popleft())
            name, parameters = message.get("error"), message.get("parameters") or {}
        except (ValueError, AttributeError):
            raise self._stranger() from None
        if name is not None:
            raise wire.error(str(name), parameters)
        found: Mapping[str, Any] = parameters
        return found

    def _decoded(self, wanted: type[T], reply: Mapping[str, Any], name: str) -> T:
        try:
            return wire.decode(wanted, reply[name])
        except (TypeError, KeyError, AttributeError):
            raise self._stranger() from None

    def _stranger(self) -> Unreachable:
        what = "What answers on the socket is not this version's khod"
        return Unreachable(what, where=self._path, remedy="systemctl status kho-handover tells what runs.")

    @property
    def waiting(self) -> bool:
        """Whether a reply is here that was not yet asked for."""
        return bool(self._messages)

    def receive(self) -> None:
        """Take in what has come, at least one byte."""
        try:
            data, fds, _flags, _address = socket.recv_fds(self._socket, CHUNK, MAX_FDS)
        except TimeoutError:
            raise Unreachable(f"khod does not answer within {ANSWER:g} s", remedy=JOURNAL) from None
        except OSError:
            data, fds = b"", []
        self._fds += fds
        if not data:
            raise Unreachable("khod closed the connection", remedy=JOURNAL)
        *complete, self._text = (self._text + data).split(b"\0")
        self._messages += complete


def _contents(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)
