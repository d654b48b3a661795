# SPDX-License-Identifier: LGPL-2.1-or-later
"""The directory of the record: what is in it, and its lock, because there is one khod for one record."""

import fcntl
import os

STATE = "/var/lib/khod"
FILE_NAME = "handover.json"
VERSION = 1
"""The version of the record in it."""


def lock_directory(path: str) -> None:
    """Lock a directory until this process ends. BlockingIOError if another process has locked it, other OSErrors."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
