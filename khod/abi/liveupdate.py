# SPDX-License-Identifier: LGPL-2.1-or-later
"""/dev/liveupdate, the Live Update Orchestrator (LUO): sessions of file descriptors that outlive a kexec.

The device lets one process in at a time, and the service manager wants it at boot and at shutdown:
open it, make one call, close it. A session lives by its own descriptor, not by the device's.
"""

import errno
import fcntl
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from khod.abi.named import os_error_context

# include/uapi/linux/liveupdate.h
LIVEUPDATE_IOCTL_TYPE = 0xBA
LIVEUPDATE_SESSION_NAME_LENGTH = 64  # bytes, the NUL included

LIVEUPDATE_IOCTL_CREATE_SESSION = LIVEUPDATE_IOCTL_TYPE << 8 | 0x00  # _IO: neither direction nor size
LIVEUPDATE_IOCTL_RETRIEVE_SESSION = LIVEUPDATE_IOCTL_TYPE << 8 | 0x01
LIVEUPDATE_SESSION_PRESERVE_FD = LIVEUPDATE_IOCTL_TYPE << 8 | 0x40
LIVEUPDATE_SESSION_RETRIEVE_FD = LIVEUPDATE_IOCTL_TYPE << 8 | 0x41
LIVEUPDATE_SESSION_FINISH = LIVEUPDATE_IOCTL_TYPE << 8 | 0x42
LIVEUPDATE_SESSION_GET_NAME = LIVEUPDATE_IOCTL_TYPE << 8 | 0x43

# Each begins with its own size. `fd` goes either way, `token` is __aligned_u64.
NAMED = struct.Struct(f"=Ii{LIVEUPDATE_SESSION_NAME_LENGTH}s")  # struct liveupdate_ioctl_{create,retrieve}_session
TOKEN = struct.Struct("=IiQ")  # struct liveupdate_session_{preserve,retrieve}_fd
FINISH = struct.Struct("=II")  # struct liveupdate_session_finish: size, reserved
GET_NAME = struct.Struct(f"=II{LIVEUPDATE_SESSION_NAME_LENGTH}s")  # struct liveupdate_session_get_name

NO_TOKEN = (1 << 64) - 1


@dataclass(frozen=True)
class Session:
    """A session as its descriptor shows it: `name` is "" and `incoming` None where this kernel does not tell (6.19)."""

    name: str
    incoming: bool | None


def open_device(path: Path) -> int:
    """Open the device. OSError: ENOENT without LUO, EBUSY while another has it open, EIO for good after a failure."""
    with os_error_context(f"open {path}"):
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)


def create_session(device: int, name: str) -> int:
    """Make an outgoing session; its descriptor. When the last copy of it is closed, all that it preserves is let go.

    OSError: ENAMETOOLONG above 63 bytes, EEXIST where there is an outgoing session of that name. EINVAL for an empty
    name, but 6.19 takes one. No kernel keeps the name `systemd` for the service manager: the caller must.
    """
    return _named_session(device, LIVEUPDATE_IOCTL_CREATE_SESSION, "CREATE_SESSION", name)


def retrieve_session(device: int, name: str) -> int:
    """Take a session that came from the kernel before; its descriptor. Closing the last copy finishes it.

    OSError: ENOENT where none of that name came or it was closed since, EINVAL while somebody has it.
    """
    return _named_session(device, LIVEUPDATE_IOCTL_RETRIEVE_SESSION, "RETRIEVE_SESSION", name)


def preserve_fd(session: int, fd: int, token: int) -> None:
    """Hand the file of `fd` to an outgoing session, under a `token` of 64 bits that is its own in this session.

    A memfd is pinned with every hole allocated, and keeps its size; its bytes go over as they are at the jump.
    OSError: ENOENT for a kind of file that no handler takes, EEXIST for the token, EBUSY for a file that is preserved
    already (6.19 does not notice), EINVAL on a retrieved session, ENOSPC for a full one (6.19: 128 files).
    """
    with os_error_context(f"SESSION_PRESERVE_FD(session={session}, fd={fd}, token={token:#x})"):
        _check_token(token)
        fcntl.ioctl(session, LIVEUPDATE_SESSION_PRESERVE_FD, TOKEN.pack(TOKEN.size, fd, token))


def retrieve_fd(session: int, token: int) -> int:
    """Take a file out of a retrieved session; a descriptor of it, each time of the same open file.

    OSError: ENOENT for an unknown token and after finish, EINVAL on an outgoing session. What failed once fails the
    same way each time.
    """
    with os_error_context(f"SESSION_RETRIEVE_FD(session={session}, token={token:#x})"):
        _check_token(token)
        argument = bytearray(TOKEN.pack(TOKEN.size, -1, token))
        fcntl.ioctl(session, LIVEUPDATE_SESSION_RETRIEVE_FD, argument)
    return _close_on_exec(TOKEN.unpack(argument)[1])


def finish_session(session: int) -> None:
    """End a retrieved session: files taken out of it live on and may be preserved anew, the others are freed.

    It may be repeated. OSError: EINVAL on an outgoing session (6.19 says yes to that).
    """
    with os_error_context(f"SESSION_FINISH(session={session})"):
        fcntl.ioctl(session, LIVEUPDATE_SESSION_FINISH, FINISH.pack(FINISH.size, 0))


def get_name(session: int) -> str:
    """Name of a session. OSError: ENOTTY where `session` is something else, EINVAL where the kernel (6.19) cannot."""
    with os_error_context(f"SESSION_GET_NAME(session={session})"):
        argument = bytearray(GET_NAME.pack(GET_NAME.size, 0, b""))
        fcntl.ioctl(session, LIVEUPDATE_SESSION_GET_NAME, argument)
    name: bytes = GET_NAME.unpack(argument)[2]
    return os.fsdecode(name.partition(b"\0")[0])


def is_incoming(session: int) -> bool:
    """Whether a session came from the kernel before, by what it says to a file that is none: nothing is preserved.

    EINVAL there, EBADF in an outgoing session (seen on 7.3.4). 6.19 does not look, and says EBADF to both.
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
    """Refuse what would come out as another name: struct cuts one that is too long, the kernel one with a NUL."""
    if len(raw) >= LIVEUPDATE_SESSION_NAME_LENGTH:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    if b"\0" in raw:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def _check_token(token: int) -> None:
    if not 0 <= token < 1 << 64:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def _close_on_exec(fd: int) -> int:
    """The kernels seen give close-on-exec descriptors; the header promises none."""
    os.set_inheritable(fd, False)
    return fd
