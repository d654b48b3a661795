# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pages of a memfd, and their digests."""

import fcntl
import os
from collections.abc import Callable, Sequence

PAGE_BYTES = 4096
"""Bytes of a page as this module counts them, on every architecture."""
MARK_DIGITS = 8

Read = Callable[[int, bytearray], int]
"""Reads the page of this number into a buffer and returns the bytes read; OSError if that fails."""


def count_pages(size: int) -> int:
    """Return how many pages a file of `size` bytes has; the last one may be a part."""
    return -(-size // PAGE_BYTES)


def digest_pages(read: Read, pages: Sequence[int]) -> tuple[str, str]:
    """Return the digest and the marks of pages, with one buffer for all of them."""
    import hashlib  # noqa: PLC0415 - it takes long, and a host at rest has no files to compare

    buffer, together, marks = bytearray(PAGE_BYTES), hashlib.sha256(), []
    view = memoryview(buffer)
    for page in pages:
        each = hashlib.sha256(view[: read(page, buffer)])
        together.update(each.digest())
        marks.append(each.hexdigest()[:MARK_DIGITS])
    return together.hexdigest(), "".join(marks)


def read_page(fd: int, page: int, buffer: bytearray) -> int:
    """Read one page of a file into the buffer, and return the bytes read."""
    return os.preadv(fd, [buffer], page * PAGE_BYTES)


def read_size(fd: int) -> int:
    """Return the size of a memfd in bytes; ValueError for another file, which a read may block."""
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        raise ValueError("it is not a memfd") from None
    return os.fstat(fd).st_size  # of tmpfs, which asks nobody
