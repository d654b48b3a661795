# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod's own time inside the blackout, on the simulated kernel: the window less what the kernel's calls took."""

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from khod.abi.calls import KMSG
from khod.config import Settings
from khod.engine import Engine
from khod.engine.guard import Guard
from khod.handover.record import Store
from khod.kernel.kexec import Kexec
from khod.kernel.luo import Luo
from khod.kernel.probe import probe_kho
from khod.kernel.sysfs import KHO
from khod.kernel.thread import Workers
from khod.producers.sessions import Sessions
from khod.simulated.kernel import Rebooted, SimulatedKernel, build_image, build_initrd
from khod.systemd import shutdown
from khod.systemd.fdstore import ServiceManager
from khod.target.target import Given, Request
from tests.bench.figure import Figure

ROUNDS = 20
MOST_MS = 5.0


class Timed(SimulatedKernel):
    """A simulated kernel that notes when the window began and how long its own calls took since."""

    began = 0.0
    ended = 0.0
    inside = 0.0

    def read_file(self, path: str) -> bytes:
        started = time.perf_counter()
        try:
            return super().read_file(path)
        finally:
            self._count(started)

    def write_file(self, path: str, data: bytes) -> None:
        started = time.perf_counter()
        if path == f"{KHO}/active" and data.startswith(b"1"):
            self.began, self.inside = started, 0.0
        try:
            super().write_file(path, data)
        finally:
            if path != KMSG:
                self._count(started)

    def kexec_file_load(self, kernel_fd: int, initrd_fd: int, cmdline: bytes, flags: int) -> None:
        started = time.perf_counter()
        super().kexec_file_load(kernel_fd, initrd_fd, cmdline, flags)
        self.inside += time.perf_counter() - started

    def reboot_kexec(self) -> None:
        self.ended = time.perf_counter()
        super().reboot_kexec()

    def _count(self, started: float) -> None:
        if not self.ended:
            self.inside += time.perf_counter() - started


def run() -> Iterator[Figure]:
    """Measure ROUNDS handovers, each from idle."""
    own = sorted(asyncio.run(_one()) * 1e3 for _ in range(ROUNDS))
    yield Figure(
        "khod's own time in the window, simulated kernel",
        statistics.median(own),
        MOST_MS,
        "ms",
        f"median of {ROUNDS}, {own[0]:.2f} to {own[-1]:.2f}, its fsyncs included",
    )


async def _one() -> float:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        kernel, workers = Timed(root / "kernel"), Workers()
        kexec, store = Kexec(kernel), Store(root)
        jump = shutdown.make_immediate(kexec, workers, 60)
        engine = Engine(
            kexec,
            lambda: probe_kho(kernel),
            store,
            Settings(),
            producers=list,
            sessions=Sessions(Luo(kernel), workers.kernel, ServiceManager()),
            guard=Guard,
            orderly=jump,
            immediate=jump,
            workers=workers,
            tell=lambda _: None,
        )
        await engine.start()
        (root / "image").write_bytes(build_image())
        (root / "initrd").write_bytes(build_initrd())
        fds = [os.open(root / what, os.O_RDONLY) for what in ("image", "initrd")]
        try:
            await engine.kexec(Request(Given(fds[0], "image"), (Given(fds[1], "initrd"),), now=True))
        except Rebooted:
            pass
        finally:
            for fd in fds:
                os.close(fd)
            workers.kernel.close()
        return kernel.ended - kernel.began - kernel.inside
