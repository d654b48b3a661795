# SPDX-License-Identifier: LGPL-2.1-or-later
"""Name the failed call in an OSError."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def os_error_context(call: str) -> Iterator[None]:
    """Set the filename of an OSError raised inside to the call's name and arguments."""
    try:
        yield
    except OSError as error:
        error.filename = call
        raise
