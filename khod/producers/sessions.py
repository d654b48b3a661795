# SPDX-License-Identifier: LGPL-2.1-or-later
"""LUO sessions: one for each producer that hands over descriptors, kept where khod's death does not end them.

The kernel drops a session when its last descriptor is closed. That is the undo, and also the danger: so a session goes
into the service manager's store before anything is preserved in it. `/dev/liveupdate` is open only during one call.
"""

import asyncio
import errno
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from khod.abi.statx import statx
from khod.concurrency.worker import Worker
from khod.errors import KhoError, Refused
from khod.handover.session_names import PREFIX
from khod.kernel.account import Account, Grown, Measured, format_bytes
from khod.kernel.luo import Luo
from khod.kernel.memory import MemoryBounds, read_memory
from khod.model import Kept
from khod.producers.contents import KeptFiles
from khod.systemd.fdstore import FdStore

LOG = logging.getLogger(__name__)
T = TypeVar("T")
MAX_SESSIONS = 700
"""Maximum number of sessions: below what kernels take (819 were seen on 6.19.11) and FileDescriptorStoreMax= of the
unit."""
DEVICE_IS_HELD = 5.0
"""Seconds that another process (PID 1 at boot) may have the device open."""
RETRY_SECONDS = 0.1
GONE = (errno.ENOENT, errno.ENODEV, errno.ENXIO, errno.EINVAL)
"""Errnos of RETRIEVE_SESSION for a session that did not arrive, that another process took, or on a kernel without
LUO."""


