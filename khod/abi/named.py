# SPDX-License-Identifier: LGPL-2.1-or-later
"""An OSError tells which call it ended."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def os_error_context(call: str) -> Iterator[None]:
    """Give an OSError raised inside the call's name and arguments as its filename."""
    try:
        yield
    except OSError as error:
        error.filename = call
        raise
