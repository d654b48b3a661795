# SPDX-License-Identifier: LGPL-2.1-or-later
"""One Varlink connection to khod, blocking, with file descriptors; standard library only."""

from __future__ import annotations

import json
import math
import os
import select
import socket
import struct
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from khod import wire
from khod.errors import BY_NAME, KhoError, Unreachable

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType
    from typing import Any, Self

START_REMEDY = "Start it with: systemctl start kho-handover"
JOURNAL = "Look at: journalctl -u kho-handover"
CHUNK_BYTES = 1 << 16
UCRED = "3i"  # struct ucred of unix(7): process, user, group


class Connection:
    """A connection to khod's socket. Every method raises KhoError; Unreachable if the connection ends."""

    def __init__(self, path: Path | str = wire.SOCKET, connected: socket.socket | None = None) -> None:
        """Connect, or take over a socket that leads to khod; raise Unreachable with the socket and the likely cause."""
        self._path = str(path)
        self._socket = connected or _connect_socket(self._path)
        self._text = b""
        self._messages: deque[bytes] = deque()
        self.fds: list[int] = []
        self.more = False
        """Whether another reply to the same call follows the last one."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket, and every received descriptor that was not taken."""
        for fd in self.take_fds():
            os.close(fd)
        self._socket.close()

    def shutdown(self) -> None:
        """End the connection from a thread other than the one that waits on it."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def take_fds(self) -> list[int]:
        """Return the descriptors received since the last call; the caller owns them."""
        taken, self.fds = self.fds, []
        return taken

    def fileno(self) -> int:
        """Return the descriptor of the connection, for select(2)."""
        return self._socket.fileno()

    def send_call(
        self, method: str, parameters: Mapping[str, Any] | None = None, *, fds: tuple[int, ...] = (), more: bool = False
    ) -> None:
        """Send a call by its full name; descriptors stay the caller's, and parameters name them by index."""
        call = {
            "method": method,
            "parameters": parameters or {},
            **({"more": True} if more else {}),
        }
        data = json.dumps(call).encode() + b"\0"
        try:
            sent = self._send_files(data, fds) if fds else 0
            self._socket.sendall(data[sent:])
        except OSError:
            self._raise_refusal()
            raise Unreachable("khod closed the connection", remedy=JOURNAL) from None

    def _send_files(self, data: bytes, fds: tuple[int, ...]) -> int:
        """Send with descriptors, and return the number of bytes sent; 0 if khod does not let this user send any.

        The kernel refuses the descriptors (EPERM, Linux 6.16) on khod's behalf. That may also be because khod has not
        accepted the connection yet; after it has answered a call, it has. If they are refused again, the call is sent
        without them, and khod's answer says why.
        """
        for _ in range(2):
            try:
                return socket.send_fds(self._socket, [data], fds)
            except PermissionError:
                self.send_call(f"{wire.SERVICE}.GetInfo")
                self.receive_reply()
        return 0

    def _raise_refusal(self) -> None:
        """Raise the error that khod sent before it closed the connection, or why the way to it has ended."""
        self._socket.setblocking(False)
        self.receive_reply()

    def receive_reply(self) -> Mapping[str, Any]:
        """Wait for the next reply and return its parameters; raise the error if it is one."""
        while not self._messages:
            self.receive()
        try:
            message = json.loads(self._messages.popleft())
            name, parameters = message.get("error"), message.get("parameters") or {}
            self.more = bool(message.get("continues"))
        except (ValueError, AttributeError):
            raise self.version_mismatch_error() from None
        if name is not None:
            raise error_by_name(str(name), parameters)
        found: Mapping[str, Any] = parameters
        return found

    def version_mismatch_error(self) -> Unreachable:
        """Return the error for an answer that this version of khod does not give."""
        what = "What answers on the socket is not this version's khod"
        return Unreachable(what, where=self._path, remedy="systemctl status kho-handover tells what runs.")

    @property
    def reply_waiting(self) -> bool:
        """Whether a reply was received that has not been read yet."""
        return bool(self._messages)

    def receive(self) -> None:
        """Receive what has come, and wait for at least one byte."""
        try:
            data, fds, _flags, _address = socket.recv_fds(
                self._socket, CHUNK_BYTES, wire.MAX_FDS, socket.MSG_CMSG_CLOEXEC
            )
        except OSError:
            data, fds = b"", []
        self.fds += fds
        if not data:
            raise Unreachable("khod closed the connection", remedy=JOURNAL)
        *complete, self._text = (self._text + data).split(b"\0")
        self._messages += complete

    def wait_readable(self, seconds: float | None) -> bool:
        """Wait until something can be received, for at most `seconds` (None: no limit); return whether it can."""
        waiting = select.poll()  # takes any descriptor; select(2) only those below 1024
        waiting.register(self._socket, select.POLLIN)
        return bool(waiting.poll(None if seconds is None else max(0, math.ceil(seconds * 1000))))

    @property
    def listener_pid(self) -> int:
        """The process that listens on the socket: khod, or 1 if systemd holds it for khod."""
        size = struct.calcsize(UCRED)
        pid: int = struct.unpack(UCRED, self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))[0]
        return pid


def _connect_socket(path: str) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        made.connect(path)
    except OSError as error:
        made.close()
        why = {
            FileNotFoundError: "khod is not running: its socket is not there",
            ConnectionRefusedError: "khod is not running: nothing listens on its socket",
        }.get(type(error), f"khod cannot be reached: {error.strerror or error}")
        raise Unreachable(why, where=path, remedy=START_REMEDY) from None
    return made


def error_by_name(name: str, parameters: Mapping[str, Any]) -> KhoError:
    """Return the error with this name on the wire, or a KhoError that quotes the name if it is not one of ours."""
    prefix, _, short = name.rpartition(".")
    if prefix != wire.INTERFACE or short not in BY_NAME:
        return KhoError(f"khod answered {name} {parameters or ''}".strip())
    fields = {key: str(parameters.get(key, "")) for key in ("what", "where", "remedy")}
    error = BY_NAME[short](fields["what"], where=fields["where"], remedy=fields["remedy"])
    error.cause = str(parameters.get("cause") or "")
    return error
