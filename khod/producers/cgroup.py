# SPDX-License-Identifier: LGPL-2.1-or-later
"""Control groups, as systemd names them. It is apart so that the scanner needs no asyncio."""

from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def units_in(cgroup: str) -> list[str]:
    """The systemd units on the path in a /proc/PID/cgroup, the outermost first; none where there is no cgroup v2."""
    for line in cgroup.splitlines():
        hierarchy, _, path = line.partition("::")
        if hierarchy == "0":
            return [part for part in path.split("/") if part.endswith((".service", ".scope", ".slice"))]
    return []
