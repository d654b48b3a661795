# SPDX-License-Identifier: LGPL-2.1-or-later
"""LUO, the Live Update Orchestrator (Linux 6.19 and later): files that outlive a kexec, and what its errnos mean."""

import errno
import fcntl
import os
import stat
from collections.abc import Sequence
from typing import TYPE_CHECKING

from khod.abi.calls import Calls
from khod.abi.liveupdate import LIVEUPDATE
from khod.abi.statx import statx
from khod.deferred import defer_module
from khod.errors import KhoError, Refused, Unsupported
from khod.kernel.errnos import UNIT, Errnos
from khod.kernel.sysfs import KHO
from khod.model import Kept

if TYPE_CHECKING:
    from khod.kernel import explain, kconfig
else:
    explain = defer_module("khod.kernel.explain")
    kconfig = defer_module("khod.kernel.kconfig")

F_SEAL_EXEC = 0x0020  # include/uapi/linux/fcntl.h
HUGE_PAGE_BYTES = 1 << 16  # bytes; the smallest huge page is larger on every architecture except 64K-page arm64
ABSENT = (errno.ENOENT, errno.ENODEV, errno.ENXIO)
LOG = "Look at the kernel log: journalctl -kb -g 'luo|memfd'"
NEWER = "Boot a kernel (6.19 or later) with CONFIG_LIVEUPDATE=y."
BROKEN = f"{LOG}. It stays so until a reboot."
TOO_MANY = "Raise LimitNOFILE= (systemctl edit kho-handover.service), or hand over fewer files."
NO_SESSION = ("this kernel's LUO does not know the call, or the descriptor is not a session", LOG)
SESSION: Errnos = {
    errno.EBUSY: ("another process has the device open", "Find it with: fuser -v /dev/liveupdate"),
    errno.EIO: ("what the previous kernel handed over cannot be read", BROKEN),
    errno.ENOENT: ("the previous kernel handed no such session over", f"khoctl check says what came. {LOG}"),
    errno.EINVAL: ("something else took it", "systemd-analyze fdstore shows where it is kept."),
    errno.EEXIST: ("a session of that name is there already", "`Abort(force)` closes what khod does not know."),
    errno.ENOMEM: (
        "there is no memory for it, or the kernel takes no more sessions (6.19: 744)",
        "Free memory (free -m), or let one producer hand over more files.",
    ),
    errno.ENOSPC: ("the kernel takes no more sessions", "Let one producer hand over more files."),
    errno.EPERM: ("khod lacks the right", UNIT),
    errno.EACCES: ("khod may not open the device", UNIT),
    errno.EMFILE: ("khod has too many files open", TOO_MANY),
    errno.ENFILE: ("the system has too many files open", "Raise it: sysctl fs.file-max; cat /proc/sys/fs/file-nr"),
    errno.ENAMETOOLONG: ("its name is longer than 63 bytes", "Give the producer a shorter name."),
    errno.ENOTTY: NO_SESSION,
}
"""Opening /dev/liveupdate, CREATE_SESSION and RETRIEVE_SESSION."""
PRESERVE: Errnos = {
    # Seen on 7.3.4 for hugetlb memfds, pipes, sockets, files with a name, devices, eventfds, other sessions.
    errno.ENOENT: ("nothing in this kernel preserves files of that kind", "Hand over a memfd without MFD_HUGETLB."),
    errno.EOPNOTSUPP: ("it has a seal that this kernel does not preserve", "Make it without that seal: F_GET_SEALS"),
    errno.EEXIST: ("that token is in use in this session", "Give each file a token of its own."),
    errno.EBUSY: (
        "it is preserved already, or its pages are in use elsewhere",
        "Hand each file over once; with `failed to pin folios` in the kernel log: end its I/O, then try again.",
    ),
    errno.ENOSPC: ("the session takes no more files", "Use another producer name for the rest."),
    errno.EFBIG: ("it has more than 4,294,967,295 pages", "Split it into several files."),
    errno.ENOMEM: (
        "there is no memory to preserve it",
        "Free memory (free -m): every hole is filled, and what lies in scratch moves out.",
    ),
    errno.EINVAL: (
        "this session came from the previous kernel, or the file's pages cannot be pinned",
        "khoctl check says what was not taken back yet; `failed to pin folios` in the kernel log means the file.",
    ),
    errno.EBADF: ("it is not an open file", "Keep it open until the answer has come."),
    errno.ENODEV: ("the module that preserves such files is being unloaded", "Load it again: modprobe"),
    errno.ENOTTY: NO_SESSION,
}
"""SESSION_PRESERVE_FD; errnos of a file's own driver are passed through."""
RETRIEVE: Errnos = {
    errno.ENOENT: ("the session holds no such token, or was finished", "Take it by the token it left under."),
    errno.EINVAL: ("the session is an outgoing one, or what the file was kept in is damaged", BROKEN),
    errno.EIO: ("its memory did not arrive", BROKEN),
    errno.ENOMEM: ("there was no memory for it, or khod's memory limit was reached", f"Raise MemoryMax=. {BROKEN}"),
    errno.ENOSPC: ("the limit of shared memory was reached", f"Raise the size of /dev/shm. {BROKEN}"),
    errno.EEXIST: ("two parts of it have the same place", BROKEN),
    errno.EOPNOTSUPP: ("it has a seal that this kernel does not know", f"Jump to a kernel that does. {BROKEN}"),
    errno.EMFILE: ("khod has too many files open", TOO_MANY),
    errno.ENFILE: SESSION[errno.ENFILE],
    errno.ENOTTY: NO_SESSION,
}
"""SESSION_RETRIEVE_FD: a call that failed once fails the same way each time."""
FINISH: Errnos = {
    errno.EBUSY: ("a file in it is not ready to be let go", "Take all of its files first: khoctl check names them."),
    errno.EINVAL: ("it is an outgoing session", "khoctl abort closes it."),
    errno.ENOTTY: NO_SESSION,
}
"""SESSION_FINISH."""


