# SPDX-License-Identifier: LGPL-2.1-or-later
"""The descriptors that the service manager passes at the start, and keeps: sd_listen_fds(3), FDSTORE=1."""

import os

import systemd.daemon


def listen_fds_by_name() -> dict[str, int]:
    """Return the descriptors that the service manager passed at the start, by name; they are now close-on-exec."""
    found: dict[int, str] = systemd.daemon.listen_fds_with_names()
    for fd in found:
        os.set_inheritable(fd, False)
    return {name: fd for fd, name in found.items()}


def send_descriptor(name: str, fd: int) -> None:
    """Have the service manager keep a descriptor; nothing happens without one. This blocks while it does not read.

    FDPOLL=0: otherwise systemd would drop a descriptor that reports an error or its end.
    """
    systemd.daemon.notify(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", fds=[fd])
