# SPDX-License-Identifier: LGPL-2.1-or-later
"""statx(2) of an open file, from what the kernel has cached.

fstat(2) asks the file system, and one that does not answer (FUSE, NFS) blocks the caller for ever. It must not be
called for a descriptor that another process has sent.
"""

import ctypes
import os
import struct

from khod.abi.named import os_error_context
from khod.dataclass import dataclass

AT_EMPTY_PATH = 0x1000  # include/uapi/linux/fcntl.h
AT_STATX_DONT_SYNC = 0x4000
STATX_BASIC_STATS = 0x7FF  # include/uapi/linux/stat.h
STATX = struct.Struct("=IIQIIIHxxQQQQ64xIIII")  # struct statx up to stx_dev_minor; the kernel writes 256 bytes

_statx = ctypes.CDLL(None, use_errno=True).statx
_statx.restype = ctypes.c_int
_statx.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p]


@dataclass(frozen=True)
class Statx:
    """Fields of struct statx, without their prefix. `size` is in bytes, `blocks` in units of 512."""

    blksize: int
    mode: int
    ino: int
    size: int
    blocks: int
    dev: tuple[int, int]


def statx(fd: int) -> Statx:
    """Describe an open file without asking its file system. OSError: EBADF."""
    buffer = ctypes.create_string_buffer(256)
    flags = AT_EMPTY_PATH | AT_STATX_DONT_SYNC
    with os_error_context(f"statx({fd})"):
        if _statx(fd, b"", flags, STATX_BASIC_STATS, buffer) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    _, blksize, _, _, _, _, mode, ino, size, blocks, _, _, _, *dev = STATX.unpack_from(buffer)
    return Statx(blksize, mode, ino, size, blocks, (dev[0], dev[1]))
