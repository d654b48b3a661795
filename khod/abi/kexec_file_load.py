# SPDX-License-Identifier: LGPL-2.1-or-later
"""kexec_file_load(2), the loader inside the kernel: only this one hands KHO state over."""

import ctypes
import os

# include/uapi/linux/kexec.h
KEXEC_FILE_UNLOAD = 0x00000001
KEXEC_FILE_ON_CRASH = 0x00000002
KEXEC_FILE_NO_INITRAMFS = 0x00000004
KEXEC_FILE_DEBUG = 0x00000008
KEXEC_FILE_NO_CMA = 0x00000010
KEXEC_FILE_FORCE_DTB = 0x00000020

# __NR_kexec_file_load by machine: arch/*/entry/syscalls/*.tbl, scripts/syscall.tbl. glibc has no wrapper.
NR = {"x86_64": 320, "aarch64": 294, "riscv64": 294, "loongarch64": 294, "s390x": 381, "ppc64le": 382}

_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = [
    ctypes.c_long,  # number
    ctypes.c_int,  # kernel_fd
    ctypes.c_int,  # initrd_fd
    ctypes.c_ulong,  # cmdline_len, the NUL included
    ctypes.c_char_p,  # cmdline
    ctypes.c_ulong,  # flags
]


def syscall_number(machine: str) -> int:
    """Return the number of the call on `machine` (as in uname -m); OSError ENOSYS if none is known."""
    try:
        return NR[machine]
    except KeyError:
        raise OSError(38, f"no kexec_file_load(2) number known for {machine}") from None


def kexec_file_load(kernel_fd: int, initrd_fd: int, cmdline: bytes, flags: int) -> None:
    """Load an image for the next kexec, or drop the loaded one (KEXEC_FILE_UNLOAD, fds -1, cmdline empty).

    `cmdline` ends in NUL, which the kernel counts. Raises OSError with the call and its arguments.
    """
    nr = syscall_number(os.uname().machine)
    if _syscall(nr, kernel_fd, initrd_fd, len(cmdline), cmdline or None, flags) != 0:
        error = ctypes.get_errno()
        call = f"kexec_file_load({kernel_fd}, {initrd_fd}, {len(cmdline)} bytes, flags={flags:#x})"
        raise OSError(error, os.strerror(error), call)
