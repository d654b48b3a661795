# SPDX-License-Identifier: LGPL-2.1-or-later
"""Copy a descriptor of another process: pidfd_getfd(2)."""

import ctypes
import os

from khod.abi.named import os_error_context

SYS_PIDFD_GETFD = 438  # the same on every architecture (Linux 5.6)

_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_uint]


def pidfd_getfd(pid: int, fd: int) -> int:
    """Copy a descriptor of a process, close-on-exec. OSError: EBADF if it has no such descriptor, EPERM, ESRCH."""
    with os_error_context(f"pidfd_getfd({pid}, {fd})"):
        pidfd = os.pidfd_open(pid)
        try:
            copy = int(_syscall(SYS_PIDFD_GETFD, pidfd, fd, 0))
        finally:
            os.close(pidfd)
        if copy < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return copy
