# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who a connected producer is, as the kernel knows it: its process, with a start time, and its systemd unit."""

import asyncio
import os
import select

from khod.abi.procstat import read_stat
from khod.handover.record import Process


async def wait_ended(process: Process | None) -> None:
    """Wait until a process has ended; forever if `process` is None."""
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
        if process_of(process.pid) == process:  # it may have ended, and its PID been reused, before the open
            await ended.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


def is_alive(process: Process) -> bool:
    """Whether a process has not ended. As in `wait_ended`, one whose parent has not waited for it has ended."""
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
    """Identify a running process; None if it has ended, OSError if that cannot be found out."""
    try:
        return Process(pid, read_stat(pid).started)
    except (FileNotFoundError, ProcessLookupError):
        return None
