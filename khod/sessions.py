"""LUO sessions: one for each producer that hands descriptors over, kept where khod's death does not reach them.

The kernel drops a session when its last descriptor is closed. That is the undo, and the danger: so a
session goes into the service manager's store before anything is preserved in it. `/dev/liveupdate` is
open for the time of one call only.
"""

import asyncio
import errno
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from khod.errors import KhoError, Refused
from khod.fdstore import FdStore
from khod.kernel.luo import Luo
from khod.model import Kept
from khod.worker import Worker

T = TypeVar("T")
PREFIX = "khod-"
MOST = 700
"""Sessions at a time: below what kernels take (819 were seen on 6.19.11) and FileDescriptorStoreMax= of the unit."""
DEVICE_IS_HELD = 5.0
"""Seconds another process (PID 1 at boot) may have the device."""
AGAIN = 0.1
GONE = (errno.ENOENT, errno.ENODEV, errno.ENXIO, errno.EINVAL)
"""What RETRIEVE_SESSION says of a session that did not arrive, that somebody else took, or on a kernel without LUO."""


def session_of(run: str, producer: str) -> str:
    """The name of a producer's session in a handover: the kernel takes 63 bytes, a producer's name may have more."""
    return f"{PREFIX}{run}-{hashlib.sha256(producer.encode()).hexdigest()[:16]}"


class Sessions:
    """The sessions of this host, by name. Methods raise KhoError, Unsupported where the kernel has no LUO."""

    def __init__(self, luo: Luo, thread: Worker, store: FdStore, *, passed: Mapping[str, int] | None = None) -> None:
        """Begin with those the service manager kept."""
        self._luo = luo
        self._thread = thread
        self._store = store
        self._inodes: dict[str, set[tuple[int, int]]] = {}
        self._fds = {name: fd for name, fd in (passed or {}).items() if name.startswith(PREFIX)}

    @property
    def held(self) -> bool:
        """Whether there are any."""
        return bool(self._fds)

    async def preserve(self, session: str, files: Sequence[tuple[Kept, int]], deadline: float) -> None:
        """Preserve files in an outgoing session, which is made and put into the store at first."""
        seen = {(stat.st_dev, stat.st_ino) for stat in (os.fstat(file) for _, file in files)}
        known = self._inodes.setdefault(session, set())
        if len(seen) < len(files) or seen & known:
            # 7.3.4 says EBUSY; 6.19.11 takes it, and gives one memory to two.
            raise Refused("The same file is handed over twice", remedy="Hand each file over once.")
        if session not in self._fds:
            if len(self._fds) >= MOST:
                raise Refused(f"{MOST} producers have LUO sessions already", remedy="Let one producer hand over more.")
            self._fds[session] = await self._on_device(lambda: self._luo.create(session), deadline)
            self._store.put(session, self._fds[session])
            try:
                await self._store.settle()
            except OSError as error:  # a TimeoutError is one
                raise Refused(
                    f"The service manager did not take a LUO session into its store: {error}",
                    where="FDSTORE",
                    remedy="systemctl status",
                ) from None
        fd = self._fds[session]

        def preserve() -> None:
            for kept, file in files:
                self._luo.preserve(fd, file, kept)

        await self._call(preserve, deadline)
        known |= seen

    async def take(self, session: str, kept: Sequence[Kept], deadline: float) -> list[int]:
        """Give the files of a session that came from the previous kernel: descriptors that are the caller's."""
        if session not in self._fds:
            # systemd brings them over a `systemctl kexec`; after an immediate jump nobody has asked the kernel yet.
            self._fds[session] = await self._on_device(lambda: self._luo.retrieve(session), deadline)
            self._store.put(session, self._fds[session])
        return await self._call(lambda: self._luo.files(self._fds[session], kept), deadline)

    async def finish(self, session: str, deadline: float) -> None:
        """Let go of a session whose files were all given back."""
        if (fd := self._fds.get(session)) is not None:
            await self._call(lambda: self._luo.finish(fd), deadline)
            self.close(session)

    async def drop(self, session: str, deadline: float) -> None:
        """Free what a session of the previous kernel holds; nothing where it did not arrive.

        Beside `finish` the only way it ends: whoever calls this was told to.
        """
        if session not in self._fds:
            try:
                self._fds[session] = await self._on_device(lambda: self._luo.retrieve(session), deadline)
            except KhoError as error:
                if getattr(error.__cause__, "errno", None) in GONE:
                    return
                raise
        try:
            await self.finish(session, deadline)
        except KhoError as error:
            if getattr(error.__cause__, "errno", None) != errno.EINVAL:  # an outgoing one: to close it is its end
                raise
        self.close(session)

    def close(self, session: str) -> None:
        """Close a session, in the store too: of an outgoing one nothing is preserved any more."""
        self._inodes.pop(session, None)
        if (fd := self._fds.pop(session, None)) is not None:
            self._store.remove(session)
            # Not before a call with this descriptor is over: its number may be another session's by then.
            self._thread.later(lambda: os.close(fd))

    def of_run(self, run: str) -> list[str]:
        """The sessions of one handover that are held, by name."""
        return sorted(name for name in self._fds if name.startswith(f"{PREFIX}{run}-"))

    @property
    def names(self) -> list[str]:
        """All sessions that are held, by name."""
        return sorted(self._fds)

    async def _on_device(self, function: Callable[[], T], deadline: float) -> T:
        """Make a call that opens /dev/liveupdate; wait while another process has it."""
        try:
            async with asyncio.timeout(DEVICE_IS_HELD):
                while True:
                    try:
                        return await self._call(function, deadline)
                    except KhoError as error:
                        if getattr(error.__cause__, "errno", None) != errno.EBUSY:
                            raise
                    await asyncio.sleep(AGAIN)
        except TimeoutError:
            raise Refused(
                "Another process has /dev/liveupdate open",
                where="/dev/liveupdate",
                remedy="Find it with: fuser /dev/liveupdate",
            ) from None

    async def _call(self, function: Callable[[], T], deadline: float) -> T:
        return await self._thread.call(function, "preserving files", deadline)
