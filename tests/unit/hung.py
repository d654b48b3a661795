# SPDX-License-Identifier: LGPL-2.1-or-later
"""File systems on which a process sleeps in the kernel: one that answers nothing, and one that is frozen. As root."""

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MNT_DETACH = 2  # include/uapi/linux/fs.h
_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def silent_file_system(at: Path) -> Iterator[Path]:
    """Mount a FUSE file system without a server: whoever asks it for anything sleeps, until SIGKILL or the end."""
    at.mkdir()
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0".encode()
    if _libc.mount(b"silent", bytes(at), b"fuse", 0, options) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(at))
    try:
        yield at
    finally:
        os.close(device)  # everyone who waits gets ENOTCONN
        _libc.umount2(bytes(at), MNT_DETACH)


@contextmanager
def frozen_file_system(at: Path) -> Iterator[Path]:
    """Mount an ext4 from a loop device and freeze it: whoever writes there sleeps, SIGKILL or not, until the end."""
    image = at.with_suffix(".img")
    at.mkdir()
    with image.open("wb") as file:
        file.truncate(24 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, at], check=True)
    try:
        subprocess.run(["fsfreeze", "--freeze", at], check=True)
        try:
            yield at
        finally:
            subprocess.run(["fsfreeze", "--unfreeze", at], check=True)
    finally:
        subprocess.run(["umount", "--lazy", at], check=True)
