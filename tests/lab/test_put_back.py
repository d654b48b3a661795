# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whatever goes wrong on a real kernel: inactive, nothing loaded, the right exit code, and a sentence that helps.

One guest serves all these cases: each must leave the host as it found it, and the next one would notice.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lab import kernels as lab_kernels
from tests.lab.conftest import usual
from tests.lab.host import IMAGES, INITRD, Host, image

PARAMETERS = "/sys/module/kho_v3/parameters"
PEER = """\
import signal, sys, systemd.daemon
from khod.producer import Producer, Veto

def note(step):
    print(f"peer {step.verb}", file=open("/run/told", "a"))

def refuse(step):
    note(step)
    raise Veto("the connection table is being rebuilt")

Producer("peer", prepare=note, freeze=refuse, thaw=note, cancel=note, after=["ticker"]).start()
systemd.daemon.notify("READY=1")
signal.pause()
"""
SLOW_TO_STOP = """\
[Service]
ExecStart=/bin/sleep infinity
ExecStop=/bin/sleep 300
TimeoutStopSec=300
"""


@pytest.fixture(scope="module")
def host(lab_disk: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Give one host with the v3 interface to the whole file."""
    console = tmp_path_factory.mktemp("put-back") / "console.log"
    with usual(lab_kernels.find("7.3.4"), lab_disk, console) as guest:
        yield Host(guest).with_module()


@pytest.fixture(autouse=True)
def back(host: Host) -> Iterator[None]:
    """Hold after each case that the kernel is inactive with nothing loaded."""
    yield
    host.untouched()


@contextmanager
def parameter(host: Host, name: str, value: str, usual: str) -> Iterator[None]:
    """Set a parameter of the module, and set it back."""
    host.shell(f"echo {value} > {PARAMETERS}/{name}")
    try:
        yield
    finally:
        host.shell(f"echo {usual} > {PARAMETERS}/{name}")


def idle(host: Host) -> None:
    assert host.status()["phase"] == "idle"


def test_a_veto_of_a_producer_in_the_kernel(host: Host) -> None:
    with parameter(host, "veto", "1", "0"):
        failed = host.khoctl("activate", code=1)
    assert "EINVAL" in failed.stderr
    assert "kho failed to serialize state" in failed.stderr
    idle(host)


def test_a_veto_of_a_hook(host: Host) -> None:
    """The hook that prepared before the veto is told that it is off."""
    host.guest.put("/etc/kho/producers.d/first.toml", 'prepare = ["true"]\ncancel = ["touch", "/run/cancelled"]\n')
    host.guest.put(
        "/etc/kho/producers.d/second.toml",
        'prepare = ["sh", "-c", "echo the pool is degraded >&2; exit 1"]\nafter = ["first"]\n',
    )
    try:
        refused = host.khoctl("kexec", *image("7.3.4"), code=3)
    finally:
        host.shell("rm /etc/kho/producers.d/*.toml")
    assert "second" in refused.stderr
    assert "the pool is degraded" in refused.stderr
    assert host.shell("ls /run/cancelled") != ""
    idle(host)


def test_dt_max_too_small(host: Host) -> None:
    host.shell("echo 0x100 > /sys/kernel/kho/dt_max")
    try:
        failed = host.khoctl("activate", code=1)
    finally:
        host.shell("echo 0xa00000 > /sys/kernel/kho/dt_max")
    assert "dt_max" in failed.stderr
    assert "kho failed to serialize state: -3" in host.dmesg()
    # Two failed activations in this boot may have leaked memory: said, and bounded.
    assert "activations failed" in host.khoctl("check").stdout


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (f"head -c 1000000 {IMAGES}/7.3.4/bzImage > /tmp/image", "truncated"),
        (": > /tmp/image", "empty"),
        ("head -c 100000 /dev/urandom > /tmp/image", "not a kernel"),
    ],
)
def test_an_image_the_kernel_would_not_take(host: Host, make: str, says: str) -> None:
    host.shell(make)
    refused = host.khoctl("kexec", "--image", "/tmp/image", "--initrd", INITRD, code=3)
    assert says in refused.stderr
    assert "/tmp/image" in refused.stderr
    idle(host)


@pytest.mark.proof
def test_an_initrd_too_large_for_scratch_is_refused_before_anyone_is_told(host: Host) -> None:
    """The initrd alone is larger than any scratch region; with the check off only the kernel itself finds out."""
    host.archive("/tmp/large", max(region.size for region in host.scratch()) + (1 << 20))
    host.guest.put("/etc/kho/producers.d/noted.toml", 'prepare = ["touch", "/run/prepared"]\n')
    command = ("kexec", "--image", f"{IMAGES}/7.3.4/bzImage", "--initrd", "/tmp/large")
    try:
        refused = host.khoctl(*command, code=3)
        assert host.shell("ls /run/prepared", check=False) == ""
        host.guest.put("/etc/kho/khod.toml.d/fit.toml", '[checks]\nfit = "off"\n')
        host.guest.run(["systemctl", "reload", "kho-handover"])
        failed = host.khoctl(*command, code=1)
    finally:
        host.shell("rm /tmp/large /etc/kho/producers.d/*.toml; rm -f /etc/kho/khod.toml.d/fit.toml")
        host.guest.run(["systemctl", "reload", "kho-handover"])
    assert "check fit" in refused.stderr
    assert "EADDRNOTAVAIL" in failed.stderr
    assert "scratch" in failed.stderr
    idle(host)


def test_abort_with_an_image_loaded_unloads_it(host: Host) -> None:
    host.khoctl("kexec", *image("7.3.4"), "--load-only")
    assert host.word("/sys/kernel/kexec_loaded") == "1"
    assert host.word("/sys/kernel/kho/active") == "1"
    host.khoctl("abort")


def test_stopping_the_service_while_active_rolls_back(host: Host) -> None:
    host.khoctl("activate")
    host.guest.run(["systemctl", "stop", "kho-handover"])
    host.untouched()
    host.guest.run(["systemctl", "start", "kho-handover"])
    idle(host)


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("activate",), marks=pytest.mark.proof),
        ("kexec", *image("7.3.4"), "--load-only"),
    ],
    ids=["active", "loaded"],
)
def test_khod_killed_and_started_again_rolls_back(host: Host, words: tuple[str, ...]) -> None:
    host.khoctl(*words)
    host.guest.run(["systemctl", "kill", "--signal=SIGKILL", "kho-handover"])
    assert (
        "khod stopped unexpectedly" in host.settled()["last_error"]
    )  # the socket waits for the khod that systemd starts again


def test_an_activation_by_hand_is_foreign_and_left_alone(host: Host) -> None:
    host.shell("echo 1 > /sys/kernel/kho/active")
    assert host.status(3)["phase"] == "foreign"
    refused = host.khoctl("kexec", *image("7.3.4"), code=3)
    assert "--force" in refused.stderr
    host.khoctl("abort", code=3)
    assert host.word("/sys/kernel/kho/active") == "1"
    host.khoctl("abort", "--force")
    idle(host)


def test_status_answers_while_the_kernel_serializes(host: Host) -> None:
    """The write blocks uninterruptibly under the kernel's mutex; a read of `active` would block with it."""
    with parameter(host, "slow_ms", "15000", "0"):
        activating = host.guest.start(["khoctl", "activate"])
        host.shell("until grep -q activating /var/lib/khod/handover.json; do :; done")
        status = host.status()
        assert status["phase"] == "activating"
        assert status["stale"]
        assert activating.wait().rc == 0
    host.khoctl("abort")


def test_a_full_disk_stops_it_before_the_kernel_is_touched(host: Host) -> None:
    host.shell(
        "systemctl stop kho-handover; mount -t tmpfs -o size=1M tmpfs /var/lib/khod;"
        "dd if=/dev/zero of=/var/lib/khod/full bs=64k 2>/dev/null || true; systemctl start kho-handover"
    )
    try:
        refused = host.khoctl("activate", code=3)
    finally:
        host.shell("systemctl stop kho-handover; umount /var/lib/khod; systemctl start kho-handover")
    assert "/var/lib/khod" in refused.stderr
    assert "Free some space" in refused.stderr


def test_an_unprivileged_user_may_look_and_no_more(host: Host) -> None:
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    assert host.guest.run([*nobody, "khoctl", "status"]).rc == 0
    refused = host.guest.run([*nobody, "khoctl", "activate"], check=False)
    assert refused.rc == 3
    assert "65534" in refused.stderr


def test_a_veto_in_the_middle_of_three_kinds_and_ranks(host: Host) -> None:
    """A unit, then a Varlink peer that refuses to freeze, then a hook."""
    verbs = ("prepare", "freeze", "thaw", "cancel")
    lines = [f'{verb} = ["sh", "-c", "echo hook {verb} >> /run/told"]' for verb in verbs]
    host.guest.put("/etc/kho/producers.d/hook.toml", "\n".join([*lines, 'after = ["peer"]\n']))
    host.guest.put("/etc/kho/producers.d/ticker.toml", 'unit = "ticker.service"\n')
    host.guest.put("/run/peer.py", PEER)
    host.shell(
        "systemd-run -q --unit=ticker sleep infinity;"
        "systemd-run -q --unit=peer --service-type=notify python3 /run/peer.py"
    )
    try:
        listed = host.khoctl("producers").stdout
        refused = host.khoctl("kexec", *image("7.3.4"), code=3)
        state = host.shell("systemctl show -P FreezerState ticker").strip()
    finally:
        host.shell("rm /etc/kho/producers.d/*.toml; systemctl stop ticker peer")
    assert [line.split()[:3] for line in listed.splitlines()[1:]] == [
        ["0", "ticker", "unit"],
        ["1", "peer", "varlink"],
        ["2", "hook", "hook"],
    ]
    said = [line.split("  ")[-1] for line in refused.stderr.splitlines()]
    undone = ["peer: thawed", "ticker: thawed", "hook: cancelled", "peer: cancelled", "ticker: cancelled"]
    assert [line for line in said if line.endswith((": thawed", ": cancelled"))] == undone
    assert host.word("/run/told").splitlines() == [
        "peer prepare",
        "hook prepare",
        "peer freeze",
        "peer thaw",
        "hook cancel",
        "peer cancel",
    ]
    assert state == "running"
    (reason,) = [line for line in refused.stderr.splitlines() if line.startswith("khoctl:")]
    assert "Producer peer refuses to freeze: the connection table is being rebuilt" in reason
    idle(host)


def test_a_disk_that_is_plugged_in_while_active_ends_the_handover(host: Host) -> None:
    """This kernel has no driver for hotplug ports, so it looks for the new card when it is told to."""
    host.khoctl("activate")
    host.guest.qmp("blockdev-add", driver="null-co", node_name="hot0", size=1 << 20, read_zeroes=True)
    host.guest.qmp("device_add", driver="virtio-blk-pci", id="disk0", drive="hot0", bus="hot")
    assert host.status()["phase"] == "active"
    host.shell("echo 1 > /sys/bus/pci/rescan")
    host.khoctl("abort")  # returns when whatever goes back is back; were it the one to end it, it would say so
    status = host.status()
    assert status["phase"] == "idle"
    assert "pci device" in status["last_error"]
    assert "was added" in status["last_error"]
    assert "hardware changed" in host.khoctl("status").stdout


def test_a_load_attempted_while_kexec_load_is_disabled(host: Host) -> None:
    """The sysctl stays set until a reboot, so this and what reboots come last: what the boot came to stays, too."""
    host.shell("echo 1 > /proc/sys/kernel/kexec_load_disabled")
    refused = host.khoctl("kexec", *image("7.3.4"), code=3)
    assert "kexec_load_disabled" in refused.stderr
    idle(host)


def test_a_rollback_at_shutdown_finds_the_services_of_the_host(host: Host) -> None:
    ask = "systemctl is-active needed.service dbus.service > /var/thawed; sync"
    host.guest.put("/etc/kho/producers.d/hook.toml", f"thaw = ['/bin/sh', '-c', '{ask}']\n")
    host.guest.put("/etc/systemd/system/needed.service", "[Service]\nExecStart=/usr/bin/sleep infinity\n")
    host.guest.put("/etc/systemd/system/kho-hooks.service.d/needed.conf", "[Unit]\nAfter=needed.service\n")
    host.shell("systemctl daemon-reload; systemctl start needed; sync")
    before = host.guest.boot_id
    host.khoctl("activate")

    host.guest.start(["systemctl", "reboot"])

    assert host.guest.wait_reboot(before).how == "reset"
    host.guest.wait_online()
    assert host.shell("cat /var/thawed").split() == ["active"] * 2
    host.shell("rm /etc/kho/producers.d/hook.toml; sync")


@pytest.mark.proof
def test_a_reset_instead_of_the_jump_is_a_cold_boot(host: Host) -> None:
    host.guest.reset()
    host.guest.wait_online()
    idle(host)
    host.guest.put("/run/systemd/system/slow.service", SLOW_TO_STOP)
    host.shell("systemctl daemon-reload; systemctl start slow")
    host.leave_stop_to_systemd()
    host.khoctl("kexec", *image("7.3.4"))
    record = json.loads(host.guest.get("/var/lib/khod/handover.json"))  # the orderly shutdown waits for slow.service
    assert record["phase"] == "executing"

    host.guest.reset()

    status = host.settled(code=7)
    assert status["phase"] == "cold_boot"
    assert "booted cold" in status["last_error"]
