# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whoever is killed at whatever moment of a handover: the guest counts on, or is kept for its return."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence

import pytest

from khod.errors import Exit
from tests.lab.vms import COMMAND, OthersVm, Vm, connected, registered, wait_outcome, wait_ready
from tests.unit.khods import DEADLINE, Answer, Khod, until
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


@pytest.mark.parametrize("who", ["khod-vm", "QEMU", "both", "all"])
def test_whoever_is_killed_while_the_guest_is_frozen_the_guest_runs_on(
    system: System, vm: Callable[..., Vm], who: str
) -> None:
    khod, guest = system.khod(), vm().start()
    wait_ready(khod, guest)
    assert khod.khoctl("activate").code == Exit.done
    if who != "khod-vm":
        guest.kill_qemu()
    if who != "QEMU":
        guest.kill_supervisor()
    if who == "all":
        khod.end(signal.SIGKILL)
        khod = system.khod(ready=False).listening()
    if who != "QEMU":
        guest.start()
    khod.khoctl("abort")
    guest.counts_on()
    until(lambda: khod.khoctl("status", "--json").json["phase"] == "idle", khod.process)
    registered(khod, "one")
    assert khod.khoctl("activate").code == Exit.done, "it takes part again"


def test_a_qemu_that_dies_while_its_guest_is_thawed_is_started_again_with_it(
    system: System, vm: Callable[..., Vm]
) -> None:
    khod, guest = system.khod(), vm().start(dies_at="thaw asked", dies="QEMU")
    wait_ready(khod, guest)
    assert khod.khoctl("activate").code == Exit.done
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
        until(lambda: guest.log.count("The guest was not taken back") >= times, guest.process)  # noqa: B023
        assert "its state is kept: not done within 3 s" in guest.log
        registered(second, "one")
        if times == 1:
            guest.kill_supervisor()
            guest.start()
    repaired.touch()
    second.khoctl("producers", "retry", "one")  # khod, which tries again by itself, may have been first
    guest.counts_on()
    until(lambda: "one" in second.khoctl("verify", "--json").json["verdict"]["arrived"], second.process)


def test_a_khod_vm_whose_guest_was_lost_while_frozen_ends_with_the_next_one(
    system: System, vm: Callable[..., Vm]
) -> None:
    khod, guest = system.khod(), vm().start()
    wait_ready(khod, guest)
    assert khod.khoctl("activate").code == Exit.done
    guest.kill_supervisor()
    guest.kill_qemu()
    os.kill(json.loads((guest.runtime / "frozen").read_text())["keeper"]["pid"], signal.SIGKILL)
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


KEPT = [
    *(("khod-vm", f"{verb} {when}") for verb in ("prepare", "thaw", "cancel") for when in ("before", "after")),
    *(("khod-vm", f"freeze {when}") for when in ("before", "during", "after")),
    ("khod-vm", "thaw late"),
    *((who, at) for who in ("QEMU", "both") for at in ("freeze after", "thaw before", "thaw late")),
]
"""Who is killed when, and the guest counts on: its state is in QEMU, or was saved."""
LOST = [
    (who, at)
    for who in ("QEMU", "both")
    for at in ("prepare before", "prepare after", "freeze before", "freeze during", "cancel before", "cancel after")
]
"""Who is killed when, and the guest is lost: QEMU alone had its state."""
TRIED = {("own", "khod-vm", "freeze during"), ("own", "QEMU", "freeze during"), ("own", "both", "thaw before")}
TRIED |= {("others", "QEMU", "freeze after"), ("own", "khod-vm", "thaw after")}
TRIED |= {("own", "QEMU", "restore during"), ("own", "both", "restore after"), ("others", "khod-vm", "restore during")}
"""What of the grid is in `make test`."""
SWITCHED_OFF = ("others", "QEMU", "prepare before")
"""Then a QEMU that others start is not there, and its guest is no part of the handover."""


def grid(cells: Sequence[tuple[str, str]]) -> list[object]:
    """Return each for khod-vm's guest and for an other's."""
    rows = [(kind, *cell) for kind in ("own", "others") for cell in cells]
    return [pytest.param(*row, marks=[] if row in TRIED else pytest.mark.proof, id="-".join(row)) for row in rows]


