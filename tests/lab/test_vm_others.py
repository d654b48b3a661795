# SPDX-License-Identifier: LGPL-2.1-or-later
"""A QEMU that others start, and whose guest khod-vm keeps, on the simulated kernel."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from khod.errors import Exit
from tests.lab.vms import OthersVm, registered, require_verified, wait_outcome, wait_ready
from tests.unit.khods import Answer, Khod, khoctl, until
from tests.unit.luo import System


def test_a_guest_that_others_start_is_kept(system: System) -> None:
    first, guest = system.khod(), OthersVm(system).start_qemu()
    try:
        checks = {check["name"]: check for check in first.khoctl("check", "--json").json}
        assert (checks["producers"]["result"], "khod-vm@one.service" in checks["producers"]["remedy"]) == ("fail", True)
        refused = first.khoctl("activate")
        assert refused.code == Exit.refused, "khod-vm is not there, and the guest would be lost"
        assert "khod-vm@one.service" in refused.err
        guest.start()
        wait_ready(first, guest)
        system.jump(first)
        guest.qemu.wait()
        last = guest.numbers[-1]
        second = system.khod(ready=False)
        guest.start(boot=True)
        assert guest.counts_on() > last
        require_verified(second, "one")
    finally:
        guest.die()


def test_a_guest_whose_memory_is_not_to_be_told_from_another_file_is_refused(system: System) -> None:
    backend = "memory-backend-memfd,size=64M,share=on"
    two = ("-object", f"{backend},id=pc.ram", "-object", f"{backend},id=other")
    khod, guest = system.khod(), OthersVm(system, *two).start_qemu()
    try:
        guest.start()
        wait_ready(khod, guest)
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
        last, begun_line = guest.numbers[-1], guest.serial.read_text().rpartition("\n")[2]
        guest.start_qemu().wait_listening()
        second = system.khod(ready=False)
        guest.start(boot=True)
        assert guest.process is not None
        until(lambda: "a QEMU without the guest's RAM is in its place" in guest.log, guest.process)
        wait_outcome(second, "degraded")
        assert guest.qemu.poll() is None, "it is not ours to end"
        guest.qemu.kill()
        guest.qemu.wait()
        guest.serial.write_text(begun_line)  # the guest may have been stopped within a number, and goes on there
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
        hung = system.directory / "hung"
        guest.again.write_text(f"#!/bin/sh\necho $$ >> {hung}\nexec sleep 60\n")
        second = system.khod(ready=False)
        guest.start(boot=True)
        until(lambda: hung.exists() and len(hung.read_text().splitlines()) == 2, second.process)  # khod tries again
        assert "its state is kept" in guest.log
        first_try = int(hung.read_text().split()[0])
        assert not Path(f"/proc/{first_try}").exists(), "beside the next one it could take the RAM as well"
        guest.again.write_text(repaired)
        assert second.khoctl("producers", "retry", "one").code == Exit.done, guest.log
        assert guest.counts_on() > last
    finally:
        guest.die()
