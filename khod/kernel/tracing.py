# SPDX-License-Identifier: LGPL-2.1-or-later
"""Read the TSC of x86, which goes on over a kexec, by a trace clock of the kernel.

The kernel stamps an event of a trace instance with the instance's own trace clock, and `x86-tsc` is rdtsc() itself
(arch/x86/kernel/trace_clock.c, since Linux 3.13). No other architecture has such a clock. An instance has buffers for
each processor (1.4 MB by default): khod's exists only while it is read.
"""

import re
import threading
import time
from collections.abc import Callable

from khod.abi.calls import Calls
from khod.dataclass import dataclass
from khod.kernel.sysfs import KHO

TRACING = "/sys/kernel/tracing"
INSTANCE = f"{TRACING}/instances/khod"
TSC_CLOCK = "x86-tsc"
MARKERS = 5
"""Markers that are written; the one that was written in the shortest time counts."""
STAMPED = re.compile(r" (\d+): [^ ]+: khod (\d+)$", re.MULTILINE)
"""A marker in the file `trace`: its time stamp in cycles, the function that wrote it, and its text."""

LOCK_SECONDS = 0.5
_INSTANCE_LOCK = threading.Lock()
"""Held while the instance is there: khod may read its clocks twice at once, when it has started after a jump."""


@dataclass(frozen=True)
class TscReading:
    """The TSC in cycles at `monotonic` (CLOCK_MONOTONIC), give or take half of `span_seconds`."""

    cycles: int
    monotonic: float
    span_seconds: float


def read_tsc(calls: Calls, now: Callable[[], float] = time.monotonic) -> TscReading | None:
    """Return the TSC; None if this kernel has no such trace clock, or does not let khod use it.

    In v3's active phase it is None too: v3's ftrace holds a lock from activation to abort, and whoever used tracefs in
    between would block (see `khod.kernel.thread`).
    """
    try:
        if not calls.path_exists(f"{TRACING}/trace_clock") or _holds_ftrace(calls):
            return None
        if TSC_CLOCK not in calls.read_file(f"{TRACING}/trace_clock").decode(errors="replace").split():
            return None
        if not _INSTANCE_LOCK.acquire(timeout=LOCK_SECONDS):
            return None
        try:
            with calls.temporary_directory(INSTANCE):
                return _stamp_markers(calls, now)
        finally:
            _INSTANCE_LOCK.release()
    except (OSError, ValueError):
        return None


def _holds_ftrace(calls: Calls) -> bool:
    """Whether this kernel has v3's KHO, and is in its active phase."""
    active = f"{KHO}/active"
    return calls.path_exists(active) and calls.read_file(active).strip() != b"0"


def _stamp_markers(calls: Calls, now: Callable[[], float]) -> TscReading | None:
    calls.write_file(f"{INSTANCE}/trace_clock", TSC_CLOCK.encode())
    written = {}
    for number in range(MARKERS):
        before = now()
        calls.write_file(f"{INSTANCE}/trace_marker", f"khod {number}\n".encode())
        written[number] = before, now()
    trace = calls.read_file(f"{INSTANCE}/trace").decode(errors="replace")
    found = []
    for cycles, number in STAMPED.findall(trace):
        if int(number) in written:
            before, after = written[int(number)]
            found.append(TscReading(int(cycles), (before + after) / 2, after - before))
    return min(found, key=lambda reading: reading.span_seconds, default=None)