@pytest.fixture
def start_guest(system: System) -> Iterator[Callable[[str], Vm]]:
    """Give a function that makes the guest, with its QEMU where others start it."""
    made: list[Vm] = []

    def start(kind: str) -> Vm:
        made.append(Vm(system) if kind == "own" else OthersVm(system).start_qemu())
        return made[-1]

    yield start
    for each in made:
        each.die()


def roll_back(khod: Khod) -> Answer:
    """Activate, and abort where that succeeds; the answer to the first."""
    activated = khod.khoctl("activate")
    if activated.code == Exit.done:
        khod.khoctl("abort")
    return activated


@pytest.mark.parametrize(("kind", "who", "at"), grid(KEPT))
def test_a_guest_counts_on_whoever_is_killed_at_a_verb(
    system: System, start_guest: Callable[[str], Vm], kind: str, who: str, at: str
) -> None:
    khod, guest = system.khod(), start_guest(kind).start(dies_at=at, dies=who)
    wait_ready(khod, guest)
    roll_back(khod)
    if guest.wait_killed():
        guest.start()
    if khod.khoctl("status", "--json").json["phase"] != "idle":  # thaw failed: the abort is asked for again
        assert khod.khoctl("abort").code == Exit.done
    guest.counts_on()
    registered(khod, "one")
    assert khod.khoctl("activate").code == Exit.done, "it takes part again"


@pytest.mark.parametrize(("kind", "who", "at"), grid(LOST))
def test_a_guest_whose_state_died_with_qemu_is_named_and_starts_anew(
    system: System, start_guest: Callable[[str], Vm], kind: str, who: str, at: str
) -> None:
    khod, guest = system.khod(), start_guest(kind).start(dies_at=at, dies=who)
    wait_ready(khod, guest)
    activated = roll_back(khod)
    if not at.startswith("cancel") and (kind, who, at) != SWITCHED_OFF:
        assert activated.code == Exit.refused
        assert "one" in activated.err
    guest.start_anew().counts_on()
    if who == "QEMU":
        assert "QEMU has ended" in guest.log
    registered(khod, "one")
    assert khod.khoctl("activate").code == Exit.done, "it takes part again"


@pytest.mark.parametrize(
    ("kind", "who", "at"),
    grid(
        [
            *(("khod-vm", f"restore {when}") for when in ("before", "during", "late", "after")),
            *(("khod-vm", f"finish {when}") for when in ("before", "after")),
            *((who, f"restore {when}") for who in ("QEMU", "both") for when in ("during", "late")),
        ]
    ),
)
def test_a_guest_comes_back_whoever_is_killed_at_its_return(
    system: System, start_guest: Callable[[str], Vm], kind: str, who: str, at: str
) -> None:
    first, guest = system.khod(), start_guest(kind).start()
    wait_ready(first, guest)
    system.jump(first)
    last = guest.numbers[-1]
    second = system.khod(ready=False)
    guest.start(boot=True, dies_at=at, dies=who)
    if guest.wait_killed():
        guest.start()
    if who == "QEMU":
        until(lambda: "its state is kept" in guest.log, guest.process)
        second.khoctl("producers", "retry", "one")  # khod, which tries again by itself, may be first
    assert guest.counts_on() > last
    wait_outcome(second, "verified")
    assert "one" in second.khoctl("verify", "--json").json["verdict"]["arrived"]
    guest.counts_on()


@pytest.mark.parametrize(
    ("kind", "who", "at"),
    grid([(who, at) for who in ("QEMU", "both") for at in ("restore after", "finish before", "finish after")]),
)
def test_a_guest_whose_qemu_is_killed_after_its_return_does_not_continue_twice(
    system: System, start_guest: Callable[[str], Vm], kind: str, who: str, at: str
) -> None:
    """It has written to its disks since: its state is not to be loaded beside them again."""
    first, guest = system.khod(), start_guest(kind).start()
    wait_ready(first, guest)
    system.jump(first)
    second = system.khod(ready=False)
    guest.start(boot=True, dies_at=at, dies=who)
    guest.start_anew().counts_on()
    assert guest.numbers[0] == 1
    registered(second, "one")
    until(lambda: not second.khoctl("status", "--json").json.get("claims", [""]), second.process)
    assert second.khoctl("activate").code == Exit.done, "it takes part again"
