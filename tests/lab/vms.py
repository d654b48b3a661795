# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests that count, each with a khod-vm, for tests with a real QEMU and a real khod on the simulated kernel."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from khod.errors import Exit
from khod.vm.frozen import FrozenGuest
from tests.lab.counter import read_numbers, write_image
from tests.unit.khods import DEADLINE, REPOSITORY, Khod, until
from tests.unit.luo import System

COMMAND = ["qemu-system-x86_64", "-machine", "q35", "-m", "64M", "-accel", "tcg", "-display", "none", "-nodefaults"]
PASS_ON = '#!/bin/sh\nexec qemu-system-x86_64 "$@"\n'
OTHER_MACHINE = """\
#!/bin/sh
for word; do
    shift
    case $word in pc-q35-*) word=pc-q35-7.1 ;; esac
    set -- "$@" "$word"
done
exec qemu-system-x86_64 "$@"
"""
"""A QEMU that makes another machine of each."""
IDLE = [*COMMAND, "-m", "16M", "-cpu", "qemu64,-apic"]
"""For an idle guest: many guests that count without a pause would leave khod no processor."""


DYING = """
import os, select, signal, sys
from pathlib import Path
from khod import producer
from khod.vm import agent, migration, process, supervisor

verb, _, when = os.environ["DIES_AT"].partition(" ")
call_handler, give_stream = producer.Producer._call_handler, migration._give_stream
go_on, end_migration, is_up = supervisor._continue_once, supervisor.end_migration, process.QemuProcess.is_up
told = ""

agent.FINISH_SECONDS = 20.0  # a busy processor is no reason to miss the guest's clock

def kill():
    global when
    dies, when = os.environ["DIES"], ""
    qemu = Path(os.environ["PID_FILE"]).read_text()
    Path(os.environ["KILLED"]).write_text(qemu)
    if dies != "khod-vm":
        pidfd = os.pidfd_open(int(qemu))
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        select.select([pidfd], [], [])
    if dies != "QEMU":
        os.kill(os.getpid(), signal.SIGKILL)

def carry_out(self, step):
    global told
    told = step.verb
    if (verb, when) == (told, "before"):
        kill()
    answer = call_handler(self, step)
    if (verb, when) == (told, "after"):
        kill()
    return answer

async def give(vm, fd):
    if (verb, when) == (told, "during"):
        kill()
    await give_stream(vm, fd)

async def continue_once(vm, state):
    if (verb, when) == (told, "late"):
        kill()
    await go_on(vm, state)

async def ask_migration(vm):
    if (verb, when) == (told, "asked"):
        os.kill(int(Path(os.environ["PID_FILE"]).read_text()), signal.SIGKILL)  # it need not have ended yet
        Path(os.environ["KILLED"]).write_text(Path(os.environ["PID_FILE"]).read_text())
    await end_migration(vm)

def see_up(self):
    up = is_up.fget(self)
    if (verb, when) == ("watch", "after") and up:
        kill()
    return up

producer.Producer._call_handler, migration._give_stream = carry_out, give
supervisor._continue_once, supervisor.end_migration = continue_once, ask_migration
process.QemuProcess.is_up = property(see_up)
sys.exit(supervisor.main())
"""
"""khod-vm, with a death at a moment of a verb: `during` is after `stop`, or before a state is loaded; `late` is before
`cont`, `thaw asked` when QEMU is asked to continue, and `watch after` when it was just seen to be there."""


