# SPDX-License-Identifier: LGPL-2.1-or-later
"""What reading pages of preserved files costs in the blackout, with the default settings."""

import os
import statistics
import time
from collections.abc import Iterator

from khod.config import VerifySettings
from khod.producers.contents import take_spot
from tests.bench.figure import Figure

ROUNDS = 20
MOST_MS = 10.0
SIZES = {"1 MiB, all of it": 1 << 20, "64 MiB": 64 << 20, "1 GiB": 1 << 30}
BLOCK = 1 << 20


def run() -> Iterator[Figure]:
    """Read a file of each size, filled as the kernel fills what it preserves."""
    settings = VerifySettings()
    for name, size in SIZES.items():
        fd = os.memfd_create("bench")
        try:
            block = os.urandom(BLOCK)
            for at in range(0, size, BLOCK):
                os.pwrite(fd, block, at)
            took = [_time_spot(fd, settings) for _ in range(ROUNDS)]
        finally:
            os.close(fd)
        pages = "all pages" if size <= settings.whole_bytes else f"{settings.pages} pages at random"
        how = f"{pages}, median of {ROUNDS}; the slowest {max(took):.2f} ms"
        yield Figure(f"spot digest of a file of {name}", statistics.median(took), MOST_MS, "ms", how)


def _time_spot(fd: int, settings: VerifySettings) -> float:
    began = time.perf_counter()
    spot = take_spot(fd, settings)
    took = time.perf_counter() - began
    assert not spot.gap
    return took * 1e3
