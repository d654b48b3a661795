# SPDX-License-Identifier: LGPL-2.1-or-later
"""Slots for the QEMUs that start at the same time on this host: as many as it has processors, at least two.

After a jump all guests come back at once. Without a limit they would share the processors, and the first guest would
run as late as the last one. A slot is a file with a lock (flock), which the kernel releases when its holder dies.
"""

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from khod.errors import errno_text
from khod.vm.monitor import NotYet, VmError

MIN_SLOTS = 2
POLL_SECONDS = 0.02
"""Between two attempts of one process. Where many wait, one of them finds a free slot earlier than that."""


def count_slots() -> int:
    """Return how many QEMUs may start at the same time."""
    return max(MIN_SLOTS, os.cpu_count() or 1)


@asynccontextmanager
async def hold_slot(directory: Path, not_yet: NotYet) -> AsyncIterator[None]:
    """Wait for a slot, and hold it; VmError if `directory` cannot be written.

    `not_yet` is told of the wait.
    """
    try:
        while (slot := _take_slot(directory)) is None:
            not_yet(f"waiting for a slot: {count_slots()} other machines are starting", None)
            await asyncio.sleep(POLL_SECONDS)
    except OSError as error:
        raise VmError(f"{directory} cannot be used for its locks: {errno_text(error)}") from None
    try:
        yield
    finally:
        os.close(slot)


def _take_slot(directory: Path) -> int | None:
    """Return a descriptor that holds a slot until it is closed, None if none is free."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for number in range(count_slots()):
        fd = os.open(directory / str(number), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
        except OSError:
            os.close(fd)
            raise
        else:
            return fd
    return None
