# SPDX-License-Identifier: LGPL-2.1-or-later
"""Root's activate and abort while 100 connections of five users without rights do their worst.

The attackers are bound to one processor, in a cgroup where there are any, as users are in a slice of theirs: what is
measured is khod, and not how a host divides its processors. In turn with them root does the same alone.
"""

import os
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from khod.client.handover import Client
from tests.bench.figure import Figure
from tests.bench.processes import khod
from tests.unit import attackers

USERS = (65534, 65533, 60001, 60002, 60003)
CONNECTIONS = 20  # of each user
ROUNDS = 15
TIMES = 5  # activate and abort in a round
METHODS = ("Activate", "Abort")
MOST_RATIO = 2.0
PERIOD_USEC = 100_000
CGROUPS = (
    (Path("/sys/fs/cgroup"), "cpu.max", f"{PERIOD_USEC} {PERIOD_USEC}"),
    (Path("/sys/fs/cgroup/cpu"), "cpu.cfs_quota_us", str(PERIOD_USEC)),
)
"""Where cgroups of version 2 and 1 are made, and what gives one a processor's time."""


def run() -> Iterator[Figure]:
    """Measure one khod on the simulated kernel."""
    with khod() as (_pid, path), ExitStack() as stack:
        crowd = [stack.enter_context(attackers.process(path, uid, CONNECTIONS)) for uid in USERS]
        how = stack.enter_context(_one_processor([process.pid for process in crowd]))
        rounds = []
        for _ in range(ROUNDS):
            _signal(crowd, signal.SIGSTOP)
            alone = _seconds(path)
            _signal(crowd, signal.SIGCONT)
            rounds.append((_seconds(path), alone))
        assert all(process.poll() is None for process in crowd), "an attacker ended"
    for method in METHODS:
        ours, theirs = zip(*((among[method], alone[method]) for among, alone in rounds), strict=True)
        yield Figure(
            f"root's {method.lower()} among {CONNECTIONS * len(USERS)} attackers / alone",
            statistics.median(each / other for each, other in zip(ours, theirs, strict=True)),
            MOST_RATIO,
            "",
            f"{statistics.median(ours) * 1e3:.0f} ms and {statistics.median(theirs) * 1e3:.0f} ms, medians of {ROUNDS} "
            f"rounds side by side; attackers {how}",
        )


def _seconds(path: str) -> dict[str, float]:
    """Activate and abort TIMES times, each on a connection of its own; the median seconds of each."""
    taken: dict[str, list[float]] = {method: [] for method in METHODS}
    for method in METHODS * TIMES:
        began = time.perf_counter()
        with Client(Path(path)) as client:
            client.call_method(method)
            client.receive_status()
        taken[method].append(time.perf_counter() - began)
    return {method: statistics.median(seconds) for method, seconds in taken.items()}


def _signal(crowd: list["subprocess.Popen[str]"], number: signal.Signals) -> None:
    for process in crowd:
        process.send_signal(number)


@contextmanager
def _one_processor(pids: list[int]) -> Iterator[str]:
    """Give these processes one processor together, and the weight of one slice; says how."""
    for pid in pids:
        os.sched_setaffinity(pid, {max(os.sched_getaffinity(0))})
    for parent, name, value in CGROUPS:
        group = parent / f"khod-bench-{os.getpid()}"
        if not (parent / "cgroup.procs").exists():
            continue
        group.mkdir()
        try:
            if (group / name).exists():
                (group / name).write_text(value)
                for pid in pids:
                    (group / "cgroup.procs").write_text(str(pid))
                yield f"on one processor in a cgroup, {name}={value}"
                return
        finally:
            for pid in pids:
                (parent / "cgroup.procs").write_text(str(pid))
            group.rmdir()
    yield "on one processor"
