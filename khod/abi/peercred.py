# SPDX-License-Identifier: LGPL-2.1-or-later
"""The process at the other end of a Unix socket, as of connect(2), and what it may send: unix(7)."""

import ctypes
import errno
import os
import socket
import struct

SO_PEERGROUPS = 59  # include/uapi/asm-generic/socket.h
SO_PASSRIGHTS = 83  # Linux 6.16
UCRED = struct.Struct("iII")  # struct ucred: pid, uid, gid

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.getsockopt.restype = ctypes.c_int
_LIBC.getsockopt.argtypes = (
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_uint32),
)


def peer_credentials(sock: socket.socket) -> tuple[int, int, int]:
    """Return the pid, uid and gid of the process that connected."""
    pid, uid, gid = UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))
    return pid, uid, gid


def peer_groups(sock: socket.socket) -> tuple[int, ...]:
    """Return all supplementary groups of the process that connected; CPython's getsockopt stops at 256."""
    size = ctypes.c_uint32(256 * ctypes.sizeof(ctypes.c_uint32))
    while True:
        groups = (ctypes.c_uint32 * (size.value // ctypes.sizeof(ctypes.c_uint32)))()
        if not _LIBC.getsockopt(sock.fileno(), socket.SOL_SOCKET, SO_PEERGROUPS, groups, ctypes.byref(size)):
            return tuple(groups[: size.value // ctypes.sizeof(ctypes.c_uint32)])
        if (number := ctypes.get_errno()) != errno.ERANGE:  # with ERANGE the kernel returns the size it needs
            raise OSError(number, f"SO_PEERGROUPS: {os.strerror(number)}")


def pass_rights(sock: socket.socket, *, allowed: bool) -> None:
    """Allow the other end to send descriptors, or make its sendmsg(2) fail with EPERM.

    OSError: ENOPROTOOPT before Linux 6.16.
    """
    sock.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, int(allowed))
