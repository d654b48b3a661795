# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one thread for every call that changes the kernel.

v3's ftrace producer takes a lock at activation and releases it at abort, so both writes must come from one long-lived
thread. A sysfs write that blocks (the kernel serializes under a mutex, without a time limit) must never block the
daemon. Calls that only ask the kernel have a thread of their own (`Workers.observer`), so that a hanging question does
not delay an undo. The outgoing tree is read in this thread, because v3 deadlocks if it is read while another thread
leaves the active phase.
"""

from dataclasses import field

from khod.concurrency.worker import Worker
from khod.dataclass import dataclass


class KernelThread(Worker):
    """The thread for calls that change the kernel."""

    def __init__(self) -> None:
        super().__init__("kernel", "The kernel")


def _disk_worker() -> Worker:
    return Worker("disk", "The file system of khod's record")


@dataclass(frozen=True)
class Workers:
    """The threads for each kind of call: a call that hangs in one of them does not delay the others."""

    kernel: Worker = field(default_factory=KernelThread)
    """Calls that change the kernel, and reads of its outgoing tree."""
    observer: Worker = field(default_factory=lambda: Worker("observer", "The kernel", max_waiting=64))
    """Reads of the kernel's state."""
    disk: Worker = field(default_factory=_disk_worker)
    """Writes of the record and the snapshot, in order."""
    files: Worker = field(default_factory=lambda: Worker("files", "A file system", threads=2))
    """Reads of images, and sync(2)."""
    frozen: Worker = field(default_factory=lambda: Worker("frozen", "A file system", threads=2))
    """FIFREEZE before the jump; the second thread thaws while the first one hangs."""
    queries: Worker = field(default_factory=lambda: Worker("queries", "A check", threads=2, max_waiting=256))
    """Checks, and other questions that are not part of a handover."""
    history: Worker = field(default_factory=lambda: Worker("history", "The history database", max_waiting=64))
    """Calls of the history database; a file system that hangs there delays nothing else."""
