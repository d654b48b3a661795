# SPDX-License-Identifier: LGPL-2.1-or-later
"""What khod and khoctl cost as processes: khoctl status beside `import typer`, khod's memory and wakeups at rest."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bench.figure import Figure

ROUNDS = 21
QUIET = 20.0  # seconds khod is watched at rest
MIB = 1024


def run() -> Iterator[Figure]:
    """Measure one khod on the simulated kernel."""
    with khod() as (pid, socket):
        status = [sys.executable, "-m", "khoctl", "--socket", socket, "status"]
        typer = [sys.executable, "-c", "import typer"]
        pairs = [(command_seconds(status), command_seconds(typer)) for _ in range(ROUNDS)]
        ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
        yield Figure(
            "khoctl status / python3 -c 'import typer'",
            ours / theirs,
            1.5,
            "",
            f"{ours * 1e3:.0f} ms and {theirs * 1e3:.0f} ms, medians of {ROUNDS} taken in turn",
        )
        before = _count(pid, "voluntary_ctxt_switches")
        time.sleep(QUIET)
        woken = _count(pid, "voluntary_ctxt_switches") - before
        yield Figure("khod's wakeups at rest", woken, 0, "", f"in {QUIET:g} s without a watchdog")
        yield Figure("khod's resident memory at rest", _count(pid, "VmRSS") / MIB, 60, "MiB", "VmRSS")


@contextmanager
def khod(state: Path | None = None) -> Iterator[tuple[int, str]]:
    """Run khod on a fresh simulated kernel, with its record in `state` if given; its process id and socket."""
    with tempfile.TemporaryDirectory() as name:
        socket = f"{name}/socket"
        environment = {key: value for key, value in os.environ.items() if key != "WATCHDOG_USEC"}
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "khod",
                "--root",
                name,
                "--state",
                str(state or name),
                "--socket",
                socket,
                "--simulate",
                f"{name}/kernel",
            ],
            env=environment,
        )
        try:
            while subprocess.run(
                [sys.executable, "-m", "khoctl", "--socket", socket, "status"], capture_output=True, check=False
            ).returncode:
                assert process.poll() is None, "khod ended"
            yield process.pid, socket
        finally:
            process.terminate()
            process.wait()


def command_seconds(argv: list[str]) -> float:
    """Run a command; how long it took."""
    began = time.perf_counter()
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def _count(pid: int, field: str) -> int:
    """Sum a number from /proc/PID/task/*/status; memory belongs to all threads and is counted once."""
    texts = [path.read_text() for path in sorted(Path(f"/proc/{pid}/task").glob("*/status"))]
    numbers = [int(line.split()[1]) for text in texts for line in text.splitlines() if line.startswith(f"{field}:")]
    return numbers[0] if field.startswith("Vm") else sum(numbers)
