# SPDX-License-Identifier: LGPL-2.1-or-later
"""Control groups, as systemd names them. It is apart so that the scanner needs no asyncio."""

import socket
from contextlib import suppress
from pathlib import Path

from khod.abi.peercred import peer_credentials

CGROUPS = Path("/sys/fs/cgroup")


def find_units_listening(path: str) -> list[str]:
    """Return the units of the process that listens at a unix socket; none where nobody does, or that is not known."""
    with suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.setblocking(False)
        connection.connect(path)
        pid, _, _ = peer_credentials(connection)
        return units_in(Path(f"/proc/{pid}/cgroup").read_text())
    return []


def units_in(cgroup: str) -> list[str]:
    """The systemd units on the path in a /proc/PID/cgroup, the outermost first; none where there is no cgroup v2."""
    for line in cgroup.splitlines():
        hierarchy, _, path = line.partition("::")
        if hierarchy == "0":
            return [part for part in path.split("/") if part.endswith((".service", ".scope", ".slice"))]
    return []
