# SPDX-License-Identifier: LGPL-2.1-or-later
"""A next kernel that fails: the host comes up cold, khod says why, and refuses that image the next time.

Each guest keeps its journal on the disk, and has ramoops in a piece of memory that no kernel uses.
"""

import json
import shlex
from typing import Any

import pytest

from khod.engine.journal_fields import Message
from khod.model import Phase
from khod.simulated.kernel import build_initrd
from tests.lab.conftest import Boot
from tests.lab.host import KHO, Host, image
from tests.lab.kernels import NEXT_LUO
from tests.unit.khods import until

RAMOOPS = (
    "memmap=2M$0x50000000 ramoops.mem_address=0x50000000 ramoops.mem_size=0x200000 "
    "ramoops.record_size=0x20000 ramoops.console_size=0x40000"
)
BROKEN = "/lab/broken.img"
"""An initrd whose init is an empty file: no kernel finds anything to start."""
WATCHDOG = ("-device", "i6300esb", "-action", "watchdog=reset")
KEPT = "watchdog.stop_on_reboot=0"
SECONDS = 20
STATE = "/sys/class/watchdog/watchdog0/state"
BOOT_SECONDS = 180.0
EXPLAINED = """\
#!/bin/sh
khoctl status --json | grep -q '"journal_end": "[^"]'
"""


def booted(boot: Boot, *qemu: str, cmdline: str = "") -> Host:
    """Boot a host that remembers how it died."""
    line = f"{KHO} {RAMOOPS} {cmdline}"
    host = Host(boot("7.3.4", cmdline_extra=line, panic_is_loss=False, qemu_extra=qemu))
    host.guest.wait_online()
    host.guest.put("/etc/systemd/journald.conf.d/zz-kept.conf", "[Journal]\nStorage=persistent\n")
    host.shell(
        "systemctl unmask -q systemd-journal-flush.service; systemctl restart systemd-journald;journalctl --flush; sync"
    )
    host.guest.put(BROKEN, build_initrd())
    return host


def come_up_cold(host: Host, before: str, phase: Phase = Phase.executing) -> dict[str, Any]:
    """Wait for the next boot, hold that it is a cold one, and give the status with its explanation."""
    assert host.guest.wait_reboot(before, BOOT_SECONDS).how == "reset"
    host.guest.wait_online()
    host.guest.put("/run/explained", EXPLAINED, mode=0o755)
    host.shell("timeout 60 sh -c 'until /run/explained; do sleep 0.2; done'")
    status = host.status(code=7)
    assert status["phase"] == "cold_boot", status
    assert status["cold_boot"]["last_phase"] == phase.value
    page = host.khoctl("status", code=7).stdout
    assert status["cold_boot"]["reason"] in " ".join(page.split())
    return status


def is_remembered(host: Host, reason: str) -> bool:
    """Whether the history has this reason of an attempt; the record has it before."""
    return any(reason in each["reason"] for each in json.loads(host.khoctl("history", "--json").stdout)["attempts"])


def hold_refused(host: Host, status: dict[str, Any], *words: str) -> None:
    """Hold that the image is refused from now on, with the reason, until an acknowledgement; the journal says it."""
    said = f"journalctl -b -o cat MESSAGE_ID={Message.image_barred.identifier} | grep -q 'is refused from now on'"
    host.shell(f"timeout 60 sh -c {shlex.quote(f'until {said}; do sleep 0.2; done')}")
    until(lambda: is_remembered(host, status["cold_boot"]["reason"]), None, seconds=60)
    refused = host.khoctl("kexec", *words, code=3).stderr
    assert "check trial" in refused
    assert status["cold_boot"]["reason"] in refused
    assert status["run"] in refused
    host.khoctl("history", "ack", status["run"])
    assert host.checks(*words)["trial"]["result"] == "passed"


@pytest.mark.proof
def test_a_reset_in_the_middle_of_the_jump(boot: Boot) -> None:
    host = booted(boot)
    before = host.guest.boot_id
    host.guest.start(["khoctl", "kexec", *image("7.3.4"), "--now"])
    host.guest.wait_console("Starting new kernel", BOOT_SECONDS)
    host.guest.qmp("system_reset")

    status = come_up_cold(host, before)

    found = status["cold_boot"]
    assert "reset in the jump" in found["reason"], found
    # Not that line itself: the console has it before pstore, and the reset may come in between.
    assert found["last_words"], found
    assert "cut off" in found["journal_end"], found
    assert "bzImage (7.3.4" in status["image"], status["image"]
    hold_refused(host, status, *image("7.3.4"))


