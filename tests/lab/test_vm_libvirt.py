# SPDX-License-Identifier: LGPL-2.1-or-later
"""The recipe for libvirt (khod-vm(8)) with a real libvirtd, on the simulated kernel: its guest is libvirt's again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.lab.libvirt import EXAMPLES, Libvirt
from tests.lab.process import call
from tests.lab.vms import Vm, registered, require_verified
from tests.unit.luo import System


def test_the_examples_are_a_domain_and_two_scripts() -> None:
    domain = ElementTree.parse(EXAMPLES / "guest.xml").getroot()
    assert domain.find("memoryBacking/access[@mode='shared']") is not None
    assert domain.find("memoryBacking/source[@type='memfd']") is not None
    call(["shellcheck", EXAMPLES / "start-guest", EXAMPLES / "hook-qemu"])


@pytest.fixture
def libvirt(tmp_path: Path) -> Iterator[Libvirt]:
    made = Libvirt(tmp_path / "libvirt")
    yield made
    made.end()


@pytest.mark.proof
def test_a_guest_of_libvirt_counts_on_and_is_managed_again(system: System, libvirt: Libvirt) -> None:
    libvirt.start().virsh("define", "/srv/one.xml")
    libvirt.virsh("start", "one")
    libvirt.counts_on()
    supervisor = Vm(system)
    supervisor.file.unlink()
    system.hook("one", f'qmp = "{libvirt.qmp}"\nkeep = true\nrestart = ["{libvirt.starter}", "one"]\ntimeout = 60\n')
    khod = system.khod()
    supervisor.start()
    registered(khod, "one")
    for _ in range(2):  # the second time its RAM is what libvirt was given
        system.jump(khod)
        libvirt.end()
        last = libvirt.numbers[-1]
        libvirt.start()
        assert "shut off" in libvirt.virsh("domstate", "one")
        khod = system.khod(ready=False)
        supervisor.start(boot=True)
        assert libvirt.counts_on() > last, supervisor.log
        require_verified(khod, "one")
        registered(khod, "one")
        assert "running" in libvirt.virsh("domstate", "one")
    libvirt.virsh("suspend", "one")
    stopped = libvirt.numbers
    assert "paused" in libvirt.virsh("domstate", "one")
    libvirt.virsh("resume", "one")
    libvirt.counts_on()
    assert libvirt.numbers[: len(stopped)] == stopped
    libvirt.virsh("destroy", "one")
    assert "shut off" in libvirt.virsh("domstate", "one")
