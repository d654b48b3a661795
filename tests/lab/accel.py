# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether this host's KVM runs the lab's kernels, and the machine type that goes with the answer."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path

from tests.lab.errors import GuestLost, LabError, WaitTimeout
from tests.lab.kernels import Kernel
from tests.lab.machine import Machine

ENVIRONMENT = "KHO_LAB_ACCEL"
PROBE_DEADLINE = 10.0  # seconds; a kernel under a KVM that works is through its own start in one
NO_ROOT = "VFS: Unable to mount root fs"  # the last thing a kernel without a disk says: everything before it worked


def machine_arguments(accel: str) -> list[str]:
    """QEMU's arguments for the machine and processor under `accel`, kvm or tcg."""
    if accel == "kvm":
        return ["-M", "q35,accel=kvm", "-cpu", "max"]
    # A small translation buffer is the faster one: less of the host's memory to touch for the first time. So is a plain
    # processor: where one has ERMS (as max), kernels and libc copy by `rep movsb`, and that is emulated byte by byte.
    return ["-M", "q35", "-accel", "tcg,thread=multi,tb-size=256", "-cpu", "qemu64,+rdrand,+fsgsbase"]


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
