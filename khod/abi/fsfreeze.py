# SPDX-License-Identifier: LGPL-2.1-or-later
"""Freeze a mounted file system: FIFREEZE and FITHAW of include/uapi/linux/fs.h, as fsfreeze(8) does.

FIFREEZE writes everything back, stops every writer, and leaves a journal that needs no recovery (freeze_super()). There
is no way to ask whether a file system is frozen: FITHAW of one that is not is EINVAL.
"""

import ctypes
import fcntl
import os

FIFREEZE = 119
FITHAW = 120


def _iowr(number: int) -> int:
    """_IOWR('X', number, int) of the uapi headers; powerpc, mips, sparc and alpha have the direction in other bits.

    The machine is asked for at the call, not at import: the session scanner imports this module, and may not call
    uname(2).
    """
    other = os.uname().machine.startswith(("ppc", "mips", "sparc", "alpha"))
    return (6 << 29 if other else 3 << 30) | ctypes.sizeof(ctypes.c_int) << 16 | ord("X") << 8 | number


def freeze_filesystem(mount: int) -> None:
    """Freeze the file system of this descriptor.

    OSError: EBUSY if it is frozen already, EOPNOTSUPP if its kind cannot be frozen (vfat).
    """
    fcntl.ioctl(mount, _iowr(FIFREEZE), 0)


def thaw_filesystem(mount: int) -> None:
    """Thaw it again. OSError: EINVAL if it is not frozen."""
    fcntl.ioctl(mount, _iowr(FITHAW), 0)
