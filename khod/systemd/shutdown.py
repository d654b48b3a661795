# SPDX-License-Identifier: LGPL-2.1-or-later
"""How the jump is made: an orderly one through systemd, or an immediate one."""

import asyncio
import errno
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from khod.concurrency.command import run_command
from khod.dataclass import dataclass
from khod.deferred import defer_module
from khod.errors import Failed, Unsupported, errno_text
from khod.kernel.filesystems import FrozenFileSystems
from khod.kernel.kexec import Kexec
from khod.kernel.thread import Workers

if TYPE_CHECKING:
    from khod.systemd import manager as systemd_manager
else:
    systemd_manager = defer_module("khod.systemd.manager")

ASK_SECONDS = 10.0
"""Seconds systemd has to answer when khod is stopped, and before an orderly jump."""
ASK_UNDO_SECONDS = 2.0
"""Seconds systemd has to answer before an undo."""

CARRIES_SESSIONS = 261
"""The first version of systemd that keeps LUO sessions across its own shutdown."""

KEXEC_TARGET = "kexec.target"
Executor = Callable[[], Awaitable[None]]
"""Makes the jump, or has systemd make it."""
Shutdown = Callable[[], Awaitable[bool | None]]
"""Returns whether the host is on its way into the kexec; None if that is not known."""


async def carries_sessions() -> bool:
    """Whether this systemd keeps LUO sessions across its own shutdown, which only its version shows."""
    manager = await systemd_manager.ask_systemd(lambda systemd: systemd.describe_manager(), ASK_SECONDS)
    return manager is not None and manager.version >= CARRIES_SESSIONS


async def start_orderly(*, sessions: bool) -> None:
    """Have systemd stop everything and jump; return when that is under way.

    This uses systemctl(1), which accepts an image that is already loaded, and which knows for its own systemd whether
    logind or the manager must be asked, with which call, and which inhibitors apply. `sessions` says whether producers
    have handed over files: a systemd before 261 would close them on its way down, so that is Unsupported. Failed if
    systemctl fails.
    """
    if sessions and not await carries_sessions():
        raise Unsupported(
            f"This systemd closes the producers' LUO sessions on its way down: version {CARRIES_SESSIONS} keeps them",
            where="systemctl kexec",
            remedy="Jump at once: `Kexec(now)`",
        )
    try:
        code, output = await run_command("systemctl", "--no-ask-password", "kexec")
    except OSError as error:
        raise Failed(
            f"systemctl cannot be run: {errno_text(error)}",
            where="systemctl kexec",
            remedy="Jump at once: `Kexec(now)`",
        ) from error
    if code != 0:
        raise Failed(
            f"systemd does not take the host down: {output}",
            where="systemctl kexec",
            remedy="Look at systemd-inhibit --list and journalctl -b.",
        )


async def kexec_job_pending(seconds: float = ASK_SECONDS) -> bool | None:
    """Whether systemd is taking the host into a kexec, whoever requested it; None if systemd does not answer."""
    target = await systemd_manager.ask_systemd(lambda systemd: systemd.read_properties(KEXEC_TARGET, "Unit"), seconds)
    if target is None:
        return None
    job, _ = target.get("Job", (0, "/"))
    return job != 0 or target.get("ActiveState") in ("active", "activating")


async def goes_down() -> bool:
    """Whether the host is being shut down in any way, as systemd says; False if it does not answer."""
    return await systemd_manager.ask_systemd(lambda systemd: systemd.system_state(), ASK_SECONDS) == "stopping"


@runtime_checkable
class ImmediateExecutor(Protocol):
    """An executor that calls reboot(2) itself."""

    @property
    def in_kernel(self) -> bool:
        """Whether reboot(2) was called and has not returned: it may jump at any moment."""

    async def __call__(self, require_rest: Executor | None = None) -> None:
        """Make the jump.

        `require_rest` raises what speaks against it, and is called as late as anybody can be asked: before the first
        file system is frozen.
        """


@dataclass
class Immediate:
    """Sync the disks, freeze the file systems and call reboot(2); nothing is stopped before."""

    kexec: Kexec
    workers: Workers
    filesystems: FrozenFileSystems
    settle_journal: Callable[[], Awaitable[None]] | None
    """Returns, within a limit of its own, once the journal is on the disk; None where there is no journal."""
    sync_seconds: Callable[[], float]
    """Time limit in seconds of sync(2), and of the freeze after it. reboot(2) has no limit, because khod does not
    control what follows it."""
    in_kernel: bool = False
    """Whether reboot(2) was called and has not returned: it may jump at any moment."""

    async def __call__(self, require_rest: Executor | None = None) -> None:
        if self.settle_journal is not None:
            await self.settle_journal()
        # Not in the kernel's thread: sync(2) waits for ever for a network file system whose server has gone, and the
        # undo would wait behind it.
        await self.workers.files.call_within(self.kexec.sync_disks, "sync(2)", self.sync_seconds())
        if require_rest is not None:
            await require_rest()
        given_up = threading.Event()
        try:
            freeze = partial(self.filesystems.freeze_all, given_up)
            await self.workers.frozen.call_within(freeze, "FIFREEZE", self.sync_seconds())
        except BaseException as error:
            given_up.set()
            self.workers.frozen.call_later(self.filesystems.thaw_all)
            if isinstance(error, OSError):
                raise _unfreezable_error(error) from error
            raise
        self.in_kernel = True  # before any await: from here on nobody cancels this
        call = asyncio.ensure_future(
            self.workers.kernel.call_within(self._jump, "reboot(LINUX_REBOOT_CMD_KEXEC)", None)
        )
        call.add_done_callback(self._came_back)
        await asyncio.shield(call)

    def _jump(self) -> None:
        try:
            self.kexec.jump()
        finally:  # in this thread: nothing that khod does next may wait for a disk
            self.filesystems.thaw_all()

    def _came_back(self, _call: "asyncio.Future[None]") -> None:
        self.in_kernel = False


def _unfreezable_error(error: OSError) -> Failed:
    busy = "Another program has frozen it, a backup perhaps: wait for its end." if error.errno == errno.EBUSY else ""
    return Failed(
        f"The file system {error.filename} could not be frozen: {errno_text(error)}",
        where="FIFREEZE",
        remedy=busy or "Look at journalctl -k.",
    )


def make_immediate(
    kexec: Kexec,
    workers: Workers,
    deadline: float | Callable[[], float],
    note: Path | None = None,
    settle_journal: Callable[[], Awaitable[None]] | None = None,
) -> Immediate:
    """Return the executor that jumps without systemd; `deadline` is the time limit of sync(2) in seconds.

    `note` is the file that keeps which file systems are frozen; without one none is frozen. `settle_journal` is the
    executor's field.
    """
    filesystems = FrozenFileSystems(kexec.calls, note)
    sync_seconds = deadline if callable(deadline) else lambda: deadline
    return Immediate(kexec, workers, filesystems, settle_journal, sync_seconds)
