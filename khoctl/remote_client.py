# SPDX-License-Identifier: LGPL-2.1-or-later
"""A connection to khod of another host: `khoctl bridge` there, at the other end of ssh."""

import os
import socket
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from khoctl.remote import MAX_SAID_BYTES, explain_failure, last_line, ssh_command, start_ssh
from khod import values
from khod.client.handover import Client
from khod.client.history import HistoryClient
from khod.errors import Exit, KhoError, Unreachable

T = TypeVar("T")
MAX_REPLY_BYTES = 8 << 20
"""Maximum size of one reply: a host may be in anybody's hands."""
END_SECONDS = 2.0
"""How long ssh has to end before it is killed."""


class RemoteClient(HistoryClient):
    """khod's client over one ssh; its answers may be those of another version, or anybody's.

    `fresh` makes a connection of its own: an operator's ControlMaster may hold one to the kernel before a jump. It asks
    for no password.
    """

    def __init__(
        self,
        host: str,
        remote_socket: str | None = None,
        *,
        patience: float | None = None,
        on_slow: Callable[[Client], None] = lambda _: None,
        fresh: bool = False,
        batch: bool | None = None,
    ) -> None:
        words = ["--socket", remote_socket] if remote_socket else []
        command = ssh_command(host, [*words, "bridge"], follows=True, fresh=fresh, batch=batch)
        here, there = socket.socketpair()
        self.host = host
        with there:
            self._ssh = start_ssh(command, there.fileno())
        super().__init__(host, patience=patience, on_slow=on_slow, connected=here)

    def close(self) -> None:
        """Close the connection and end ssh."""
        super().close()
        self._ssh.terminate()
        try:
            self._ssh.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._ssh.kill()
            self._ssh.wait()
        if self._ssh.stderr is not None:
            self._ssh.stderr.close()

    @property
    def listener_pid(self) -> int:
        """Not known: it is another host's."""
        return 0

    def receive(self) -> None:
        """Receive what has come; raise what ssh, or khoctl there, says of the end of the connection."""
        try:
            super().receive()
        except Unreachable as error:
            raise self._explain_end(error) from None
        if len(self._text) > MAX_REPLY_BYTES:
            raise Unreachable(f"{self.host} answers with more than {MAX_REPLY_BYTES >> 20} MiB", remedy="Look at it.")

    def receive_reply(self) -> Mapping[str, Any]:
        """Wait for the next reply, and refuse one that is nested too deeply to be khod's."""
        try:
            return super().receive_reply()
        except RecursionError:
            raise self.version_mismatch_error() from None

    def _explain_end(self, error: KhoError) -> KhoError:
        """Return why the connection has ended, from ssh's exit code and what was said on its standard error."""
        with suppress(subprocess.TimeoutExpired):
            self._ssh.wait(END_SECONDS)
        said = self._read_said()
        code = self._ssh.poll()
        if code == Exit.unreachable:
            return Unreachable(f"{self.host}: {last_line(said).removeprefix('khoctl: ')}".rstrip("."))
        if code in (None, Exit.done):
            error.where = self.host
            return error
        return explain_failure(self.host, code or 0, said)

    def _read_said(self) -> str:
        """Return the beginning of what ssh has written on its standard error until now."""
        if self._ssh.stderr is None:
            return ""
        fd = self._ssh.stderr.fileno()
        os.set_blocking(fd, False)
        with suppress(OSError):
            return os.read(fd, MAX_SAID_BYTES).decode(errors="backslashreplace")
        return ""

    def _decode_reply(self, wanted: type[T], reply: Mapping[str, Any], name: str) -> T:
        try:
            return values.decode_value(wanted, reply[name], may_lack=values.ANY_FIELD)
        except (values.DecodeError, KeyError, TypeError, RecursionError):
            raise self.version_mismatch_error() from None
