# SPDX-License-Identifier: LGPL-2.1-or-later
"""The Live Update Orchestrator in memory: sessions that live as long as somebody has them open."""

import errno
import os
from dataclasses import dataclass, field

from khod.abi.liveupdate import LIVEUPDATE
from tests.model.process import File, Memory, Process, file_of

NAME_SIZE = 64  # LIVEUPDATE_SESSION_NAME_LENGTH, the NUL included


def refuse(number: int, what: str) -> OSError:
    return OSError(number, os.strerror(number), what)


class Session(File):
    """An open LUO session: what it holds by token, and whether it came from the previous kernel."""

    def __init__(self, luo: "MemoryLuo", name: str, files: dict[int, Memory], *, incoming: bool) -> None:
        super().__init__()
        self.luo, self.name, self.files, self.incoming = luo, name, files, incoming

    def released(self, cause: str) -> None:
        self.luo.released(self, cause)


@dataclass
class MemoryLuo:
    """The Live Update Orchestrator. `freed` are the sessions of the previous kernel whose content was lost, and how."""

    sessions: list[Session] = field(default_factory=list)
    arrived: dict[str, dict[int, Memory]] = field(default_factory=dict)
    freed: list[tuple[str, str]] = field(default_factory=list)
    busy: int = 0

    @property
    def outgoing(self) -> dict[str, dict[int, Memory]]:
        """What would leave with a jump now."""
        return {session.name: dict(session.files) for session in self.sessions if not session.incoming}

    @property
    def unclaimed(self) -> set[str]:
        """Sessions of the previous kernel that still hold something."""
        held = {session.name for session in self.sessions if session.incoming and session.files}
        return held | {name for name, files in self.arrived.items() if files}

    def released(self, session: Session, cause: str) -> None:
        self.sessions.remove(session)
        if session.incoming and session.files:
            self.freed.append((session.name, cause))

    def create(self, process: Process, name: str) -> int:
        what = f"CREATE_SESSION({name!r})"
        self._opens()
        if not name or len(name.encode()) >= NAME_SIZE:
            raise refuse(errno.EINVAL, what)
        if any(session.name == name and not session.incoming for session in self.sessions):
            raise refuse(errno.EEXIST, what)
        return self._opened(process, name, {}, incoming=False)

    def retrieve(self, process: Process, name: str) -> int:
        what = f"RETRIEVE_SESSION({name!r})"
        self._opens()
        if any(session.name == name and session.incoming for session in self.sessions):
            raise refuse(errno.EINVAL, what)
        if name not in self.arrived:
            raise refuse(errno.ENOENT, what)
        return self._opened(process, name, self.arrived.pop(name), incoming=True)

    def preserve(self, fd: int, memory: int, token: int) -> None:
        what = f"SESSION_PRESERVE_FD(token={token:#x})"
        session, file = self._session(fd, what), file_of(memory)
        if session.incoming:
            raise refuse(errno.EINVAL, what)
        if token in session.files:
            raise refuse(errno.EEXIST, what)
        if not isinstance(file, Memory):
            raise refuse(errno.ENOENT, what)
        if any(file is kept for each in self.sessions for kept in each.files.values()):
            raise refuse(errno.EBUSY, what)
        session.files[token] = file

    def retrieve_fd(self, process: Process, fd: int, token: int) -> int:
        what = f"SESSION_RETRIEVE_FD(token={token:#x})"
        session = self._session(fd, what)
        if not session.incoming:
            raise refuse(errno.EINVAL, what)
        if token not in session.files:
            raise refuse(errno.ENOENT, what)
        return process.open(session.files[token])

    def finish(self, fd: int) -> str:
        """Let go of what is in a retrieved session; its name."""
        what = "SESSION_FINISH()"
        session = self._session(fd, what)
        if not session.incoming:
            raise refuse(errno.EINVAL, what)
        session.files = {}
        return session.name

    def jump(self, *, arrives: bool) -> None:
        """The next kernel: what is in open outgoing sessions arrives. Every descriptor has gone with its process."""
        going = self.outgoing if arrives else {}
        self.sessions, self.freed = [], []
        self.arrived = {
            name: {token: Memory(memory.content) for token, memory in files.items()} for name, files in going.items()
        }

    def _opens(self) -> None:
        if self.busy:
            self.busy -= 1
            raise refuse(errno.EBUSY, f"open {LIVEUPDATE}")

    def _opened(self, process: Process, name: str, files: dict[int, Memory], *, incoming: bool) -> int:
        session = Session(self, name, files, incoming=incoming)
        self.sessions.append(session)
        return process.open(session)

    def _session(self, fd: int, what: str) -> Session:
        file = file_of(fd)
        if not isinstance(file, Session):
            raise refuse(errno.ENOTTY, what)
        return file
