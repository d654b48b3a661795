# SPDX-License-Identifier: LGPL-2.1-or-later
"""A process that khod-vm leaves for the next khod-vm of this boot when it is killed: named in a file, by its number."""

import os
import select
import signal
from contextlib import suppress

from khod.abi.procstat import read_stat
from khod.dataclass import dataclass

END_SECONDS = 5.0


@dataclass(frozen=True)
class LeftProcess:
    """A process by its number, and when it began: the number may be another's by now."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> "LeftProcess":
        """Return what names this process; OSError if it is not there."""
        return cls(pid, read_stat(pid).started)

    @property
    def is_there(self) -> bool:
        """Whether it has not ended, or nobody has waited for it yet."""
        with suppress(OSError):
            return read_stat(self.pid).started == self.started
        return False

    def kill(self) -> None:
        """End it, and wait at most END_SECONDS for that."""
        with suppress(OSError):
            pidfd = os.pidfd_open(self.pid)
            try:
                if self.is_there:
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    ending = select.poll()  # takes any descriptor; select(2) only those below 1024
                    ending.register(pidfd, select.POLLIN)
                    ending.poll(END_SECONDS * 1000)
            finally:
                os.close(pidfd)
