# SPDX-License-Identifier: LGPL-2.1-or-later
"""LUO sessions: one for each producer that hands descriptors over, kept where khod's death does not reach them.

The kernel drops a session when its last descriptor is closed. That is the undo, and the danger: so a
session goes into the service manager's store before anything is preserved in it. `/dev/liveupdate` is
open for the time of one call only.
"""

import asyncio
import errno
import hashlib
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
from khod.kernel.account import Account, Grown, Measured, format_bytes
from khod.kernel.luo import Luo
from khod.kernel.memory import MemoryBounds, read_memory
from khod.model import Kept
from khod.systemd.fdstore import FdStore

LOG = logging.getLogger(__name__)
T = TypeVar("T")
PREFIX = "khod-"
MAX_SESSIONS = 700
"""Sessions at a time: below what kernels take (819 were seen on 6.19.11) and FileDescriptorStoreMax= of the unit."""
DEVICE_IS_HELD = 5.0
"""Seconds another process (PID 1 at boot) may have the device."""
RETRY_SECONDS = 0.1
GONE = (errno.ENOENT, errno.ENODEV, errno.ENXIO, errno.EINVAL)
"""What RETRIEVE_SESSION says of a session that did not arrive, that somebody else took, or on a kernel without LUO."""


def session_of(run: str, producer: str) -> str:
    """The name of a producer's session in a handover: the kernel takes 63 bytes, a producer's name may have more."""
    return f"{PREFIX}{run}-{hashlib.sha256(producer.encode()).hexdigest()[:16]}"


class Sessions:
    """The sessions of this host, by name. Methods raise KhoError, Unsupported where the kernel has no LUO."""

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
    ) -> None:
        """Begin with those the service manager kept.

        All outgoing files together have at most `max_bytes()`, or the host's memory; `account` is where their size is
        kept for the next khod.
        """
        self._luo = luo
        self._thread = thread
        self._store = store
        self._inodes: dict[str, set[tuple[tuple[int, int], int]]] = {}
        self._fds = {name: fd for name, fd in (passed or {}).items() if name.startswith(PREFIX)}
        self._account = Account(max_bytes, memory, account)
        self._account.take_up(self._fds)

    @property
    def holds_any(self) -> bool:
        """Whether there are any."""
        return bool(self._fds)

    async def preserve_files(self, session: str, files: Sequence[tuple[Kept, int]], deadline: float) -> None:
        """Preserve files in an outgoing session, which is made and put into the store at first."""
        given = [(found.dev, found.ino) for found in (statx(file) for _, file in files)]
        known = self._inodes.setdefault(session, set())
        if len({*given}) < len(given) or not all(map(frozenset(given).isdisjoint, self._inodes.values())):
            # 7.3.4 says EBUSY, of another session too; 6.19.11 takes it, and gives one memory to two.
            raise Refused("The same file is handed over twice", remedy="Hand each file over once.")
        known.update(given)  # at once: another call may bring the same one while this one waits
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
                known.difference_update(given[len(kept) :])  # here: the call may end when nobody waits for it any more

        try:
            await self._call_kernel(preserve_files, deadline)
        except Grown:
            self.close_session(session)  # it holds more than it may: at once, not when its producer is told of the veto
            raise

    async def _outgoing_session(self, session: str, deadline: float) -> int:
        """Give the descriptor of an outgoing session, which is made and put into the store at first."""
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
        """Preserve files, where there may be so many bytes more; nothing else is preserved meanwhile.

        Whatever the kernel keeps is added to `done`, also where another one fails.
        """
        if len(files) > 1:  # before the first of them is filled
            self._account.require_room([Measured.measure_file(kept, file) for kept, file in files])
        try:
            for kept, file in files:
                before = Measured.measure_file(kept, file)  # as it is just before the call: its owner may write to it
                self._account.require_room([before])
                self._account.count_session(session, before.size)
                try:
                    self._luo.preserve_file(fd, file, kept)
                except KhoError:
                    self._account.count_session(session, -before.size)
                    raise
                done.append(kept)
                # From here on the kernel keeps its size.
                if (after := Measured.measure_file(kept, file)).size > before.size:
                    self._account.count_session(session, after.size - before.size)
                    raise Grown(
                        f"{before} grew to {format_bytes(after.size)} while it was handed over",
                        where=kept.name,
                        remedy="Give a file its size before it is handed over.",
                    )
        finally:
            self._account.write_account()

    async def retrieve_files(self, session: str, kept: Sequence[Kept], deadline: float) -> list[int]:
        """Give the files of a session that came from the previous kernel: descriptors that are the caller's."""
        if session not in self._fds:
            # systemd brings them over a `systemctl kexec`; after an immediate jump nobody has asked the kernel yet.
            await self._retrieve_session(session, deadline)
        fd = self._fds[session]

        def files() -> list[int]:
            self._account.release_session(session)  # nothing of it goes out
            return self._luo.retrieve_files(fd, kept)

        return await self._call_kernel(files, deadline, lambda fds: self._close_late(*fds))

    async def finish_session(self, session: str, deadline: float) -> None:
        """Let go of a session whose files were all given back."""
        if (fd := self._fds.get(session)) is not None:
            await self._call_kernel(lambda: self._luo.finish_session(fd), deadline)
            self.close_session(session)

    async def drop_session(self, session: str, deadline: float) -> None:
        """Free what a session of the previous kernel holds; nothing where it did not arrive.

        Beside `finish` the only way it ends: whoever calls this was told to.
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
            if getattr(error.__cause__, "errno", None) != errno.EINVAL:  # an outgoing one: to close it is its end
                raise
        self.close_session(session)

    def close_session(self, session: str) -> None:
        """Close a session, in the store too: of an outgoing one nothing is preserved any more."""
        self._inodes.pop(session, None)
        if (fd := self._fds.pop(session, None)) is not None:
            self._store.remove_fd(session)
            # Not before a call with this descriptor is over: its number may be another session's by then.
            self._thread.call_later(lambda: self._let_go(session, fd))

    def _let_go(self, session: str, fd: int) -> None:
        os.close(fd)
        self._account.release_session(session)

    def of_run(self, run: str) -> list[str]:
        """The sessions of one handover that are held, by name."""
        return sorted(name for name in self._fds if name.startswith(f"{PREFIX}{run}-"))

    @property
    def session_names(self) -> list[str]:
        """All sessions that are held, by name."""
        return sorted(self._fds)

    async def _retrieve_session(self, session: str, deadline: float) -> None:
        def retrieve() -> int:
            fd = self._luo.retrieve_session(session)
            try:
                self._store.store_fd(session, fd)  # at once: a khod that dies before has freed what it holds
            except Exception:  # what cannot be kept twice is kept once
                LOG.exception("a LUO session cannot be kept by the service manager")
            return fd

        def keep(fd: int) -> None:
            """Keep it, also where it came when nobody waited for it any more."""
            self._fds[session] = fd

        keep(await self._on_device(retrieve, deadline, keep))

    def _close_late(self, *fds: int) -> None:
        """Close what came when nobody waited for it any more."""
        for fd in fds:
            self._thread.call_later(partial(os.close, fd))

    async def _on_device(self, function: Callable[[], T], deadline: float, late: Callable[[T], object]) -> T:
        """Make a call that opens /dev/liveupdate; wait while another process has it."""
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
