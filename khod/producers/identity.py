# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who a connected producer is: its process for good, and the systemd unit it runs in, both by the kernel's word."""

import asyncio
import os
import select
from contextlib import suppress
from pathlib import Path

from khod.handover.record import Process


async def wait_ended(process: Process | None) -> None:
    """Wait until a process has ended; for ever where none is known."""
    if process is None:
        await asyncio.get_running_loop().create_future()
        return
    if process_of(process.pid) != process:
        return
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    try:
        if process_of(process.pid) == process:  # it may have ended, and its number gone to another, before the open
            await ended.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


def is_alive(process: Process) -> bool:
    """Whether a process has not ended, as `ended` sees it: one whose parent has not waited for it has."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        ending = select.poll()
        ending.register(pidfd, select.POLLIN)
        return process_of(process.pid) == process and not ending.poll(0)
    finally:
        os.close(pidfd)


def process_of(pid: int) -> Process | None:
    """Identify a running process; None where it has ended, OSError where that cannot be told.

    proc_pid_stat(5): field 22 is when it started.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat[stat.rindex(b")") + 2 :].split()  # field 2, the name, may contain anything
    return Process(pid, int(fields[19]))


def unit_of(pid: int) -> str:
    """The systemd unit a process runs in, "" where it is in none.

    From its cgroup, which it cannot choose. A login session's number is another after each boot, so its
    slice counts.
    """
    with suppress(OSError):
        units = units_in(Path(f"/proc/{pid}/cgroup").read_text())
        while units and units[-1].startswith("session-") and units[-1].endswith(".scope"):
            units.pop()
        services = [part for part in units if part.endswith((".service", ".scope"))]
        return services[0] if services else (units[-1] if units else "")
    return ""


def units_in(cgroup: str) -> list[str]:
    """The systemd units on the path in a /proc/PID/cgroup, the outermost first; none where there is no cgroup v2."""
    for line in cgroup.splitlines():
        hierarchy, _, path = line.partition("::")
        if hierarchy == "0":
            return [part for part in path.split("/") if part.endswith((".service", ".scope", ".slice"))]
    return []