def test_a_next_kernel_that_panics(boot: Boot) -> None:
    host = booted(boot)
    host.leave_stop_to_systemd()
    before = host.guest.boot_id
    broken = ("--image", "/lab/kernels/7.3.4/bzImage", "--initrd", BROKEN)
    host.khoctl("kexec", *broken)

    status = come_up_cold(host, before)

    found = status["cold_boot"]
    assert "the next kernel (7.3.4-kho) panicked: No working init found" in found["reason"], found
    assert "Kernel panic - not syncing" in found["last_words"][0], found
    assert "in order, into kexec.target" in found["journal_end"], found
    hold_refused(host, status, *broken)
    other = host.checks(*image("7.3.4"))["trial"]
    assert other["result"] == "passed", "the same kernel with another initrd"


@pytest.mark.proof
def test_a_next_kernel_of_another_format_that_panics(boot: Boot) -> None:
    """It has no pstore: the journal alone tells that the shutdown was in order."""
    host = booted(boot)
    host.configure("formats", '[checks]\nformats = "off"\n')
    host.leave_stop_to_systemd()
    before = host.guest.boot_id
    host.khoctl("kexec", *image(NEXT_LUO))

    status = come_up_cold(host, before)

    found = status["cold_boot"]
    assert "into kexec.target" in found["journal_end"], found
    assert "did not come up in the next kernel" in found["reason"] or "reset in the jump" in found["reason"], found
    assert NEXT_LUO in status["image"]
    hold_refused(host, status, *image(NEXT_LUO))


def watched(boot: Boot) -> Host:
    """Boot a host whose jumps are watched."""
    host = booted(boot, *WATCHDOG, cmdline=KEPT)
    host.configure("watchdog", f'[watchdog]\ndevice = "/dev/watchdog0"\nseconds = {SECONDS}\n')
    found = host.checks()["watchdog"]
    assert "less than deadlines.restore" in found["evidence"], found
    host.configure("deadlines", "[deadlines]\nrestore = 15.0\n")
    found = host.checks()["watchdog"]
    assert found["result"] == "passed", found
    return host


def test_a_next_kernel_that_hangs(boot: Boot) -> None:
    """It panics and stays there, as its command line has no panic=, and it has no driver of the watchdog."""
    host = watched(boot)
    host.configure("formats", '[checks]\nformats = "off"\n')
    before = host.guest.boot_id
    hanging = (*image(NEXT_LUO), "--remove", "panic")
    host.khoctl("kexec", *hanging)

    status = come_up_cold(host, before)

    found = status["cold_boot"]
    assert found["watchdog"] is True, found
    assert "a watchdog reset the host" in found["reason"], found
    hold_refused(host, status, *hanging)


@pytest.mark.proof
def test_a_watchdog_is_armed_only_while_the_host_jumps(boot: Boot) -> None:
    """Immediate: armed at once, disarmed by the undo and by the next khod, which outlives its seconds."""
    host = watched(boot)
    assert host.word(STATE) == "inactive"
    look = f"cat {STATE} > /run/seen; exit 1"
    host.guest.put("/etc/kho/producers.d/no.toml", f'prepare = ["sh", "-c", "{look}"]\n')
    host.khoctl("kexec", *image("7.3.4"), "--now", code=3)
    assert host.word("/run/seen") == "active"
    assert host.word(STATE) == "inactive"
    host.shell("rm /etc/kho/producers.d/no.toml")
    for words in (("--now",), ()):
        before = host.guest.boot_id
        host.guest.start(["khoctl", "kexec", *image("7.3.4"), *words])
        assert host.guest.wait_reboot(before, BOOT_SECONDS).how == "kexec"
        assert host.settled()["phase"] == "verified"
        said = "journalctl -b -u kho-handover -o cat | grep -q 'does not watch over a jump any more'"
        host.shell(f"timeout 60 sh -c {shlex.quote(f'until {said}; do sleep 0.2; done')}")
        assert host.word(STATE) == "inactive"


@pytest.mark.proof
def test_a_next_kernel_that_dies_while_it_is_verified(boot: Boot) -> None:
    host = booted(boot)
    host.guest.put("/etc/kho/producers.d/slow.toml", 'timeout = 300\nrestore = ["sleep", "240"]\n')
    before = host.guest.boot_id
    host.guest.start(["khoctl", "kexec", *image("7.3.4")])
    reached = host.guest.wait_reboot(before, BOOT_SECONDS).boot_id
    host.shell("timeout 60 sh -c 'until khoctl status --json | grep -q verifying; do sleep 0.2; done'; sync")
    host.guest.qmp("system_reset")

    status = come_up_cold(host, reached, Phase.verifying)

    found = status["cold_boot"]
    assert found["boot_id"] == reached
    assert "ended without a shutdown while the handover was verified" in found["reason"], found
    assert "cut off" in found["journal_end"], found
    hold_refused(host, status, *image("7.3.4"))
