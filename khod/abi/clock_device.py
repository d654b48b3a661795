# SPDX-License-Identifier: LGPL-2.1-or-later
"""Read the clock of a device such as /dev/ptp0: clock_gettime(2) of its open file."""

import os
import time

from khod.abi.named import os_error_context

CLOCKFD = 3  # include/linux/posix-timers_types.h: the low three bits of the clock id of a file


def read_clock_device(path: str) -> float:
    """Return the seconds of a device's clock. OSError: EINVAL if the device is not a clock, ENODEV if it has gone."""
    with os_error_context(f"clock_gettime({path})"):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            return time.clock_gettime(~fd << 3 | CLOCKFD)
        finally:
            os.close(fd)
