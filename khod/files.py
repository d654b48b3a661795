# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files that are asked for by name: opened so that nothing strange among them can hurt."""

import os
import stat
from collections.abc import Callable

from khod.errors import UsageError, errno_text

_KINDS: list[tuple[Callable[[int], bool], str]] = [
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
]


def open_regular(path: str, role: str) -> int:
    """Open a file for a request, close-on-exec; UsageError with a remedy where it is none we can take.

    O_NONBLOCK keeps a FIFO without a writer from holding the caller for ever.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError) as error:
        text = errno_text(error) if isinstance(error, OSError) else str(error)
        raise UsageError(
            f"The {role} cannot be opened: {text}",
            where=repr(path) if "\0" in path else path,
            remedy=f"Give --{role} the path of a readable file.",
        ) from None
    try:
        check_regular(fd, role, path)
    except UsageError:
        os.close(fd)
        raise
    return fd


def check_regular(fd: int, role: str, name: str) -> None:
    """Raise UsageError where `fd` is no regular file: the kernel's loader reads no other kind."""
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        kind = next((text for is_kind, text in _KINDS if is_kind(mode)), "no regular file")
        raise UsageError(f"The {role} is {kind}", where=name, remedy="Give a regular file.")
