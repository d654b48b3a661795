# SPDX-License-Identifier: LGPL-2.1-or-later
"""How long a guest was stopped, from inside: a Linux guest with qemu-ga, on the simulated kernel."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from khod.vm.agent import GuestClock
from tests.lab import kernels
from tests.lab.accel import kernel_words
from tests.lab.recorder import build_initrd, parse_records
from tests.lab.vms import COMMAND, Vm, registered, require_verified
from tests.unit.khods import Khod, until
from tests.unit.luo import System

VERSION = "7.3.4"
DISK_BYTES = 64 << 20
AGENT = "/usr/sbin/qemu-ga"
SET_CLOCK = "/sbin/hwclock"
"""What qemu-ga runs for guest-set-time."""
JITTER_SECONDS = 0.25
"""Of a guest's clock that is read over its serial line, while others use the processor."""


def test_a_guest_with_an_agent_says_how_long_it_was_stopped(
    system: System, vm: Callable[..., Vm], tmp_path: Path
) -> None:
    disk, initrd, agent = tmp_path / "disk", tmp_path / "guest-initrd", tmp_path / "agent"
    disk.write_bytes(bytes(DISK_BYTES))
    initrd.write_bytes(build_initrd(tmp_path, AGENT, SET_CLOCK))
    boots = ["-kernel", str(kernels.find(VERSION).bzimage), "-initrd", str(initrd), "-no-reboot"]
    words = f"console=ttyS0 loglevel=1 panic=-1 {kernel_words('tcg')}"
    boots += ["-append", words, "-drive", f"file={disk},if=virtio,format=raw"]
    boots += ["-chardev", f"socket,id=agent,path={agent},server=on,wait=off", "-device", "virtio-serial"]
    boots += ["-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"]
    command = [*COMMAND, "-m", "256M"]
    first, guest = system.khod(), vm("linux", command, boots=boots)
    with guest.file.open("a") as file:
        file.write(f'agent = "{agent}"\n')
    guest.start()
    write_records(guest, 3)
    registered(first, "linux")

    began = time.monotonic()
    system.jump(first)
    second = system.khod(ready=False)
    guest.start(boot=True)
    write_records(guest, 3)
    require_verified(second, "linux")
    longest = time.monotonic() - began

    until(lambda: bool(list_standstills(second)), second.process)  # the clocks are compared after the verdict
    (found,) = list_standstills(second)
    assert (found["name"], found["kind"]) == ("linux", "vm")
    assert 0 < found["own_seconds"] <= found["seconds"] + JITTER_SECONDS
    assert found["seconds"] <= longest
    assert "by its own clock" in second.khoctl("history", "show").out
    until(lambda: read_lag(agent) < found["own_seconds"] / 2, second.process)  # it is set then
    print(f"stopped for {found['seconds']:.3f} s, by the guest's clock {found['own_seconds']:.3f} s")


def list_standstills(khod: Khod) -> list[dict[str, Any]]:
    """Return how long each producer was stopped by the last handover; none before that is known."""
    found: list[dict[str, Any]] = khod.khoctl("timeline", "--json").json.get("standstills", [])
    return found


def read_lag(agent: Path) -> float:
    """Return by how many seconds the guest's clock is behind; more than any handover if it cannot be read."""
    lag = asyncio.run(GuestClock(str(agent)).read_lag())
    return float("inf") if lag is None else lag


def write_records(guest: Vm, more: int) -> None:
    """Wait until the guest has written so many records more."""

    def count() -> int:
        return len(parse_records(guest.serial.read_text())) if guest.serial.exists() else 0

    before = count()
    assert guest.process is not None
    until(lambda: count() >= before + more, guest.process)
