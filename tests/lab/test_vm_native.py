# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod-vm with a real QEMU and a real khod, on the simulated kernel: a guest counts, and its host jumps."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from khod.errors import Exit
from khod.vm.process import SLOTS
from khod.vm.slots import count_slots
from tests.lab.counter import read_numbers, write_image
from tests.unit.khods import DEADLINE, REPOSITORY, Answer, Khod, khoctl, until
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
        self._system, self._name = system, name
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
        runtime = self._system.directory / f"run-{self._name}-{self._boots}"
        environment = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "KHOD_SOCKET": str(self._system.directory / "socket"),
            "RUNTIME_DIRECTORY": str(runtime),
        }
        environment.pop("NOTIFY_SOCKET", None)
        with open(self._log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", DYING, self._name, f"--root={self._system.directory / 'root'}"],
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


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    made = System(tmp_path)
    yield made
    made.close()


@pytest.fixture
def vm(system: System) -> Iterator[Callable[..., Vm]]:
    made: list[Vm] = []

    def make(name: str = "one", command: list[str] | None = None, *, idle: bool = False) -> Vm:
        made.append(Vm(system, name, command, idle=idle))
        return made[-1]

    yield make
    for each in made:
        each.die()


def connected(khod: Khod) -> set[str]:
    """The producers that are connected; the file of a VM that others start is in the list before."""
    return {each["name"] for each in khod.khoctl("producers", "--json").json if each["kind"] == "varlink"}


def registered(khod: Khod, *names: str) -> None:
    until(lambda: {*names} <= connected(khod), khod.process)


def test_a_guest_counts_on_after_the_jump(system: System, vm: Callable[..., Vm]) -> None:
    first, guest = system.khod(), vm().start()
    guest.counts_on()
    registered(first, "one")
    system.jump(first)
    last = guest.numbers[-1]
    second = system.khod(ready=False)
    guest.start(boot=True)
    assert guest.counts_on() > last
    verified = second.khoctl("verify", "--json")
    assert (verified.code, verified.json["phase"]) == (Exit.done, "verified"), verified
    assert "one" in verified.json["verdict"]["arrived"]


def test_an_abort_lets_the_guest_run_on(system: System, vm: Callable[..., Vm]) -> None:
    khod, guest = system.khod(), vm().start()
    guest.counts_on()
    registered(khod, "one")
    assert khod.khoctl("activate").code == Exit.done
    before = guest.numbers[-1]
    time.sleep(0.2)
    assert guest.numbers[-1] == before, "it is stopped"
    assert khod.khoctl("abort").code == Exit.done
    guest.counts_on()


def test_a_unit_that_is_stopped_while_the_guest_is_frozen_lets_it_shut_down(
    system: System, vm: Callable[..., Vm]
) -> None:
    """The host is not on its way into the next kernel: the guest must not end with its state in nobody's hands."""
    khod, guest = system.khod(), vm()
    guest.file.write_text(f"{guest.file.read_text()}stop_timeout = 2\n")
    guest.start().counts_on()
    registered(khod, "one")
    assert khod.khoctl("activate").code == Exit.done
    frozen = guest.numbers[-1]
    assert guest.process is not None
    guest.process.terminate()
    assert guest.process.wait(DEADLINE) == 0
    assert guest.numbers[-1] > frozen, "it ran, and was asked to shut down"
    assert "in the middle of a handover" in guest.log


@pytest.mark.parametrize("who", ["khod-vm", "QEMU"])
def test_whoever_is_killed_while_the_guest_is_frozen_the_guest_runs_on(
    system: System, vm: Callable[..., Vm], who: str
) -> None:
    khod, guest = system.khod(), vm().start()
    guest.counts_on()
    registered(khod, "one")
    assert khod.khoctl("activate").code == Exit.done
    if who == "QEMU":
        guest.kill_qemu()
    else:
        guest.kill_supervisor()
        guest.start()
    assert khod.khoctl("abort").code == Exit.done, guest.log
    guest.counts_on()


def test_a_khod_vm_that_is_killed_after_the_jump_takes_its_guest_over(system: System, vm: Callable[..., Vm]) -> None:
    """The RAM that came from the kernel before has no name; another jump shows that it is the one handed over."""
    first, guest = system.khod(), vm().start()
    guest.counts_on()
    registered(first, "one")
    system.jump(first)
    second = system.khod()
    guest.start(boot=True)
    guest.counts_on()
    second.khoctl("verify")
    qemu = guest.pid_file.read_text()

    guest.kill_supervisor()
    until(lambda: "one" not in connected(second), second.process)
    guest.start()

    registered(second, "one")
    guest.counts_on()
    assert guest.pid_file.read_text() == qemu, guest.log
    system.jump(second)
    third = system.khod(ready=False)
    guest.start(boot=True)
    guest.counts_on()
    verified = third.khoctl("verify", "--json")
    assert "one" in verified.json["verdict"]["arrived"]


HANGS = """#!/bin/sh
case "$*" in *-incoming*) [ -e {repaired} ] || exec sleep 60;; esac
exec qemu-system-x86_64 "$@"
"""
"""A QEMU that does not answer while it is to take a guest back."""


def test_a_restore_that_is_not_done_in_time_keeps_the_guest_for_a_retry(system: System, vm: Callable[..., Vm]) -> None:
    qemu, repaired = system.directory / "qemu", system.directory / "repaired"
    qemu.write_text(HANGS.format(repaired=repaired))
    qemu.chmod(0o755)
    first, guest = system.khod(), vm(command=[str(qemu), *COMMAND[1:]])
    guest.file.write_text(f"{guest.file.read_text()}timeout = 3\n")
    guest.start().counts_on()
    registered(first, "one")
    system.jump(first)
    second = system.khod(ready=False)
    guest.start(boot=True)
    assert guest.process is not None
    for times in (1, 2):
        until(lambda: guest.log.count("The guest was not taken back") == times, guest.process)  # noqa: B023
        assert "its state is kept: not done within 3 s" in guest.log
        registered(second, "one")
        if times == 1:
            guest.kill_supervisor()
            guest.start()
    repaired.touch()
    assert second.khoctl("producers", "retry", "one").code == Exit.done
    guest.counts_on()


def test_a_khod_vm_whose_guest_was_lost_while_frozen_ends_with_the_next_one(
    system: System, vm: Callable[..., Vm]
) -> None:
    khod, guest = system.khod(), vm().start()
    guest.counts_on()
    registered(khod, "one")
    assert khod.khoctl("activate").code == Exit.done
    guest.kill_supervisor()
    guest.kill_qemu()
    guest.serial.unlink()
    guest.start().counts_on()
    assert "the guest is lost" in guest.log
    guest.kill_qemu()
    assert guest.process is not None
    guest.process.wait(DEADLINE)


def test_a_qemu_that_does_not_start_is_named_with_its_reason(system: System, vm: Callable[..., Vm]) -> None:
    system.khod()
    guest = vm(command=[*COMMAND, "-device", "nonsense"]).start()
    assert guest.process is not None
    assert guest.process.wait(DEADLINE) == 1
    assert "QEMU ended with code 1: " in guest.log
    assert "'nonsense' is not a valid device" in guest.log


def test_a_guest_comes_back_when_a_slot_is_free(system: System, vm: Callable[..., Vm]) -> None:
    first, guest = system.khod(), vm().start()
    guest.counts_on()
    registered(first, "one")
    system.jump(first)
    second = system.khod(ready=False)
    last = guest.numbers[-1]
    with ExitStack() as others:
        for number in range(count_slots()):
            other = others.enter_context(open(system.directory / SLOTS / str(number), "w"))
            fcntl.flock(other, fcntl.LOCK_EX)
        guest.start(boot=True)
        until(lambda: "waiting for a slot" in second.khoctl("status", "--json").out, second.process)
        assert guest.numbers[-1] == last
    assert guest.counts_on() > last


def test_six_guests_count_on_after_one_handover(system: System, vm: Callable[..., Vm]) -> None:
    hand_over_guests(system, vm, 6)


@pytest.mark.proof
def test_fifty_guests_count_on_after_one_handover(system: System, vm: Callable[..., Vm]) -> None:
    hand_over_guests(system, vm, 50)


def hand_over_guests(system: System, vm: Callable[..., Vm], count: int) -> None:
    """Start so many guests, and see each count on after the jump, with a row of its own in the timeline."""
    names = [f"vm{number}" for number in range(count)]
    first = system.khod()
    guests = [vm(name, IDLE, idle=True).start() for name in names]
    for guest in guests:
        guest.counts_on()
    registered(first, *names)
    system.jump(first)
    last = [guest.numbers[-1] for guest in guests]
    second = system.khod(ready=False)
    for guest in guests:
        guest.start(boot=True)
    assert all(guest.counts_on() > number for guest, number in zip(guests, last, strict=True))
    verified = second.khoctl("verify", "--json")
    assert (verified.code, verified.json["phase"]) == (Exit.done, "verified"), verified
    assert {*names} <= {*verified.json["verdict"]["arrived"]}
    rows = second.khoctl("timeline", "--json").json["rows"]
    restored = {row["name"]: row["seconds"] for row in rows if row["parent"] == "restore"}
    assert {*restored} == {*names}
    print(f"{count} guests: {sorted(restored.values())}")


@pytest.mark.parametrize(
    ("device", "words"),
    [
        (["-drive", "file=fat:rw:{directory},if=none,id=fat"], "vvfat"),
        (["-drive", "driver=null-co,if=none,id=null", "-device", "nvme,serial=1,drive=null"], "nvme"),
    ],
    ids=["at-prepare", "at-freeze"],
)
def test_what_qemu_does_not_migrate_is_refused_and_the_guest_counts_on(
    system: System, vm: Callable[..., Vm], device: list[str], words: str
) -> None:
    """Of the first QEMU tells before the guest is stopped, of the second only when its state is asked for."""
    (system.directory / "shared").mkdir()
    command = [*COMMAND, *(word.format(directory=system.directory / "shared") for word in device)]
    khod, guest = system.khod(), vm(command=command).start()
    guest.counts_on()
    registered(khod, "one")
    refused = khod.khoctl("activate")
    assert refused.code == Exit.refused
    assert words in refused.err
    guest.counts_on()


PHASES = [
    "preparing: one: prepare: told",
    "preparing: one: prepare: ready",
    "freezing: one: freeze: told",
    "freezing: one: freeze: ready",
    "activating: ",
    "active: ",
    "loading: ",
    "loaded: ",
]


@pytest.mark.parametrize(
    "dies_at",
    [pytest.param(each, marks=pytest.mark.proof) for each in PHASES[:3]]
    + PHASES[3:4]
    + [pytest.param(each, marks=pytest.mark.proof) for each in PHASES[4:]],
)
def test_a_guest_counts_on_when_khod_is_killed(system: System, vm: Callable[..., Vm], dies_at: str) -> None:
    first, guest = system.khod(dies_at=dies_at), vm().start()
    guest.counts_on()
    registered(first, "one")
    first.khoctl("kexec", "--hold", *system.images)
    first.died()
    second = system.khod()
    until(lambda: second.khoctl("status", "--json").json["phase"] == "idle", second.process)
    guest.counts_on()
    registered(second, "one")
    assert second.khoctl("activate").code == Exit.done, "it takes part again"


@pytest.mark.parametrize(
    "dies_at",
    [
        *(pytest.param(at, marks=pytest.mark.proof) for at in ("prepare before", "prepare after", "freeze before")),
        "freeze after",
    ],
)
def test_a_guest_counts_on_when_khod_vm_is_killed_at_a_verb(
    system: System, vm: Callable[..., Vm], dies_at: str
) -> None:
    khod, guest = system.khod(), vm().start(dies_at=dies_at)
    guest.counts_on()
    registered(khod, "one")
    assert khod.khoctl("activate").code == Exit.refused
    assert guest.process is not None
    assert guest.process.wait(DEADLINE) == -signal.SIGKILL
    guest.start().counts_on()
    registered(khod, "one")
    assert khod.khoctl("activate").code == Exit.done, "it takes part again"


@pytest.mark.parametrize("dies_at", [pytest.param("thaw before", marks=pytest.mark.proof), "thaw after"])
def test_a_guest_counts_on_when_khod_vm_is_killed_at_the_undo(
    system: System, vm: Callable[..., Vm], dies_at: str
) -> None:
    khod, guest = system.khod(), vm().start(dies_at=dies_at)
    guest.counts_on()
    registered(khod, "one")
    assert khod.khoctl("activate").code == Exit.done
    khod.khoctl("abort")
    assert guest.process is not None
    assert guest.process.wait(DEADLINE) == -signal.SIGKILL
    guest.start().counts_on()


@pytest.mark.parametrize("dies_at", [pytest.param("restore before", marks=pytest.mark.proof), "restore after"])
def test_a_guest_comes_back_when_khod_vm_is_killed_at_its_return(
    system: System, vm: Callable[..., Vm], dies_at: str
) -> None:
    first, guest = system.khod(), vm().start()
    guest.counts_on()
    registered(first, "one")
    system.jump(first)
    last = guest.numbers[-1]
    second = system.khod(ready=False)
    guest.start(boot=True, dies_at=dies_at)
    assert guest.process is not None
    assert guest.process.wait(DEADLINE) == -signal.SIGKILL
    assert guest.start().counts_on() > last
    until(lambda: second.khoctl("status", "--json").json["outcome"] == "verified", second.process)
    assert "one" in second.khoctl("verify", "--json").json["verdict"]["arrived"]
    guest.counts_on()


def test_a_command_that_is_not_installed_is_named(system: System, vm: Callable[..., Vm]) -> None:
    system.khod()
    guest = vm(command=["qemu-system-nowhere", *COMMAND[1:]]).start()
    assert guest.process is not None
    assert guest.process.wait(DEADLINE) == 1
    assert "qemu-system-nowhere cannot be started: ENOENT" in guest.log


def test_a_disk_that_another_machine_has_is_named(system: System, vm: Callable[..., Vm]) -> None:
    khod, disk = system.khod(), system.directory / "disk"
    disk.write_bytes(bytes(1 << 20))
    words = [*COMMAND, "-drive", f"file={disk},format=raw,if=virtio"]
    first, second = vm(command=words).start(), vm("two", words)
    first.counts_on()
    registered(khod, "one")
    second.start()
    assert second.process is not None
    assert second.process.wait(DEADLINE) == 1
    assert 'Failed to get "write" lock' in second.log
    first.counts_on()


def test_a_guest_that_is_larger_than_the_memory_is_refused(system: System, vm: Callable[..., Vm]) -> None:
    """To preserve it would fill it: nothing is told to freeze."""
    words = [*COMMAND]
    words[words.index("64M")] = "256G"
    khod, guest = system.khod(), vm(command=words).start()
    guest.counts_on()
    registered(khod, "one")
    refused = khod.khoctl("activate")
    assert refused.code == Exit.refused
    assert "khod-ram" in refused.err
    guest.counts_on()


# A QEMU that somebody else starts

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


def test_a_guest_that_others_start_is_kept(system: System) -> None:
    first, guest = system.khod(), OthersVm(system).start_qemu()
    try:
        checks = {check["name"]: check for check in first.khoctl("check", "--json").json}
        assert (checks["producers"]["result"], "khod-vm@one.service" in checks["producers"]["remedy"]) == ("fail", True)
        refused = first.khoctl("activate")
        assert refused.code == Exit.refused, "khod-vm is not there, and the guest would be lost"
        assert "khod-vm@one.service" in refused.err
        guest.start()
        guest.counts_on()
        registered(first, "one")
        system.jump(first)
        guest.qemu.wait()
        last = guest.numbers[-1]
        second = system.khod(ready=False)
        guest.start(boot=True)
        assert guest.counts_on() > last
        verified = second.khoctl("verify", "--json")
        assert (verified.code, verified.json["phase"]) == (Exit.done, "verified"), verified
        assert "one" in verified.json["verdict"]["arrived"]
    finally:
        guest.die()


def test_a_guest_whose_memory_is_not_to_be_told_from_another_file_is_refused(system: System) -> None:
    backend = "memory-backend-memfd,size=64M,share=on"
    two = ("-object", f"{backend},id=pc.ram", "-object", f"{backend},id=other")
    khod, guest = system.khod(), OthersVm(system, *two).start_qemu()
    try:
        guest.start()
        guest.counts_on()
        registered(khod, "one")
        refused = khod.khoctl("activate")
        assert refused.code == Exit.refused
        assert "2 files of QEMU's have 67108864 bytes" in refused.err
        guest.counts_on()
    finally:
        guest.die()


@contextmanager
def activation_held(system: System, khod: Khod) -> Iterator[list[Answer]]:
    """Have khod activate; the block runs after `prepare`, before any `freeze` but one. The list has the answer then."""
    here, go = system.directory / "here", system.directory / "go"
    answers: list[Answer] = []
    asking = threading.Thread(target=lambda: answers.append(khoctl(khod.socket, "activate")))
    asking.start()
    until(here.exists, khod.process)
    yield answers
    go.touch()
    asking.join()


def hold_freeze(system: System) -> None:
    """Add a producer for `activation_held`."""
    here, go = system.directory / "here", system.directory / "go"
    script = f"touch {here}; until [ -e {go} ]; do sleep 0.05; done"
    system.hook("two", f"freeze = ['/bin/sh', '-c', '{script}']\nbefore = ['one']\ntimeout = 60\n")


@pytest.mark.parametrize("was_up", [True, False])
def test_a_guest_of_others_that_was_started_since_prepare_is_refused(system: System, *, was_up: bool) -> None:
    hold_freeze(system)
    khod, guest = system.khod(), OthersVm(system)
    if was_up:
        guest.start_qemu()
    try:
        guest.start()
        registered(khod, "one")
        with activation_held(system, khod) as answers:
            if was_up:
                guest.qemu.kill()
                guest.qemu.wait()
            guest.serial.unlink(missing_ok=True)
            guest.start_qemu().counts_on()
        assert answers[0].code == Exit.refused, answers
        assert "since `prepare`" in answers[0].err
        guest.counts_on()
    finally:
        guest.die()


def test_a_guest_of_others_that_was_started_anew_is_not_taken_for_the_one_that_came(system: System) -> None:
    first, guest = system.khod(), OthersVm(system).start_qemu()
    try:
        guest.start().counts_on()
        registered(first, "one")
        system.jump(first)
        guest.qemu.wait()
        last = guest.numbers[-1]
        guest.start_qemu()
        second = system.khod(ready=False)
        guest.start(boot=True)
        assert guest.process is not None
        until(lambda: "a QEMU without the guest's RAM is in its place" in guest.log, guest.process)
        registered(second, "one")
        assert guest.qemu.poll() is None, "it is not ours to end"
        guest.qemu.kill()
        guest.qemu.wait()
        guest.serial.unlink()
        assert second.khoctl("producers", "retry", "one").code == Exit.done
        until(lambda: bool(guest.numbers), guest.process)
        assert guest.numbers[0] == last + 1
    finally:
        guest.die()


def test_a_restart_command_that_hangs_is_repaired_and_tried_again_at_once(system: System) -> None:
    first, guest = system.khod(), OthersVm(system, timeout=3).start_qemu()
    try:
        guest.start().counts_on()
        registered(first, "one")
        system.jump(first)
        guest.qemu.wait()
        last = guest.numbers[-1]
        repaired = guest.again.read_text()
        guest.again.write_text("#!/bin/sh\nexec sleep 60\n")
        second = system.khod(ready=False)
        guest.start(boot=True)
        until(lambda: "its state is kept" in guest.log, guest.process)
        until(lambda: "not yet" in second.khoctl("producers").out, second.process)  # khod tries again by itself
        guest.again.write_text(repaired)
        assert second.khoctl("producers", "retry", "one").code == Exit.done, guest.log
        assert guest.counts_on() > last
    finally:
        guest.die()