class Sessions:
    """The LUO sessions of this host, by name. Methods raise KhoError, Unsupported if the kernel has no LUO."""

    def __init__(
        self,
        luo: Luo,
        thread: Worker,
        store: FdStore,
        *,
        passed: Mapping[str, int] | None = None,
        max_bytes: Callable[[], int] = lambda: sys.maxsize,
        memory: Callable[[], MemoryBounds] = read_memory,
        account: Path | None = None,
        kept_files: KeptFiles | None = None,
    ) -> None:
        """Begin with the sessions in `passed`, which the service manager kept.

        All outgoing files together may have at most `max_bytes()`, or what the host's memory allows. `account` is the
        file that keeps their size for the next khod. `kept_files` keeps descriptors of the outgoing files.
        """
        self.kept_files = kept_files or KeptFiles(thread)
        self._luo = luo
        self._thread = thread
        self._store = store
        self._inodes: dict[str, set[tuple[tuple[int, int], int]]] = {}
        self._fds = {name: fd for name, fd in (passed or {}).items() if name.startswith(PREFIX)}
        self._account = Account(max_bytes, memory, account)
        self._account.take_up(self._fds)

    @property
    def holds_any(self) -> bool:
        """Whether there are any sessions."""
        return bool(self._fds)

    async def preserve_files(self, session: str, files: Sequence[tuple[Kept, int]], deadline: float) -> None:
        """Preserve files in an outgoing session; if there is none yet, create it and put it into the store before."""
        given = [(found.dev, found.ino) for found in (statx(file) for _, file in files)]
        known = self._inodes.setdefault(session, set())
        if len({*given}) < len(given) or not all(map(frozenset(given).isdisjoint, self._inodes.values())):
            # 7.3.4 returns EBUSY, also across sessions; 6.19.11 takes the file, and gives the same memory to two.
            raise Refused("The same file is handed over twice", remedy="Hand each file over once.")
        known.update(given)  # at once: another call may bring the same file while this one waits
        try:
            fd = await self._outgoing_session(session, deadline)
        except BaseException:
            known.difference_update(given)
            raise

        def preserve_files() -> None:
            kept: list[Kept] = []
            try:
                self._preserve_within(session, fd, files, kept)
            finally:
                known.difference_update(given[len(kept) :])  # here: the call may end after its caller stopped waiting

        try:
            await self._call_kernel(preserve_files, deadline)
        except Grown:
            self.close_session(session)  # it exceeds the limit: at once, not when its producer is told of the veto
            raise
        if session in self._fds:  # it was not closed meanwhile
            self.kept_files.keep_files(session, files)

    async def _outgoing_session(self, session: str, deadline: float) -> int:
        """Return the descriptor of an outgoing session; if there is none yet, create it and put it into the store."""
        if session not in self._fds:
            if len(self._fds) >= MAX_SESSIONS:
                raise Refused(
                    f"{MAX_SESSIONS} producers have LUO sessions already", remedy="Let one producer hand over more."
                )
            self._fds[session] = await self._on_device(
                lambda: self._luo.create_session(session), deadline, self._close_late
            )
            self._store.store_fd(session, self._fds[session])
            try:
                await self._store.wait_settled()
            except OSError as error:  # a TimeoutError is one
                raise Refused(
                    f"The service manager did not take a LUO session into its store: {error}",
                    where="FDSTORE",
                    remedy="systemctl status",
                ) from None
        if (fd := self._fds.get(session)) is None:
            raise Refused("The handover was aborted before the files were preserved", where=session)
        return fd

    def _preserve_within(self, session: str, fd: int, files: Sequence[tuple[Kept, int]], done: list[Kept]) -> None:
        """Preserve files if the limit allows their sizes; nothing else is preserved meanwhile.

        Every file that the kernel keeps is added to `done`, also if another one fails.
        """
        if len(files) > 1:  # all of them, before the first one is filled
            self._account.require_room([Measured.measure_file(kept, file) for kept, file in files])
        try:
            for kept, file in files:
                before = Measured.measure_file(kept, file)  # the size just before the call: its owner may write to it
                self._account.require_room([before])
                self._account.count_session(session, before.size)
                try:
                    self._luo.preserve_file(fd, file, kept)
                except KhoError:
                    self._account.count_session(session, -before.size)
                    raise
                done.append(kept)
                # From here on the kernel does not let the size change.
                if (after := Measured.measure_file(kept, file)).size > before.size:
                    self._account.count_session(session, after.size - before.size)
                    raise Grown(
                        f"{before} grew to {format_bytes(after.size)} while it was handed over",
                        where=kept.name,
                        remedy="Give a file its size before it is handed over.",
                    )
        finally:
            self._account.write_account()

    def take_over(self, session: str, fd: int) -> None:
        """Take over a session that the early restore has retrieved; the service manager has it already."""
        self._fds[session] = fd  # one operation: it may be made in another thread

    async def retrieve_files(self, session: str, kept: Sequence[Kept], deadline: float) -> list[int]:
        """Return descriptors of the files of a session from the previous kernel; they are the caller's."""
        if session not in self._fds:
            # systemd carries sessions across `systemctl kexec`; after an immediate jump nobody has asked the kernel for
            # them yet.
            await self._retrieve_session(session, deadline)
        fd = self._fds[session]

        def files() -> list[int]:
            self._account.release_session(session)  # it has no outgoing files
            return self._luo.retrieve_files(fd, kept)

        return await self._call_kernel(files, deadline, lambda fds: self._close_late(*fds))

    async def finish_session(self, session: str, deadline: float) -> None:
        """Release a session whose files were all given back."""
        if (fd := self._fds.get(session)) is not None:
            await self._call_kernel(lambda: self._luo.finish_session(fd), deadline)
            self.close_session(session)

    async def drop_session(self, session: str, deadline: float) -> None:
        """Free what a session of the previous kernel holds; without effect if it did not arrive.

        Except for `finish`, nothing else ends such a session: the caller must have been told to.
        """
        if session not in self._fds:
            try:
                await self._retrieve_session(session, deadline)
            except KhoError as error:
                if getattr(error.__cause__, "errno", None) in GONE:
                    return
                raise
        try:
            await self.finish_session(session, deadline)
        except KhoError as error:
            if getattr(error.__cause__, "errno", None) != errno.EINVAL:  # an outgoing session ends when it is closed
                raise
        self.close_session(session)

    def close_session(self, session: str) -> None:
        """Close a session, also in the store; an outgoing one then no longer preserves anything."""
        self._inodes.pop(session, None)
        self.kept_files.release_session(session)
        if (fd := self._fds.pop(session, None)) is not None:
            self._store.remove_fd(session)
            # Not before a call with this descriptor is over: otherwise its number could be another session's by then.
            self._thread.call_later(lambda: self._let_go(session, fd))

    def _let_go(self, session: str, fd: int) -> None:
        os.close(fd)
        self._account.release_session(session)

    def of_run(self, run: str) -> list[str]:
        """Return the names of the sessions that are held for one handover."""
        return sorted(name for name in self._fds if name.startswith(f"{PREFIX}{run}-"))

    @property
    def session_names(self) -> list[str]:
        """The names of all sessions that are held."""
        return sorted(self._fds)

    async def _retrieve_session(self, session: str, deadline: float) -> None:
        def retrieve() -> int:
            fd = self._luo.retrieve_session(session)
            try:  # at once: if khod died before it is sent, what the session holds would be freed
                self._store.store_fd(session, fd)
                self._store.wait_sent()
            except Exception:  # khod's own descriptor keeps it
                LOG.exception("a LUO session cannot be kept by the service manager")
            return fd

        def keep(fd: int) -> None:
            """Keep the session, also if it came after the caller stopped waiting."""
            self._fds[session] = fd

        keep(await self._on_device(retrieve, deadline, keep))

    def _close_late(self, *fds: int) -> None:
        """Close descriptors that came after the caller stopped waiting."""
        for fd in fds:
            self._thread.call_later(partial(os.close, fd))

    async def _on_device(self, function: Callable[[], T], deadline: float, late: Callable[[T], object]) -> T:
        """Make a call that opens /dev/liveupdate; wait while another process has it. Refused after DEVICE_IS_HELD."""
        loop = asyncio.get_running_loop()
        until = loop.time() + DEVICE_IS_HELD
        while True:
            try:
                return await self._call_kernel(function, deadline, late)
            except KhoError as error:
                if getattr(error.__cause__, "errno", None) != errno.EBUSY:
                    raise
                if loop.time() >= until:
                    raise Refused(
                        "Another process has /dev/liveupdate open",
                        where="/dev/liveupdate",
                        remedy="Find it with: fuser /dev/liveupdate",
                    ) from None
            await asyncio.sleep(RETRY_SECONDS)

    async def _call_kernel(
        self, function: Callable[[], T], deadline: float, late: Callable[[T], object] | None = None
    ) -> T:
        return await self._thread.call_within(function, "preserving files", deadline, late)
