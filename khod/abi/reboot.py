# SPDX-License-Identifier: LGPL-2.1-or-later
"""reboot(2) with the only command that khod needs."""

import ctypes
import os

# include/uapi/linux/reboot.h
LINUX_REBOOT_CMD_KEXEC = 0x45584543

_reboot = ctypes.CDLL(None, use_errno=True).reboot  # glibc adds the magic numbers
_reboot.restype = ctypes.c_int
_reboot.argtypes = [ctypes.c_int]


def reboot(cmd: int) -> None:
    """Jump into the loaded image; returns only by raising OSError, and the system then continues to run.

    EINVAL: nothing is loaded. EPERM: no CAP_SYS_BOOT. Any other errno is a refusal on the way, for instance of LUO's
    freeze (kernel_kexec() runs it before device shutdown).
    """
    ctypes.set_errno(0)
    if _reboot(ctypes.c_int(cmd).value) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), f"reboot({cmd:#x})")
