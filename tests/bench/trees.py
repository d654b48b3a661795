# SPDX-License-Identifier: LGPL-2.1-or-later
"""`khoctl dt show --summary` as a whole process, beside dtc on the same tree: 10 MiB of v3 with 650,000 ranges."""

import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.bench.figure import Figure
from tests.unit.trees import PAGE, ftrace, mem

ROUNDS = 21
RANGES, CPUS = 650_000, 4
HEAD = 64  # bytes of a struct buffer_page, which ftrace hands over beside its page
BASE = 4 << 30
DTC = ("dtc", "-I", "dtb", "-O", "dts", "-o", "/dev/null")
WITHOUT = "import sys; sys.modules['numpy'] = None; import khoctl.app as app; app.main()"
MOST_RESIDENT = 150


def run() -> Iterator[Figure]:
    """Measure with numpy and without."""
    khoctl = str(Path(sys.executable).with_name("khoctl"))
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "tree"
        # In a process of its own: what this one has resident would count as the most of each that it starts.
        subprocess.run([sys.executable, "-m", "tests.bench.trees", path], check=True)
        words = ("dt", "show", "--summary", str(path))
        yield from _figures("", (khoctl, *words), (*DTC, str(path)), 1.0)
        yield from _figures(" without numpy", (sys.executable, "-c", WITHOUT, *words), (*DTC, str(path)), 4.0)


def tree() -> bytes:
    """Ring buffers of pages from all over 5 GiB, in no order, each with its head: two ranges a page, as ftrace has."""
    chance = random.Random(650_000)
    pages = chance.sample(range(RANGES * 2), RANGES)
    heads, full = pages[::2], pages[1::2]
    ranges = [
        pair
        for number, (head, page) in enumerate(zip(heads, full, strict=True))
        for pair in ((BASE + head * PAGE + number % 64 * HEAD, HEAD), (BASE + page * PAGE, PAGE))
    ]
    share = RANGES // CPUS
    return ftrace([mem(*ranges[cpu * share : (cpu + 1) * share]) for cpu in range(CPUS)])


def _figures(how: str, ours: Sequence[str], theirs: Sequence[str], most: float) -> Iterator[Figure]:
    rounds = [(_run(ours), _run(theirs)) for _ in range(ROUNDS)]
    mine, dtc = (statistics.median(seconds for seconds, _ in column) for column in zip(*rounds, strict=True))
    yield Figure(
        f"khoctl dt show --summary / dtc, {RANGES} ranges{how}",
        mine / dtc,
        most,
        "",
        f"{mine * 1e3:.0f} ms and {dtc * 1e3:.0f} ms, medians of {ROUNDS} taken in turn",
    )
    yield Figure(f"its resident memory{how}", max(mib for (_, mib), _ in rounds), MOST_RESIDENT, "MiB", "the most")


def _run(argv: Sequence[str]) -> tuple[float, float]:
    """Run to the end; seconds, and MiB resident at the most."""
    began = time.perf_counter()
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    took = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, argv
    return took, used.ru_maxrss / 1024


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(tree())
