# SPDX-License-Identifier: LGPL-2.1-or-later
"""Work in a child that is killed at a system call of a given number, by ptrace(2): nothing depends on time."""

import ctypes
import os
import signal
from collections.abc import Callable

PTRACE_TRACEME, PTRACE_SYSCALL = 0, 24  # <sys/ptrace.h>
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
LIBC.ptrace.restype = ctypes.c_long


def run_killed(prepare: Callable[[], Callable[[], object]], stops: int) -> bool:
    """Run what `prepare` returns in a child, killed at its Nth stop, before or after a call; False if it ended first.

    `prepare` runs in the child before its calls are counted.
    """
    pid = os.fork()
    if not pid:
        code = 1
        try:
            work = prepare()
            LIBC.ptrace(PTRACE_TRACEME, 0, None, None)
            os.kill(os.getpid(), signal.SIGSTOP)
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSTOPPED(status), "the child could not be prepared"
    for _ in range(stops):
        assert LIBC.ptrace(PTRACE_SYSCALL, pid, None, None) == 0, os.strerror(ctypes.get_errno())
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, "the work failed by itself"
            return False
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status)
    return True