class Luo:
    """The calls of /dev/liveupdate with their errnos described; use it in the kernel's thread."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def create_session(self, name: str) -> int:
        """Create an outgoing session and return its descriptor."""
        try:
            return self._calls.create_session(name)
        except OSError as error:
            raise self._no_session(error, "The kernel makes no LUO session", absent=ABSENT) from error

    def retrieve_session(self, name: str) -> int:
        """Return the descriptor of a session from the previous kernel."""
        try:
            return self._calls.retrieve_session(name)
        except OSError as error:
            absent = ABSENT if not self._calls.path_exists(LIVEUPDATE) else ()
            raise self._no_session(error, f"The LUO session {name} cannot be taken", absent=absent) from error

    def preserve_file(self, session: int, fd: int, kept: Kept) -> None:
        """Preserve one file in an outgoing session."""
        if sealed_for_good(fd):
            raise Refused(
                f"{kept.name} ({describe_fd(fd)}) would come back read-only: it has F_SEAL_EXEC",
                where=f"token {kept.token}",
                remedy="Make it without MFD_NOEXEC_SEAL.",
            )
        try:
            self._calls.preserve_fd(session, fd, kept.token)
        except OSError as error:
            raise Refused(
                **explain.put_errno(f"{kept.name} ({describe_fd(fd)}) cannot be preserved", PRESERVE, error, LOG)
            ) from error

    def retrieve_files(self, session: int, kept: Sequence[Kept]) -> list[int]:
        """Return a descriptor for every file, or raise Refused: the kernel gives the same errno each time."""
        taken: list[int] = []
        for file in kept:
            try:
                taken.append(self._calls.retrieve_fd(session, file.token))
            except OSError as error:
                for fd in taken:
                    os.close(fd)
                raise Refused(
                    **explain.put_errno(f"{file.name} (token {file.token}) did not arrive", RETRIEVE, error, LOG)
                ) from error
        return taken

    def finish_session(self, session: int) -> None:
        """End a retrieved session."""
        try:
            self._calls.finish_session(session)
        except OSError as error:
            raise Refused(
                **explain.put_errno("The kernel does not let go of a LUO session", FINISH, error, LOG)
            ) from error

    def _no_session(self, error: OSError, what: str, absent: Sequence[int]) -> KhoError:
        if error.errno in absent:
            return self.why_not()
        return Refused(**explain.put_errno(what, SESSION, error, LOG))

    def why_not(self) -> Unsupported:
        """Return the error that says why this kernel has no LUO, and what to add."""
        try:
            built, on = (
                kconfig.built_in(self._calls, "CONFIG_LIVEUPDATE", "luo_"),
                kconfig.booted_with(self._calls, "liveupdate"),
            )
        except OSError:
            built, on = None, False
        if self._calls.path_exists(KHO):
            what, remedy = "has the v3 series' Kexec HandOver, which came years before it", NEWER
        elif built is False:
            what, remedy = "was built without it", NEWER
        elif not on or not kconfig.kho_on(self._calls):
            what, remedy = (
                "was not booted with both kho=on and liveupdate=on",
                "Add kho=on liveupdate=on and boot again.",
            )
        else:
            what, remedy = "does not offer it", "Look for `luo` in the kernel log."
        return Unsupported(
            f"This kernel keeps no producer's files: the Live Update Orchestrator is not there, it {what}",
            where=LIVEUPDATE,
            remedy=remedy,
        )


def sealed_for_good(fd: int) -> bool:
    """Whether a memfd has F_SEAL_EXEC, with which it loses write access: 7.3.4 returns the seals 0x20 as 0x3e."""
    try:
        return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & F_SEAL_EXEC)
    except OSError:
        return False  # not a memfd


def describe_fd(fd: int) -> str:
    """Describe what a descriptor refers to, for people: `a pipe`, `a hugetlb memfd`, `a regular file`."""
    try:
        found, target = statx(fd), os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return "no open file"
    mode = found.mode
    if target.startswith("/memfd:"):
        # Both kinds have /memfd: in their name; hugetlbfs has its page size as block size.
        return "a hugetlb memfd" if found.blksize > HUGE_PAGE_BYTES else "a memfd"
    if target.startswith("anon_inode:"):
        return target.removeprefix("anon_inode:").strip("[]").split()[0]
    named = [(stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISDIR, "a directory")]
    named += [(stat.S_ISCHR, "a character device"), (stat.S_ISBLK, "a block device"), (stat.S_ISREG, "a regular file")]
    return next((text for is_kind, text in named if is_kind(mode)), "a file")
