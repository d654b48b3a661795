# SPDX-License-Identifier: LGPL-2.1-or-later
"""How soon khod serves as its unit starts it: from exec to READY=1, and to `restore` for a producer that waits.

It is measured in a mount namespace with /run and /var/lib of its own.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from khod.handover.record import Owner, ProducerRecord, Record, Store
from khod.model import Phase, Step
from khod.producers.cgroup import unit_of
from tests.bench.figure import Figure
from tests.unit.arrived import NEXT, STARTER, call_early, listen_at
from tests.unit.khods import REPOSITORY, reply

ROUNDS = 21
DEADLINE = 60.0
MOST_UNTIL_READY = 1.5
MOST_UNTIL_RESTORE = 1.0
RUN = "0579bd8c99b0"
PASS = ["/bin/sh", "-c", 'exec 3<&0 0</dev/null; LISTEN_PID=$$ exec "$@"', "sh"]
"""Passes the socket on its standard input as systemd does; what is compared is started the same way."""
ASYNCIO = [*PASS, sys.executable, "-c", "import asyncio"]


def run() -> Iterator[Figure]:
    """Measure a khod that finds nothing, and one that finds a producer whose state arrived."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # the package has bytecode, and the first round makes ours
    inside = ["unshare", "--mount", sys.executable, "-m", "tests.bench.starting"]
    measured = json.loads(subprocess.run(inside, check=True, stdout=subprocess.PIPE).stdout)
    asyncio, ready, restore = (statistics.median(column) for column in zip(*measured[1:], strict=True))
    for what, seconds, most in (
        ("READY=1", ready, MOST_UNTIL_READY),
        ("`restore` is sent", restore, MOST_UNTIL_RESTORE),
    ):
        how = f"{seconds * 1e3:.0f} ms and {asyncio * 1e3:.0f} ms, medians of {ROUNDS} taken in turn"
        yield Figure(f"khod until {what} / python3 -c 'import asyncio'", seconds / asyncio, most, "", how)


def measure_inside() -> list[tuple[float, float, float]]:
    """Return the seconds of each round, in this mount namespace."""
    for path in ("/run", "/var/lib"):
        subprocess.run(["mount", "-t", "tmpfs", "none", path], check=True)
    cmdline = Path("/run/cmdline")
    cmdline.write_text(f"{Path('/proc/cmdline').read_text().strip()} khod.run={RUN}\n")
    subprocess.run(["mount", "--bind", cmdline, "/proc/cmdline"], check=True)
    return [(_asyncio(), _ready(), _restore()) for _ in range(ROUNDS + 1)]


def _asyncio() -> float:
    began = time.perf_counter()
    subprocess.run(ASYNCIO, check=True, stdin=subprocess.DEVNULL)
    return time.perf_counter() - began


def _ready() -> float:
    """Return the seconds from exec(2) to READY=1 where there is nothing to do."""
    told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    with told, _new_host() as at, listen_at(at / "socket") as listening:
        told.settimeout(DEADLINE)
        told.bind(f"{at}/notify")
        began = time.perf_counter()
        with _start_khod(listening, NOTIFY_SOCKET=f"{at}/notify"):
            while b"READY=1" not in told.recv(4096):
                pass
            return time.perf_counter() - began


def _restore() -> float:
    """Return the seconds from exec(2) until a producer that has called already is told `restore`."""
    with _new_host() as at, listen_at(at / "socket") as listening:
        left = ProducerRecord(
            "waiting", "varlink", "freeze", owner=Owner(0, unit_of(os.getpid())), restores=True, timeout=30.0
        )
        steps = (Step.prepare, Step.freeze, Step.load, Step.execute)
        Store(Path("/var/lib/khod")).write(
            Record(phase=Phase.executing, run=RUN, boot_id="before", done=steps, producers=(left,))
        )
        with call_early(at / "socket") as producer:
            began = time.perf_counter()
            with _start_khod(listening):
                assert "run" in reply(producer)["parameters"]
                producer.sendall(NEXT)
                assert reply(producer)["parameters"]["verb"] == "restore"
                return time.perf_counter() - began


@contextmanager
def _new_host() -> Iterator[Path]:
    """A host on which no khod has run; gives a directory for its sockets."""
    with tempfile.TemporaryDirectory(dir="/run") as name:
        for path in ("/var/lib/khod", "/run/khod"):
            subprocess.run(["rm", "-rf", path], check=True)
            Path(path).mkdir()
        yield Path(name)


@contextmanager
def _start_khod(listening: socket.socket, **environment: str) -> Iterator[None]:
    about = {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "varlink", **environment}
    inherited = {key: value for key, value in os.environ.items() if key not in ("WATCHDOG_USEC", "NOTIFY_SOCKET")}
    khod = subprocess.Popen(
        [*PASS, sys.executable, "-c", STARTER],
        cwd=REPOSITORY,
        env=inherited | about,
        stdin=listening.fileno(),
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        khod.kill()
        khod.wait()


if __name__ == "__main__":
    print(json.dumps(measure_inside()))
