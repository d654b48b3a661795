# SPDX-License-Identifier: LGPL-2.1-or-later
"""Control groups, as systemd names them. The scanner and the early restore need it without asyncio."""

import socket
from contextlib import suppress

from khod.abi.peercred import peer_credentials

CGROUPS = "/sys/fs/cgroup"


def find_units_listening(path: str) -> list[str]:
    """Return the units of the process that listens at a unix socket; none where nobody does, or that is not known."""
    with suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.setblocking(False)
        connection.connect(path)
        pid, _, _ = peer_credentials(connection)
        return units_in(_read_cgroup(pid))
    return []


def units_in(cgroup: str) -> list[str]:
    """The systemd units on the path in a /proc/PID/cgroup, the outermost first; none where there is no cgroup v2."""
    for line in cgroup.splitlines():
        hierarchy, _, path = line.partition("::")
        if hierarchy == "0":
            return [part for part in path.split("/") if part.endswith((".service", ".scope", ".slice"))]
    return []


def unit_of(pid: int) -> str:
    """Return the systemd unit of a process, "" if it is in none.

    The unit is read from the process's cgroup, which the process cannot choose. A login session has another number
    after each boot, so its slice counts.
    """
    with suppress(OSError):
        units = units_in(_read_cgroup(pid))
        while units and units[-1].startswith("session-") and units[-1].endswith(".scope"):
            units.pop()
        services = [part for part in units if part.endswith((".service", ".scope"))]
        return services[0] if services else (units[-1] if units else "")
    return ""


def _read_cgroup(pid: int) -> str:
    with open(f"/proc/{pid}/cgroup") as file:
        return file.read()
