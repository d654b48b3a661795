# SPDX-License-Identifier: LGPL-2.1-or-later
"""Freeze a mounted file system: FIFREEZE and FITHAW of include/uapi/linux/fs.h, as fsfreeze(8) does.

FIFREEZE writes everything back, stops every writer, and leaves a journal that needs no recovery (freeze_super()). There
is no way to ask whether a file system is frozen: FITHAW of one that is not is EINVAL.
"""

import ctypes
import fcntl
import os


def _iowr(kind: str, number: int, size: int) -> int:
    """_IOWR() of the uapi headers; powerpc, mips, sparc and alpha have the direction in other bits."""
    if os.uname().machine.startswith(("ppc", "mips", "sparc", "alpha")):
        return 6 << 29 | size << 16 | ord(kind) << 8 | number
    return 3 << 30 | size << 16 | ord(kind) << 8 | number


FIFREEZE = _iowr("X", 119, ctypes.sizeof(ctypes.c_int))
FITHAW = _iowr("X", 120, ctypes.sizeof(ctypes.c_int))


def freeze_filesystem(mount: int) -> None:
    """Freeze the file system of this descriptor.

    OSError: EBUSY if it is frozen already, EOPNOTSUPP if its kind cannot be frozen (vfat).
    """
    fcntl.ioctl(mount, FIFREEZE, 0)


def thaw_filesystem(mount: int) -> None:
    """Thaw it again. OSError: EINVAL if it is not frozen."""
    fcntl.ioctl(mount, FITHAW, 0)
