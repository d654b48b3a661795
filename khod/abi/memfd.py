# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files in memory that nobody can change any more: memfd_create(2), and F_ADD_SEALS of fcntl(2)."""

import errno
import fcntl
import time

SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
PINNED_SECONDS = 10.0
RETRY_SECONDS = 0.02


def seal_memfd(fd: int) -> None:
    """Make a memfd permanently read-only. OSError: EBUSY while it is mapped writable, or where its pages stay in use.

    The kernel refuses the seal while anybody else holds a page, and waits 0.15 s for that (memfd_wait_for_pins() in
    mm/memfd.c). What moves or reclaims memory, as DAMON or kcompactd, holds pages too, and on a busy host for longer
    (seen once with 6.18.44): this waits up to PINNED_SECONDS.
    """
    deadline = time.monotonic() + PINNED_SECONDS
    while True:
        try:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() >= deadline:
                raise
            time.sleep(RETRY_SECONDS)
        else:
            return
