# SPDX-License-Identifier: LGPL-2.1-or-later
"""Records for journald, by its native protocol: https://systemd.io/JOURNAL_NATIVE_PROTOCOL/.

Not by systemd.journal, which holds Python's lock while journald does not read: all of khod would wait.
"""

import errno
import os
import socket
import struct
from collections.abc import Mapping

from khod.abi.memfd import seal_memfd

SOCKET = "/run/systemd/journal/socket"


def send_record(fields: Mapping[str, object]) -> None:
    """Send a record with these fields, or do nothing where no journald is; OSError if it cannot be sent.

    This blocks while journald does not read.
    """
    data = b"".join(_encode_field(name, str(value)) for name, value in fields.items())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.connect(SOCKET)
        except FileNotFoundError:
            return
        try:
            sock.send(data)
        except OSError as error:
            if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                raise
            _send_in_file(sock, data)


def _encode_field(name: str, value: str) -> bytes:
    text = value.encode(errors="replace")
    if b"\n" in text:
        return name.encode() + b"\n" + struct.pack("<Q", len(text)) + text + b"\n"
    return name.encode() + b"=" + text + b"\n"


def _send_in_file(sock: socket.socket, data: bytes) -> None:
    """Send a record that is too long for a message."""
    fd = os.memfd_create("journal-record", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(data)
        seal_memfd(fd)
        socket.send_fds(sock, [b""], [fd])
    finally:
        os.close(fd)
