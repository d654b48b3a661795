# SPDX-License-Identifier: LGPL-2.1-or-later
"""The network of a guest: a tap device that `up` makes again after the jump, and on which the guest is announced."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab.process import call
from tests.lab.vms import COMMAND, Vm, hand_over, require_verified, wait_ready
from tests.unit.khods import DEADLINE, until
from tests.unit.luo import System

TAP, ADDRESS = "tap-one", "52:54:00:12:34:56"
UP = "ip tuntap add tap-$KHO_NAME mode tap && ip link set tap-$KHO_NAME up"
DOWN = "ip link delete tap-$KHO_NAME"
LISTEN = """
import socket
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x8035)) as rarp:
    print("listening", flush=True)
    while True:
        frame, (device, *_) = rarp.recvfrom(2048)
        print(device, frame[6:12].hex(":"), flush=True)
"""
"""Print each RARP packet that comes from a device: QEMU sends them for its cards."""


class Network:
    """A network namespace without a device: that of a kernel that has just started."""

    def __init__(self, directory: Path) -> None:
        self._heard = directory / "heard"
        self._holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        own = Path("/proc/self/ns/net").readlink()
        until(lambda: Path(f"/proc/{self._holder.pid}/ns/net").readlink() != own, self._holder)
        self.within = ["nsenter", f"--net=/proc/{self._holder.pid}/ns/net"]
        with open(self._heard, "w") as file:
            self._listener = subprocess.Popen([*self.within, sys.executable, "-c", LISTEN], stdout=file)
        until(lambda: "listening" in self.heard, self._listener)

    @property
    def heard(self) -> list[str]:
        return self._heard.read_text().splitlines()

    @property
    def devices(self) -> list[str]:
        return [line.split()[0] for line in call([*self.within, "ip", "-brief", "link"]).splitlines()]

    def end(self) -> None:
        for process in (self._listener, self._holder):
            process.kill()
            process.wait()


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Callable[[str], Network]]:
    made: list[Network] = []

    def make(name: str) -> Network:
        (tmp_path / name).mkdir()
        made.append(Network(tmp_path / name))
        return made[-1]

    yield make
    for each in made:
        each.end()


def test_a_tap_is_made_again_and_the_guest_announced_on_it(
    system: System, vm: Callable[..., Vm], network: Callable[[str], Network]
) -> None:
    netdev = ["-netdev", f"tap,id=net,ifname={TAP},script=no,downscript=no"]
    card = ["-device", f"virtio-net-pci,netdev=net,mac={ADDRESS}"]
    first, guest = system.khod(), vm(command=[*COMMAND, *netdev, *card])
    with guest.file.open("a") as file:
        file.write(f"up = ['/bin/sh', '-c', '{UP}']\ndown = ['/bin/sh', '-c', '{DOWN}']\nstop_timeout = 0.1\n")
    before, after = network("before"), network("after")
    guest.within = before.within
    wait_ready(first, guest.start())
    assert TAP in before.devices
    assert before.heard == ["listening"], "a guest that is started anew has nothing to announce"

    guest.within = after.within
    second, last = hand_over(system, first, guest)
    assert guest.counts_on() > last
    require_verified(second, "one")
    until(lambda: f"{TAP} {ADDRESS}" in after.heard, second.process)

    assert guest.process is not None
    guest.process.send_signal(signal.SIGTERM)
    assert guest.process.wait(DEADLINE) == 0
    assert TAP not in after.devices


def test_a_guest_whose_up_fails_is_not_started(system: System, vm: Callable[..., Vm]) -> None:
    system.khod()
    guest = vm()
    with guest.file.open("a") as file:
        file.write('up = ["/bin/false"]\n')
    guest.start()
    assert guest.process is not None
    assert guest.process.wait(DEADLINE) == 1
    assert "/bin/false ended with code 1" in guest.log
    assert not guest.serial.exists()


@pytest.mark.parametrize("dies_at", ["", "watch after"])
def test_down_runs_also_when_qemu_ends_by_itself(system: System, vm: Callable[..., Vm], dies_at: str) -> None:
    """Also in the moment between two looks at it."""
    khod, guest, gone = system.khod(), vm(), system.directory / "gone"
    with guest.file.open("a") as file:
        file.write(f'down = ["/bin/touch", "{gone}"]\n')
    guest.start(dies_at=dies_at, dies="QEMU")
    if not dies_at:
        wait_ready(khod, guest)
        guest.kill_qemu()
    assert guest.process is not None
    assert guest.process.wait(DEADLINE) != 0
    assert gone.exists()


def test_down_runs_also_when_qemu_ends_before_the_guest_is_there(system: System, vm: Callable[..., Vm]) -> None:
    system.khod()
    guest, made = vm(command=[*COMMAND, "-device", "none-such"]), system.directory / "made"
    with guest.file.open("a") as file:
        file.write(f'up = ["/bin/mkdir", "{made}"]\ndown = ["/bin/rmdir", "{made}"]\n')
    guest.start()
    assert guest.process is not None
    assert guest.process.wait(DEADLINE) == 1
    assert "none-such" in guest.log, "QEMU's reason is reported"
    assert not made.exists()
