# SPDX-License-Identifier: LGPL-2.1-or-later
"""Write the file that an operator names, complete or not at all."""

import os
import stat
import sys
from contextlib import suppress

from khod.errors import UsageError, errno_text

STANDARD_OUTPUT = "-"
NEW_MODE = 0o666
"""The mode of a new file; the umask takes from it."""


def write_file(path: str, content: bytes) -> None:
    """Write `content` to a file, or to standard output for `-`.

    A regular file is replaced by a new one of the same mode when all of it is written, so that a reader never sees a
    part. A symbolic link stays. A device or a FIFO is written to. Raises UsageError if the file cannot be written; what
    was there before is unchanged. OSError is raised only by standard output.
    """
    if path == STANDARD_OUTPUT:
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
        return
    try:
        place = os.path.realpath(path)
        mode = _find_mode(place)
        if mode is None or stat.S_ISREG(mode):
            _replace_file(place, content, mode)
        else:
            with open(place, "wb") as file:
                file.write(content)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        why = errno_text(error) if isinstance(error, OSError) else str(error)
        raise UsageError(
            f"The file cannot be written: {why}",
            where=path,
            remedy="Give a file in a directory that you may write, with space for it, or - for standard output.",
        ) from None


def _find_mode(path: str) -> int | None:
    try:
        return os.stat(path).st_mode
    except FileNotFoundError:
        return None


def _replace_file(path: str, content: bytes, mode: int | None) -> None:
    """Write a new file beside `path` and rename it; `mode` is that of the file it replaces, None if there is none."""
    temporary = os.path.join(os.path.dirname(path), f".khoctl-{os.getpid()}")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, NEW_MODE), "wb") as file:
            if mode is not None:
                os.fchmod(file.fileno(), stat.S_IMODE(mode))
            file.write(content)
        os.rename(temporary, path)
    except BaseException:  # an interrupt, too, must leave nothing behind
        with suppress(OSError):
            os.unlink(temporary)
        raise