class Vm:
    """A guest that counts, and the khod-vm that supervises it."""

    def __init__(
        self,
        system: System,
        name: str = "one",
        command: list[str] | None = None,
        *,
        idle: bool = False,
        boots: list[str] | None = None,
    ) -> None:
        """Describe it in khod-vm's file; with `boots`, options of QEMU, the guest is another one."""
        self._system, self.name = system, name
        directory = system.directory / f"vm-{name}"
        directory.mkdir(exist_ok=True)
        self.serial, self.pid_file, self._log = directory / "serial", directory / "pid", directory / "log"
        self.within: list[str] = []
        """What executes khod-vm, as in a network namespace."""
        self._boots, self._dies = 0, ""
        self.killed = directory / "killed"
        boots = boots or ["-bios", str(write_image(directory / "guest", idle=idle))]
        words = [*(command or COMMAND), *boots, "-pidfile", str(self.pid_file)]
        words += ["-chardev", f"file,id=serial,path={self.serial},append=on", "-serial", "chardev:serial"]
        at = system.directory / "root/etc/kho/vm.d"
        at.mkdir(parents=True, exist_ok=True)
        self.file = at / f"{name}.toml"
        self.file.write_text(f"command = {words}\n")
        self.words = words
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def runtime(self) -> Path:
        """Its directory below /run."""
        return self._system.directory / f"run-{self.name}-{self._boots}"

    def start(self, *, boot: bool = False, dies_at: str = "", dies: str = "khod-vm") -> Vm:
        """Start khod-vm; with `boot` in the next kernel: a jump of `system` has ended all processes of the one before.

        With `dies_at`, as "freeze before", khod-vm, QEMU or both are killed before, during or after a verb.
        """
        if boot:
            self._boots += 1
        if self.die not in self._system.mortal:
            self._system.mortal.append(self.die)
        environment = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "KHOD_SOCKET": str(self._system.directory / "socket"),
            "RUNTIME_DIRECTORY": str(self.runtime),
            "PID_FILE": str(self.pid_file),
            "KILLED": str(self.killed),
        }
        environment.pop("NOTIFY_SOCKET", None)
        self._dies = dies
        self.killed.unlink(missing_ok=True)
        with open(self._log, "ab") as log:
            self.process = subprocess.Popen(
                [*self.within, sys.executable, "-c", DYING, self.name, f"--root={self._system.directory / 'root'}"],
                env=environment | {"DIES_AT": dies_at, "DIES": dies},
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
            pidfd = os.pidfd_open(int(self.pid_file.read_text()))
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                assert select.select([pidfd], [], [], DEADLINE)[0]
            finally:
                os.close(pidfd)

    def kill_supervisor(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def wait_killed(self) -> bool:
        """Wait for the death that `start` was told of; whether khod-vm has died."""
        assert self.process is not None
        until(lambda: self.killed.exists() and self.killed.read_text() != "", None)
        if self._dies != "khod-vm":
            with suppress(ProcessLookupError):  # it has ended, and its parent knows
                pidfd = os.pidfd_open(int(self.killed.read_text()))
                assert select.select([pidfd], [], [], DEADLINE)[0]
                os.close(pidfd)
        return self._dies != "QEMU" and self.process.wait(DEADLINE) == -signal.SIGKILL

    def start_anew(self) -> Vm:
        """Start the guest anew after that, as its unit does when khod-vm has ended with QEMU."""
        assert self.process is not None
        self.wait_killed()
        assert self.process.wait(DEADLINE), "a failure: the unit is started again"
        self.serial.unlink()
        return self.start()

    def die(self) -> None:
        """End with the kernel."""
        self.kill_supervisor()
        self.kill_qemu()
        FrozenGuest(self.runtime / "frozen").release()


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

    def wait_listening(self) -> None:
        """Wait until QEMU can be found by its socket."""

        def connects() -> bool:
            with socket.socket(socket.AF_UNIX) as sock:
                return sock.connect_ex(str(self._qmp)) == 0

        until(connects, self.qemu)

    def start_anew(self) -> OthersVm:
        """Start the guest anew after that, as whoever runs it; and khod-vm where it has died."""
        is_killed = self.wait_killed()
        self.qemu.wait()
        self.serial.unlink()
        self.start_qemu()
        if is_killed:
            self.start()
        return self


def connected(khod: Khod) -> set[str]:
    """The producers that are connected; the file of a VM that others start is in the list before."""
    rows = khod.khoctl("producers", "--json").json
    return {each["name"] for each in rows if each["kind"] == "vm" and not each["answer"].endswith("is not there")}


def registered(khod: Khod, *names: str) -> None:
    until(lambda: {*names} <= connected(khod), khod.process)


def wait_outcome(khod: Khod, outcome: str) -> None:
    """Wait until khod has verified the handover with this outcome, and a retry is not refused any more.

    The status has the outcome while khod still writes it to the record, the history only after that.
    """
    until(
        lambda: (
            [each["outcome"] for each in khod.khoctl("history", "--json").json.get("attempts", [])][:1] == [outcome]
        ),
        khod.process,
    )


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
