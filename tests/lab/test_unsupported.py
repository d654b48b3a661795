# SPDX-License-Identifier: LGPL-2.1-or-later
"""Hosts that cannot hand over: khod runs there, touches nothing, and says what is missing and what to add."""

import pytest

from tests.lab import stock
from tests.lab.conftest import Boot, Online
from tests.lab.host import Host, image

PID = "systemctl show -P MainPID kho-handover"
UNMOUNT = (
    "systemctl mask -q --runtime sys-kernel-debug.mount; umount -R /sys/kernel/debug; systemctl restart kho-handover"
)
MOUNT = "systemctl unmask -q --runtime sys-kernel-debug.mount; systemctl start sys-kernel-debug.mount"


def refuses(host: Host, *said: str) -> None:
    """Hold that khod says so at every door, and that the kernel is as it was."""
    host.guest.run(["systemctl", "is-active", "kho-handover"])
    checked = host.khoctl("check", code=4).stdout
    for words in said:
        assert words in checked
    for attempt in (["activate"], ["kexec", *image("7.3.4")]):
        failed = host.khoctl(*attempt, code=4)
        assert said[0] in failed.stdout + failed.stderr
    status = host.status()
    assert status["phase"] == "idle"
    assert status["generation"] == "none"
    assert status["summary"].startswith("No handover is under way. No handover is possible: ")
    assert said[0] in status["summary"]
    assert status["remedy"]
    assert host.word("/sys/kernel/kexec_loaded") == "0"


@pytest.mark.proof
def test_a_kernel_without_kho(boot: Boot) -> None:
    """Debian's own kernel, first by its symbols alone, then with its configuration where its package would put it."""
    debian = stock.find()
    host = Host(boot(debian.kernel.version, qemu_extra=debian.qemu_extra, cmdline_extra="quiet"))
    assert host.guest.wait_online() == "running"
    assert host.guest.hellos[-1].release == debian.release
    said = "CONFIG_KEXEC_HANDOVER is not set", "Boot a kernel built with CONFIG_KEXEC_HANDOVER=y"

    host.shell("test ! -e /proc/config.gz; test ! -e /boot/config-$(uname -r)")
    refuses(host, *said)

    host.guest.put(f"/boot/config-{debian.release}", debian.kernel.config.read_bytes())
    assert said[0] in host.khoctl("check", code=4).stdout


@pytest.mark.proof
def test_kho_switched_off(boot: Boot) -> None:
    host = Host(boot("7.3.4"))
    assert host.guest.wait_online() == "running"
    refuses(host, "kho=on is not on the kernel command line", "Add kho=on to the kernel command line")


def test_debugfs_unmounted(online: Online) -> None:
    """It is not mounted for the operator: the remedy says how, and then khod sees KHO without a restart."""
    host = Host(online("7.3.4"))
    assert host.guest.wait_online() == "running"
    host.shell(UNMOUNT)
    assert " debugfs " not in host.word("/proc/mounts")
    pid = host.shell(PID)
    refuses(host, "debugfs is not mounted", "mount -t debugfs debugfs /sys/kernel/debug")

    host.shell(MOUNT)
    host.khoctl("check")
    assert host.status()["generation"] == "stateless"
    assert host.shell(PID) == pid
