# SPDX-License-Identifier: LGPL-2.1-or-later
"""/dev/liveupdate, the Live Update Orchestrator (LUO): sessions of file descriptors that outlive a kexec.

Only one process may have the device open, and the service manager needs it at boot and at shutdown: open it, make one
call, close it. A session belongs to its own descriptor, not to the device's.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from khod.abi.named import os_error_context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

LIVEUPDATE = "/dev/liveupdate"

# include/uapi/linux/liveupdate.h
LIVEUPDATE_IOCTL_TYPE = 0xBA
LIVEUPDATE_SESSION_NAME_LENGTH = 64  # bytes, the NUL included

LIVEUPDATE_IOCTL_CREATE_SESSION = LIVEUPDATE_IOCTL_TYPE << 8 | 0x00  # _IO: neither direction nor size
LIVEUPDATE_IOCTL_RETRIEVE_SESSION = LIVEUPDATE_IOCTL_TYPE << 8 | 0x01
LIVEUPDATE_SESSION_PRESERVE_FD = LIVEUPDATE_IOCTL_TYPE << 8 | 0x40
LIVEUPDATE_SESSION_RETRIEVE_FD = LIVEUPDATE_IOCTL_TYPE << 8 | 0x41
LIVEUPDATE_SESSION_FINISH = LIVEUPDATE_IOCTL_TYPE << 8 | 0x42
LIVEUPDATE_SESSION_GET_NAME = LIVEUPDATE_IOCTL_TYPE << 8 | 0x43

# Each structure begins with its own size. `fd` is input or output, `token` is __aligned_u64.
NAMED = struct.Struct(f"=Ii{LIVEUPDATE_SESSION_NAME_LENGTH}s")  # struct liveupdate_ioctl_{create,retrieve}_session
TOKEN = struct.Struct("=IiQ")  # struct liveupdate_session_{preserve,retrieve}_fd
FINISH = struct.Struct("=II")  # struct liveupdate_session_finish: size, reserved
GET_NAME = struct.Struct(f"=II{LIVEUPDATE_SESSION_NAME_LENGTH}s")  # struct liveupdate_session_get_name

NO_TOKEN = (1 << 64) - 1


def open_device(path: Path | str) -> int:
    """Open the device. OSError: ENOENT without LUO, EBUSY if it is open elsewhere, EIO for good after a failure."""
    with os_error_context(f"open {path}"):
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)


def create_session(device: int, name: str) -> int:
    """Create an outgoing session and return its descriptor; closing the last copy releases all that it preserves.

    OSError: ENAMETOOLONG above 63 bytes, EEXIST for the name of another outgoing session, EINVAL for an empty name
    (6.19 accepts that). No kernel reserves the name `systemd` for the service manager; the caller must.
    """
    return _named_session(device, LIVEUPDATE_IOCTL_CREATE_SESSION, "CREATE_SESSION", name)


def retrieve_session(device: int, name: str) -> int:
    """Return the descriptor of a session from the previous kernel; closing the last copy finishes the session.

    OSError: ENOENT if no session of that name came or it was closed since, EINVAL while a process has it.
    """
    return _named_session(device, LIVEUPDATE_IOCTL_RETRIEVE_SESSION, "RETRIEVE_SESSION", name)


def preserve_fd(session: int, fd: int, token: int) -> None:
    """Preserve the file of `fd` in an outgoing session, under a 64-bit `token` that is unique in this session.

    A memfd is pinned with every hole allocated, and keeps its size; its bytes are handed over as they are at the jump.
    OSError: ENOENT for a kind of file without a handler, EEXIST for a token in use, EBUSY for a file that is preserved
    already (6.19 does not notice), EINVAL on a retrieved session, ENOSPC for a full one (6.19: 128 files).
    """
    with os_error_context(f"SESSION_PRESERVE_FD(session={session}, fd={fd}, token={token:#x})"):
        _check_token(token)
        fcntl.ioctl(session, LIVEUPDATE_SESSION_PRESERVE_FD, TOKEN.pack(TOKEN.size, fd, token))


def retrieve_fd(session: int, token: int) -> int:
    """Return a descriptor of a file in a retrieved session; every call gives the same open file.

    OSError: ENOENT for an unknown token and after finish, EINVAL on an outgoing session. A retrieval that failed once
    fails the same way each time.
    """
    with os_error_context(f"SESSION_RETRIEVE_FD(session={session}, token={token:#x})"):
        _check_token(token)
        argument = bytearray(TOKEN.pack(TOKEN.size, -1, token))
        fcntl.ioctl(session, LIVEUPDATE_SESSION_RETRIEVE_FD, argument)
    return _close_on_exec(TOKEN.unpack(argument)[1])


def finish_session(session: int) -> None:
    """End a retrieved session: files taken out of it live on and may be preserved again, the others are freed.

    The call may be repeated. OSError: EINVAL on an outgoing session (6.19 accepts that).
    """
    with os_error_context(f"SESSION_FINISH(session={session})"):
        fcntl.ioctl(session, LIVEUPDATE_SESSION_FINISH, FINISH.pack(FINISH.size, 0))


def get_name(session: int) -> str:
    """Return the name of a session. OSError: ENOTTY if it is not one, EINVAL if the kernel cannot tell (6.19)."""
    with os_error_context(f"SESSION_GET_NAME(session={session})"):
        argument = bytearray(GET_NAME.pack(GET_NAME.size, 0, b""))
        fcntl.ioctl(session, LIVEUPDATE_SESSION_GET_NAME, argument)
    name: bytes = GET_NAME.unpack(argument)[2]
    return os.fsdecode(name.partition(b"\0")[0])


def is_incoming(session: int) -> bool:
    """Whether a session came from the previous kernel; found by a call that preserves nothing.

    The call is given an invalid descriptor: EINVAL in a session from the previous kernel, EBADF in an outgoing one
    (seen on 7.3.4). 6.19 does not distinguish them and returns EBADF for both.
    """
    try:
        preserve_fd(session, -1, NO_TOKEN)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return True
        if error.errno in (errno.EBADF, errno.EEXIST, errno.ENOSPC):
            return False
        raise
    return False


def _named_session(device: int, request: int, call: str, name: str) -> int:
    with os_error_context(f"{call}({name!r})"):
        raw = os.fsencode(name)
        _check_name(raw)
        argument = bytearray(NAMED.pack(NAMED.size, -1, raw))
        fcntl.ioctl(device, request, argument)
    return _close_on_exec(NAMED.unpack(argument)[1])


def _check_name(raw: bytes) -> None:
    """Refuse a name that would be changed: struct cuts one that is too long, the kernel cuts one at a NUL."""
    if len(raw) >= LIVEUPDATE_SESSION_NAME_LENGTH:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    if b"\0" in raw:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def _check_token(token: int) -> None:
    if not 0 <= token < 1 << 64:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def _close_on_exec(fd: int) -> int:
    """Set close-on-exec on a descriptor: the kernels seen do so, but the header does not promise it."""
    os.set_inheritable(fd, False)
    return fd
