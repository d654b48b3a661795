# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests that count, each with a khod-vm, for tests with a real QEMU and a real khod on the simulated kernel."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress

from khod.errors import Exit
from tests.lab.counter import read_numbers, write_image
from tests.unit.khods import REPOSITORY, Khod, until
from tests.unit.luo import System

COMMAND = ["qemu-system-x86_64", "-machine", "q35", "-m", "64M", "-accel", "tcg", "-display", "none", "-nodefaults"]
IDLE = [*COMMAND, "-m", "16M", "-cpu", "qemu64,-apic"]
"""For an idle guest: many guests that count without a pause would leave khod no processor."""


DYING = """
import os, signal, sys
from khod.vm import supervisor
verb, _, when = os.environ["DIES_AT"].partition(" ")
if verb:
    carry_out = getattr(supervisor.Supervisor, f"_{verb}")
    async def die(self, step):
        if when == "after":
            await carry_out(self, step)
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(supervisor.Supervisor, f"_{verb}", die)
sys.exit(supervisor.main())
"""


class Vm:
    """A guest that counts, and the khod-vm that supervises it."""

    def __init__(
        self, system: System, name: str = "one", command: list[str] | None = None, *, idle: bool = False
    ) -> None:
        self._system, self.name = system, name
        directory = system.directory / f"vm-{name}"
        directory.mkdir(exist_ok=True)
        self.serial, self.pid_file, self._log = directory / "serial", directory / "pid", directory / "log"
        self._boots = 0
        image = write_image(directory / "guest", idle=idle)
        words = [*(command or COMMAND), "-bios", str(image), "-pidfile", str(self.pid_file)]
        words += ["-chardev", f"file,id=serial,path={self.serial},append=on", "-serial", "chardev:serial"]
        at = system.directory / "root/etc/kho/vm.d"
        at.mkdir(parents=True, exist_ok=True)
        self.file = at / f"{name}.toml"
        self.file.write_text(f"command = {words}\n")
        self.words = words
        self.process: subprocess.Popen[bytes] | None = None
        system.mortal.append(self.die)

    def start(self, *, boot: bool = False, dies_at: str = "") -> Vm:
        """Start khod-vm; with `boot` the kernel before, and all of its processes, have ended.

        With `dies_at` it kills itself before or after a verb: "freeze before".
        """
        if boot:
            self.die()
            self._boots += 1
        runtime = self._system.directory / f"run-{self.name}-{self._boots}"
        environment = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "KHOD_SOCKET": str(self._system.directory / "socket"),
            "RUNTIME_DIRECTORY": str(runtime),
        }
        environment.pop("NOTIFY_SOCKET", None)
        with open(self._log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", DYING, self.name, f"--root={self._system.directory / 'root'}"],
                env=environment | {"DIES_AT": dies_at},
                stderr=log,
            )
        return self

    @property
    def numbers(self) -> list[int]:
        return read_numbers(self.serial)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def counts_on(self, more: int = 3) -> int:
        """Wait until the guest has counted on; the last number. None came twice, and none is missing."""
        before = len(self.numbers)
        assert self.process is not None
        until(lambda: len(self.numbers) >= before + more, self.process)
        numbers = self.numbers
        assert numbers == list(range(1, len(numbers) + 1)), self.log
        return numbers[-1]

    def kill_qemu(self) -> None:
        with suppress(FileNotFoundError, ProcessLookupError, ValueError):
            os.kill(int(self.pid_file.read_text()), signal.SIGKILL)

    def kill_supervisor(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def die(self) -> None:
        """End with the kernel."""
        self.kill_supervisor()
        self.kill_qemu()


AGAIN = """#!/bin/sh
# The files of the guest's RAM come as descriptors from 3 on; the machine is the same otherwise.
exec {command} -object memory-backend-file,id=$LISTEN_FDNAMES,size=64M,mem-path=/proc/self/fd/3,share=on \
    -machine memory-backend=$LISTEN_FDNAMES -qmp unix:{socket},server=on,wait=off -incoming defer
"""


class OthersVm(Vm):
    """A QEMU as libvirt starts one, whose guest khod-vm keeps."""

    def __init__(self, system: System, *memory: str, timeout: int = 60) -> None:
        super().__init__(system)
        self.file.unlink()
        self._command = self.words
        self._memory = memory or ("-object", "memory-backend-memfd,id=pc.ram,size=64M,share=on")
        self._qmp = system.directory / "vm-one/others.qmp"
        self.again = again = system.directory / "vm-one/again"
        again.write_text(AGAIN.format(command=" ".join(self._command), socket=self._qmp))
        again.chmod(0o755)
        system.hook("one", f'qmp = "{self._qmp}"\nkeep = true\nrestart = ["{again}"]\ntimeout = {timeout}\n')

    def start_qemu(self) -> OthersVm:
        words = [*self._command, *self._memory, "-machine", "memory-backend=pc.ram"]
        words += ["-qmp", f"unix:{self._qmp},server=on,wait=off"]
        self.qemu = subprocess.Popen(words)
        return self


def connected(khod: Khod) -> set[str]:
    """The producers that are connected; the file of a VM that others start is in the list before."""
    return {each["name"] for each in khod.khoctl("producers", "--json").json if each["kind"] == "varlink"}


def registered(khod: Khod, *names: str) -> None:
    until(lambda: {*names} <= connected(khod), khod.process)


def wait_ready(khod: Khod, guest: Vm) -> None:
    """Wait until a guest counts, and its khod-vm is connected."""
    guest.counts_on()
    registered(khod, guest.name)


def hand_over(system: System, khod: Khod, guest: Vm) -> tuple[Khod, int]:
    """Have khod jump with a guest, and start khod and khod-vm in the next kernel; that khod, and the last number."""
    system.jump(khod)
    last = guest.numbers[-1]
    following = system.khod(ready=False)
    guest.start(boot=True)
    return following, last


def require_verified(khod: Khod, *names: str) -> None:
    """See that the handover is verified, and that these guests are among what arrived."""
    verified = khod.khoctl("verify", "--json")
    assert (verified.code, verified.json["phase"]) == (Exit.done, "verified"), verified
    assert {*names} <= {*verified.json["verdict"]["arrived"]}
