# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl bridge: standard input and output as a connection to khod, for who comes over ssh."""

import os
import select
import socket

import typer

from khoctl.session import connect_client
from khod.errors import UsageError

CHUNK_BYTES = 1 << 16

app = typer.Typer(rich_markup_mode=None)


@app.command()
def bridge() -> None:
    """Speak Varlink with khod on standard input and output.

    For programs that come over ssh, as by `varlinkctl call "ssh-exec:HOST:khoctl bridge"`. It ends when khod or the
    other end closes the connection. File descriptors cannot be passed.
    """
    if os.isatty(0):
        raise UsageError("Standard input is a terminal", where="bridge", remedy="This command is for programs.")
    with connect_client() as khod, socket.socket(fileno=os.dup(khod.fileno())) as connection:
        _copy_until_end(connection)


def _copy_until_end(connection: socket.socket) -> None:
    """Copy both ways. khod's end ends it; after the end of the input, what khod still says is copied."""
    waiting = select.poll()
    for fd in (0, connection.fileno()):
        waiting.register(fd, select.POLLIN)
    while True:
        ready = [fd for fd, _events in waiting.poll()]
        if connection.fileno() in ready:
            answer = connection.recv(CHUNK_BYTES)
            if not answer:
                return
            _write_all(1, answer)
        if 0 in ready:
            call = os.read(0, CHUNK_BYTES)
            if call:
                connection.sendall(call)
            else:
                waiting.unregister(0)
                connection.shutdown(socket.SHUT_WR)


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
