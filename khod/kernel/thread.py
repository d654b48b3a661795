# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one thread every call that changes the kernel is made in.

v3's ftrace producer takes a lock at activation and drops it at abort, so both writes must come from
one long-lived thread; and a sysfs write that blocks (the kernel serializes under a mutex, without a
time limit) must never block the daemon. What only asks the kernel has a thread of its own
(`Workers.observer`), so that a question that hangs keeps no undo from its work. The outgoing tree is read
in this one: a read while another thread leaves the active phase is v3's deadlock.
"""

from dataclasses import dataclass, field

from khod.concurrency.worker import Worker


class KernelThread(Worker):
    """The kernel's thread."""

    def __init__(self) -> None:
        super().__init__("kernel", "The kernel")


def _disk_worker() -> Worker:
    return Worker("disk", "The file system of khod's record")


@dataclass(frozen=True)
class Workers:
    """Whose threads which calls are made in: what hangs in one holds up nothing in another."""

    kernel: Worker = field(default_factory=KernelThread)
    """Calls that change the kernel, and reads of its outgoing tree."""
    observer: Worker = field(default_factory=lambda: Worker("observer", "The kernel", max_waiting=64))
    """How the kernel stands."""
    disk: Worker = field(default_factory=_disk_worker)
    """The record and the snapshot, in the order they were written."""
    files: Worker = field(default_factory=lambda: Worker("files", "A file system", threads=2))
    """Images that are read, and sync(2) before anyone is frozen."""
    queries: Worker = field(default_factory=lambda: Worker("queries", "A check", threads=2, max_waiting=256))
    """Checks, and whatever else is asked without being part of a handover."""

    def close_workers(self) -> None:
        """Let every thread end after its last call."""
        for worker in (self.kernel, self.observer, self.disk, self.files, self.queries):
            worker.close()
