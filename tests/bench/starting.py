# SPDX-License-Identifier: LGPL-2.1-or-later
"""How soon khod serves: from exec to READY=1, and to `restore` for a producer that waits, on the simulated kernel."""

import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.bench.figure import Figure
from tests.unit.arrived import NEXT, call_early, jump_with_producer, listen_at, start_khod
from tests.unit.khods import reply

ROUNDS = 21
DEADLINE = 60.0
ASYNCIO = [sys.executable, "-c", "import asyncio"]


def run() -> Iterator[Figure]:
    """Measure a khod that finds nothing, and one that finds a producer whose state arrived."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # the package has bytecode, and the first round makes ours
    with tempfile.TemporaryDirectory() as name:
        arrived = Path(name, "arrived")
        arrived.mkdir()
        jump_with_producer(arrived)
        rounds = [(_asyncio(), _ready(Path(name)), _restore(Path(name), arrived)) for _ in range(ROUNDS + 1)]
    asyncio, ready, restore = (statistics.median(column) for column in zip(*rounds[1:], strict=True))
    how = f"{{:.0f}} ms and {asyncio * 1e3:.0f} ms, medians of {ROUNDS} taken in turn"
    imports = "python3 -c 'import asyncio'"
    yield Figure(f"khod until READY=1 / {imports}", ready / asyncio, 2.75, "", how.format(ready * 1e3))
    yield Figure(f"khod until `restore` is sent / {imports}", restore / asyncio, 2.75, "", how.format(restore * 1e3))


def _asyncio() -> float:
    began = time.perf_counter()
    subprocess.run(ASYNCIO, check=True)
    return time.perf_counter() - began


def _ready(at: Path) -> float:
    """Return the seconds from exec(2) to READY=1 where there is nothing to do."""
    with tempfile.TemporaryDirectory(dir=at) as name, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        directory = Path(name)
        notified.settimeout(DEADLINE)
        notified.bind(f"{name}/notify")
        with listen_at(directory / "activated") as listening:
            began = time.perf_counter()
            with start_khod(directory, listening):
                while b"READY=1" not in notified.recv(4096):
                    pass
                return time.perf_counter() - began


def _restore(at: Path, arrived: Path) -> float:
    """Return the seconds from exec(2) until a producer that has called already is told `restore`."""
    with tempfile.TemporaryDirectory(dir=at) as name:
        directory = Path(name, "host")
        shutil.copytree(arrived, directory)
        with listen_at(directory / "activated") as listening, call_early(directory / "activated") as producer:
            began = time.perf_counter()
            with start_khod(directory, listening):
                assert "run" in reply(producer)["parameters"]
                producer.sendall(NEXT)
                assert reply(producer)["parameters"]["verb"] == "restore"
                return time.perf_counter() - began
