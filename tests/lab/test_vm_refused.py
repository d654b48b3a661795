# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest that is not taken back as it was, or whose memory is not what was handed over: it is named."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from khod.errors import Exit
from khod.vm.monitor import open_monitor
from tests.lab.vms import COMMAND, OTHER_MACHINE, PASS_ON, Vm, wait_outcome, wait_ready
from tests.unit.luo import System

MIB = 1 << 20


def test_a_guest_that_the_next_qemu_refuses_waits_for_a_repair_of_its_file(
    system: System, vm: Callable[..., Vm]
) -> None:
    qemu = system.directory / "qemu"
    qemu.write_text(PASS_ON)
    qemu.chmod(0o755)
    first, guest = system.khod(), vm(command=[str(qemu), *COMMAND[1:]]).start()
    wait_ready(first, guest)
    system.jump(first)
    last = guest.numbers[-1]
    qemu.write_text(OTHER_MACHINE)
    second = system.khod(ready=False)
    guest.start(boot=True)
    wait_outcome(second, "degraded")
    assert "Machine type" in guest.log
    assert "the command in its file, then: khoctl producers retry one" in guest.log
    assert second.khoctl("producers", "retry", "one").code == Exit.refused, "nothing was repaired"
    guest.file.write_text(guest.file.read_text().replace(str(qemu), COMMAND[0]))
    assert second.khoctl("producers", "retry", "one").code == Exit.done, guest.log
    assert guest.counts_on() > last
    assert guest.numbers[last] == last + 1


def write_memory(guest: Vm) -> None:
    """Write to the upper half of the guest's RAM, which it does not use."""
    for link in Path(f"/proc/{guest.pid_file.read_text().strip()}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile, as of a QMP session
            if os.stat(link).st_size == 64 * MIB:
                with open(link, "r+b") as memory:
                    memory.seek(32 * MIB)
                    memory.write(b"\xa5" * (32 * MIB))
                return
    raise AssertionError("its RAM was not found")


def test_a_ram_that_was_written_while_the_guest_was_stopped_is_named(system: System, vm: Callable[..., Vm]) -> None:
    """khod compares pages before QEMU is started. The guest continues: to keep it back would lose it for certain."""
    first, guest = system.khod(), vm().start()
    wait_ready(first, guest)
    assert first.khoctl("activate").code == Exit.done
    write_memory(guest)
    system.jump(first)
    last = guest.numbers[-1]
    second = system.khod(ready=False)
    guest.start(boot=True)
    assert guest.counts_on() > last
    wait_outcome(second, "degraded")
    verdict = second.khoctl("verify", "--json").json["verdict"]
    assert (verdict["changed"], verdict["missing"]) == (["one"], [])
    checks = {check["name"]: check for check in verdict["checks"]}
    assert checks["contents one"]["result"] == "fail"
    assert "khod-ram" in checks["contents one"]["evidence"]


async def carry_out(socket: Path, command: str) -> str:
    """Carry out a QMP command, and return the state of the machine after it."""
    async with open_monitor(str(socket), lambda _reason, _progress: None) as monitor:
        await monitor.execute_command(command)
        return await monitor.run_state()


def test_a_paused_guest_takes_part_again_after_an_abort(system: System, vm: Callable[..., Vm]) -> None:
    khod, guest = system.khod(), vm().start()
    wait_ready(khod, guest)
    monitor = guest.runtime / "qmp"
    assert asyncio.run(carry_out(monitor, "stop")) == "paused"
    numbers = guest.numbers
    for _ in range(2):
        assert khod.khoctl("activate").code == Exit.done
        assert khod.khoctl("abort").code == Exit.done
    assert asyncio.run(carry_out(monitor, "query-status")) == "paused"
    assert guest.numbers == numbers
    assert asyncio.run(carry_out(monitor, "cont")) == "running"
    guest.counts_on()


def test_a_second_khod_vm_of_a_machine_does_not_touch_it(system: System, vm: Callable[..., Vm]) -> None:
    khod, guest = system.khod(), vm().start()
    wait_ready(khod, guest)
    first = guest.process
    guest.start()
    assert guest.process is not None
    assert guest.process.wait() == 1
    assert "another khod-vm has" in guest.log
    guest.process = first
    guest.counts_on()
    assert khod.khoctl("activate").code == Exit.done


def test_a_machine_that_has_the_disk_of_another_is_refused_by_both_files(system: System, vm: Callable[..., Vm]) -> None:
    khod, disk = system.khod(), system.directory / "disk"
    disk.write_bytes(bytes(MIB))
    words = [*COMMAND, "-drive", f"file={disk},format=raw,if=virtio,file.locking=off"]
    first = vm(command=words).start()
    wait_ready(khod, first)
    second = vm("two", words).start()
    assert second.process is not None
    assert second.process.wait() == Exit.usage
    refused = khod.khoctl("activate")
    assert refused.code == Exit.refused
    assert str(first.file) in second.log
    assert str(second.file) in second.log
    # A producer's reason is cut where it is long, as it is with the paths of tests.
    assert str(first.file) in "".join(refused.err.split())
    second.file.unlink()
    assert khod.khoctl("activate").code == Exit.done
