# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod-vm with a real QEMU and a real khod, on the simulated kernel: a guest counts, and its host jumps."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from khod.errors import Exit
from khod.vm.process import SLOTS
from khod.vm.slots import count_slots
from tests.lab.vms import COMMAND, IDLE, Vm, hand_over, registered, require_verified, wait_ready
from tests.unit.khods import DEADLINE, until
from tests.unit.luo import System


def test_a_guest_counts_on_after_the_jump(system: System, vm: Callable[..., Vm]) -> None:
    first, guest = system.khod(), vm().start()
    wait_ready(first, guest)
    second, last = hand_over(system, first, guest)
    assert guest.counts_on() > last
    require_verified(second, "one")


def test_an_abort_lets_the_guest_run_on(system: System, vm: Callable[..., Vm]) -> None:
    khod, guest = system.khod(), vm().start()
    wait_ready(khod, guest)
    assert khod.khoctl("activate").code == Exit.done
    before = guest.numbers[-1]
    time.sleep(0.2)
    assert guest.numbers[-1] == before, "it is stopped"
    assert khod.khoctl("abort").code == Exit.done
    guest.counts_on()


def test_a_qemu_that_does_not_start_is_named_with_its_reason(system: System, vm: Callable[..., Vm]) -> None:
    system.khod()
    guest = vm(command=[*COMMAND, "-device", "nonsense"]).start()
    assert guest.process is not None
    assert guest.process.wait(DEADLINE) == 1
    assert "QEMU ended with code 1: " in guest.log
    assert "'nonsense' is not a valid device" in guest.log


def test_a_guest_comes_back_when_a_slot_is_free(system: System, vm: Callable[..., Vm]) -> None:
    first, guest = system.khod(), vm().start()
    wait_ready(first, guest)
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
    wait_ready(khod, guest)
    refused = khod.khoctl("activate")
    assert refused.code == Exit.refused
    assert words in refused.err
    guest.counts_on()


def test_a_command_that_is_not_installed_is_named(system: System, vm: Callable[..., Vm]) -> None:
    system.khod()
    guest = vm(command=["qemu-system-nowhere", *COMMAND[1:]]).start()
    assert guest.process is not None
    assert guest.process.wait(DEADLINE) == 1
    assert "qemu-system-nowhere cannot be started: ENOENT" in guest.log


def test_a_guest_that_is_larger_than_the_memory_is_refused(system: System, vm: Callable[..., Vm]) -> None:
    """To preserve it would fill it: nothing is told to freeze."""
    words = [*COMMAND]
    words[words.index("64M")] = "256G"
    khod, guest = system.khod(), vm(command=words).start()
    wait_ready(khod, guest)
    refused = khod.khoctl("activate")
    assert refused.code == Exit.refused
    assert "khod-ram" in refused.err
    guest.counts_on()
