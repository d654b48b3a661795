# SPDX-License-Identifier: LGPL-2.1-or-later
"""A range of cases in a process of their own, with bounds on its memory, its descriptors, and each case's time."""

import ctypes
import faulthandler
import importlib
import mmap
import multiprocessing
import os
import re
import resource
import signal
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from multiprocessing.sharedctypes import RawValue
from pathlib import Path

from khod.images.compressed import MAX_WINDOW_BYTES

ROOM = 2 * MAX_WINDOW_BYTES + (256 << 20)
"""Bytes of address space a run may add: the largest dictionary that unpacking may ask for, 64 MiB that the C library
sets aside for each of its threads, and little else."""
PATIENCE = 20.0
"""Seconds of processor time after which a case is one that hangs: ten thousand times what one takes."""
MOST = 5
"""Failures after which a run stops."""
QUOTED = re.compile(r"(?<!\w)'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|0x[0-9a-f]+|[0-9]+")


@dataclass
class Report:
    """What a range of cases came to: how many were held, how many of them read, how the others ended, what failed.

    `endings` counts refusals by their words, without the numbers and names in them. `seconds` are of processor time,
    `peak` is the most bytes that were resident, `grown` how many of these the cases added.
    """

    kind: str
    cases: int = 0
    read: int = 0
    endings: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    peak: int = 0
    grown: int = 0

    def __str__(self) -> str:
        return (
            f"{self.cases} cases of {self.kind}, {self.read} read, {len(self.endings)} endings, "
            f"{len(self.failures)} failures; {self.seconds:.1f} s of processor time, "
            f"{self.peak / 2**20:.0f} MiB at most, {self.grown / 2**20:.0f} MiB of these for the cases"
        )

    def add(self, other: "Report") -> None:
        """Count another range in."""
        self.cases += other.cases
        self.read += other.read
        self.endings += other.endings
        self.failures += other.failures
        self.seconds += other.seconds
        self.peak, self.grown = max(self.peak, other.peak), max(self.grown, other.grown)


@dataclass(frozen=True)
class Run:
    """A range of cases under way. `current` is the case that it is at."""

    kind: str
    process: SpawnProcess
    reader: Connection
    current: "ctypes.c_uint64"
    patience: float

    def report(self) -> Report:
        """Wait for its end: a case that takes the process with it is a failure like any other."""
        report = Report(self.kind)
        try:
            report = self.reader.recv()
        except EOFError:
            self.process.join()
            code = self.process.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            hung = f"it takes more than {self.patience:g} s of processor time"
            report.failures.append(said(self.kind, self.current.value, hung if how == "SIGPROF" else how))
        self.process.join()
        self.reader.close()
        return report


def start(kind: str, numbers: Iterable[int], patience: float = PATIENCE) -> Run:
    """Hold these cases in a new process; `kind` is a module beside this one."""
    context = multiprocessing.get_context("spawn")
    current = RawValue(ctypes.c_uint64)
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(kind, numbers, patience, current, writer))
    process.start()
    writer.close()
    return Run(kind, process, reader, current, patience)


def said(kind: str, number: int, what: str) -> str:
    """A failure, and how to see it again."""
    return f"case {number} of {kind} (python -m tests.fuzz {kind} {number}): {what}"


def bounded() -> None:
    """Bound this process: ROOM above what it has now; where a case takes too long, show where it is."""
    faulthandler.enable()
    faulthandler.register(signal.SIGPROF, chain=True)
    limit = _pages(0) + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _child(kind: str, numbers: Iterable[int], patience: float, current: "ctypes.c_uint64", writer: Connection) -> None:
    target, report = importlib.import_module(f"tests.fuzz.{kind}"), Report(kind)
    bounded()
    resident, started = _pages(1), time.process_time()
    open_before: int | None = None
    for number in numbers:
        current.value = number
        signal.setitimer(signal.ITIMER_PROF, patience)
        try:
            ending = target.held(target.made(number))
            assert "MemoryError" not in ending, "memory was refused"
        except BaseException:  # noqa: BLE001 - whatever is no error of ours is what is looked for
            report.failures.append(said(kind, number, traceback.format_exc()))
            if len(report.failures) == MOST:
                break
            continue
        open_now = len(os.listdir("/proc/self/fd"))  # the first case imports, and that may open some for good
        open_before = open_now if open_before is None else open_before
        if open_now > open_before:
            report.failures.append(said(kind, number, "it left a descriptor open"))
            break
        report.cases += 1
        report.read += not ending
        if ending:
            report.endings[QUOTED.sub("N", ending)] += 1
    signal.setitimer(signal.ITIMER_PROF, 0)
    report.seconds = time.process_time() - started
    report.peak = _most_resident()
    report.grown = report.peak - resident
    writer.send(report)
    writer.close()


def _pages(field_: int) -> int:
    """A field of statm(5) in bytes: 0 the address space, 1 what is resident."""
    return int(Path("/proc/self/statm").read_text().split()[field_]) * mmap.PAGESIZE


def _most_resident() -> int:
    """The most bytes that were resident: ru_maxrss would count what the process that started this one has, too."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10
