# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether this host's KVM runs the lab's kernels, and the machine type that goes with the answer."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import platform
import tempfile
import time
from pathlib import Path

from tests.lab.errors import GuestLost, LabError, WaitTimeout
from tests.lab.kernels import Kernel
from tests.lab.machine import Machine

ENVIRONMENT = "KHO_LAB_ACCEL"
PROBE_DEADLINE = 10.0  # seconds; a kernel under a KVM that works is through its own start in one
MEASURE_SECONDS = 0.2
TRIES = 5
READ_TSC = bytes.fromhex("0f31 48c1e220 4809d0 c3")  # rdtsc; shl rdx, 32; or rax, rdx; ret
NO_ROOT = "VFS: Unable to mount root fs"  # the last thing a kernel without a disk says: everything before it worked


def machine_arguments(accel: str) -> list[str]:
    """QEMU's arguments for the machine and processor under `accel`, kvm or tcg."""
    if accel == "kvm":
        return ["-M", "q35,accel=kvm", "-cpu", "max"]
    # A small translation buffer is the faster one: less of the host's memory to touch for the first time. So is a plain
    # processor: where one has ERMS (as max), kernels and libc copy by `rep movsb`, and that is emulated byte by byte.
    return ["-M", "q35", "-accel", "tcg,thread=multi,tb-size=256", "-cpu", "qemu64,+rdrand,+fsgsbase"]


def kernel_words(accel: str) -> str:
    """Words for a guest's command line.

    An emulated processor tells no frequency of its TSC, so each kernel measures it in some 20 ms. Beside two other
    guests 7.3.4 once found 88 MHz of 2,596: its CLOCK_MONOTONIC ran 29 times too fast for a second of real time, until
    its watchdog took the HPET.

    That watchdog itself stopped 7.3.4 in 1 of 100 boots, with four guests side by side: it spins with interrupts
    disabled until the other processor has read its clock, and that one waits in stop_machine() until the first one
    joins, to change to the TSC. There is a deadline, but in jiffies, which stand still. Real hosts seldom have it: an
    invariant TSC is not watched.
    """
    if accel != "tcg" or platform.machine() != "x86_64":
        return ""
    return f"tsc=reliable tsc_early_khz={_measure_tsc_khz()}"


@functools.cache
def _measure_tsc_khz() -> int:
    """Measure the host's TSC, which an emulated processor shows as its own."""
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(READ_TSC)
    read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(ctypes.c_char.from_buffer(page)))

    def read_both() -> tuple[int, int]:
        tries = [(time.monotonic_ns(), read(), time.monotonic_ns()) for _ in range(TRIES)]
        before, cycles, after = min(tries, key=lambda one: one[2] - one[0])
        return (before + after) // 2, cycles

    began, first = read_both()
    time.sleep(MEASURE_SECONDS)
    ended, last = read_both()
    return round((last - first) * 1_000_000 / (ended - began))


def accel(kernel: Kernel) -> str:
    """Give kvm or tcg: what KHO_LAB_ACCEL says, or what a real boot of `kernel` under KVM shows, probed once.

    A look at /dev/kvm is not enough: it is there on hosts whose KVM is nested too deep to run a stock kernel.
    """
    if wanted := os.environ.get(ENVIRONMENT):
        if wanted not in ("kvm", "tcg"):
            raise LabError(f"{ENVIRONMENT}={wanted}: use kvm or tcg, or unset it to have it probed")
        return wanted
    return _probe(kernel.bzimage)


@functools.cache
def _probe(bzimage: Path) -> str:
    """Boot a kernel with no disk under KVM and see how far it gets."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    arguments = [
        *machine_arguments("kvm"),
        "-smp",
        "2",
        "-m",
        "512",
        "-kernel",
        str(bzimage),
        "-append",
        "console=ttyS0 panic=-1",
        "-no-reboot",
    ]
    with tempfile.TemporaryDirectory(prefix="khod-lab-") as directory:
        try:
            with Machine(arguments, Path(directory) / "console.log", panic_is_loss=False) as machine:
                machine.wait_console(NO_ROOT, PROBE_DEADLINE)
        except (GuestLost, WaitTimeout):
            return "tcg"
    return "kvm"
