# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whoever is killed at whatever moment of a handover: the guest counts on, or is kept for its return."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from khod.errors import Exit
from tests.lab.vms import COMMAND, Vm, connected, registered, wait_ready
from tests.unit.khods import DEADLINE, until
from tests.unit.luo import System


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
    wait_ready(khod, guest)
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
    wait_ready(first, guest)
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
    wait_ready(khod, guest)
    assert khod.khoctl("activate").code == Exit.done
    guest.kill_supervisor()
    guest.kill_qemu()
    guest.serial.unlink()
    guest.start().counts_on()
    assert "the guest is lost" in guest.log
    guest.kill_qemu()
    assert guest.process is not None
    guest.process.wait(DEADLINE)


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
    wait_ready(first, guest)
    first.khoctl("kexec", "--hold", *system.images)
    first.died()
    second = system.khod()
    until(lambda: second.khoctl("status", "--json").json["phase"] == "idle", second.process)
    wait_ready(second, guest)
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
    wait_ready(khod, guest)
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
    wait_ready(khod, guest)
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
    wait_ready(first, guest)
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
