# SPDX-License-Identifier: LGPL-2.1-or-later
"""Messages to the service manager: sd_notify(3).

Not those of systemd.daemon, which holds Python's lock while the service manager does not read: all of khod would wait.
"""

import os
import socket
from collections.abc import Sequence


def send_notification(text: str, fds: Sequence[int] = ()) -> None:
    """Send a message with descriptors, or do nothing without a service manager; OSError if it cannot be sent.

    This blocks while the service manager does not read.
    """
    if not (path := os.environ.get("NOTIFY_SOCKET")):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.connect(f"\0{path[1:]}" if path.startswith("@") else path)
        if fds:
            socket.send_fds(sock, [text.encode()], fds)
        else:
            sock.send(text.encode())


def send_descriptor(name: str, fd: int) -> None:
    """Have the service manager keep a descriptor; as `send_notification`.

    FDPOLL=0: otherwise systemd would drop a descriptor that reports an error or its end.
    """
    send_notification(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", [fd])
