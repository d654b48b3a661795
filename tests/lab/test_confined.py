# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod's unit confines it: what systemd 262 says of that, what the kernel enforces, and that nothing is lost by it."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab import kernels as lab_kernels
from tests.lab.conftest import usual
from tests.lab.guest import Guest
from tests.lab.host import Host, image

PRODUCERS = "/etc/kho/producers.d"
DROPIN = "/run/systemd/system/kho-handover.service.d/unconfined.conf"
UNCONFINED = """\
[Service]
ProtectSystem=no
ReadOnlyPaths=
ReadWritePaths=
ProtectHome=no
ProtectHostname=no
ProtectClock=no
ProtectControlGroups=no
PrivateMounts=no
PrivateDevices=no
BindPaths=
BindReadOnlyPaths=
DevicePolicy=auto
DeviceAllow=
CapabilityBoundingSet=~
NoNewPrivileges=no
RestrictNamespaces=no
MemoryDenyWriteExecute=no
SystemCallFilter=
SystemCallArchitectures=
RestrictAddressFamilies=
IPAddressDeny=
RestrictSUIDSGID=no
RestrictRealtime=no
LockPersonality=no
AppArmorProfile=
"""
CAPABILITIES = {"cap_dac_override": 1, "cap_sys_admin": 21, "cap_sys_boot": 22, "cap_syslog": 34}
EXPOSURE_TENTHS = {"kho-handover.service": 30, "kho-sessions.service": 15}
"""The highest exposure that `systemd-analyze security` may find, in tenths."""


@pytest.fixture(scope="module")
def host(lab_disk: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    console = tmp_path_factory.mktemp("confined") / "console.log"
    with usual(lab_kernels.find("7.3.4"), lab_disk, console) as guest:
        yield Host(guest)


def unit_states(host: Host, field: str) -> str:
    """Give a field of /proc/PID/status of khod's main process."""
    pid = host.shell("systemctl show -P MainPID kho-handover").strip()
    return host.shell(f"sed -n 's/^{field}:[[:space:]]*//p' /proc/{pid}/status").strip()


@pytest.mark.parametrize("unit", EXPOSURE_TENTHS)
def test_systemd_rates_it_as_little_exposed(host: Host, unit: str) -> None:
    assert host.shell("systemctl --version").startswith("systemd 262")
    host.shell(f"systemd-analyze security --no-pager --threshold={EXPOSURE_TENTHS[unit]} {unit}")


def test_the_kernel_enforces_it(host: Host) -> None:
    bounding = sum(1 << number for number in CAPABILITIES.values())
    assert int(unit_states(host, "CapBnd"), 16) == bounding
    assert (unit_states(host, "NoNewPrivs"), unit_states(host, "Seccomp")) == ("1", "2")
    pid = host.shell("systemctl show -P MainPID kho-handover").strip()
    inside = f"nsenter --mount --target={pid}"
    host.shell(f"{inside} sh -ec 'touch /run/khod/probe; rm /run/khod/probe'")
    for path in ("/etc/probe", "/usr/probe", "/root/probe", "/run/probe", "/sys/fs/cgroup/probe"):
        assert "Read-only" in host.guest.run([*inside.split(), "touch", path], check=False).stderr, path


def test_a_producer_s_device_is_known_by_its_link(host: Host) -> None:
    """The link is in /dev, which khod must see; its disk is pulled while the kernel is active."""
    host.guest.qmp("blockdev-add", driver="null-co", node_name="hot0", size=1 << 20, read_zeroes=True)
    host.guest.qmp("device_add", driver="virtio-blk-pci", id="disk0", drive="hot0", bus="hot")
    host.shell("echo 1 > /sys/bus/pci/rescan; mkdir -p /dev/disk/by-id; ln -s ../../vdb /dev/disk/by-id/the-disk")
    host.guest.put(f"{PRODUCERS}/vm.toml", 'devices = ["/dev/disk/by-id/the-disk"]\nfreeze = ["true"]\n')
    try:
        host.khoctl("activate")
        host.shell("echo 1 > $(readlink -f /sys/block/vdb/device/..)/remove")
        host.khoctl("abort")  # returns when whatever goes back is back
        assert "vdb (/dev/vdb) of producer vm was removed" in host.status()["last_error"]
    finally:
        host.shell(f"rm {PRODUCERS}/vm.toml")


def without_numbers(text: str) -> str:
    return re.sub(r"[0-9a-f]*\d[0-9a-f]*(\.\d+)?", "N", text)


def told(host: Host, version: str) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Give what the checks of this khod find, and what it tells of an activation and an abort."""
    checks = host.checks(*image(version))
    found = {name: (check["result"], without_numbers(check["evidence"])) for name, check in checks.items()}
    since = host.shell(
        "journalctl --sync; journalctl -u kho-handover -n 0 --show-cursor | sed -n 's/^-- cursor: //p'"
    ).strip()
    host.khoctl("activate")
    host.khoctl("abort")
    lines = host.shell(f"journalctl --sync; journalctl -u kho-handover -o cat --after-cursor='{since}'").splitlines()
    return found, [without_numbers(line) for line in lines]


@pytest.mark.parametrize(
    "kernel", ["6.18.15", *(pytest.param(kernel, marks=pytest.mark.proof) for kernel in ("v3", "7.3.4"))]
)
def test_nothing_is_lost_by_it(online: Callable[[str], Guest], kernel: str) -> None:
    """Each check, and each line of an activation, is the same in a guest without any confinement.

    It is another guest: after an abort some kernels are not as they were before.
    """
    version = "7.3.4" if kernel == "v3" else kernel
    found = []
    for confined in (True, False):
        host = Host(online(version))
        if not confined:
            host.guest.put(DROPIN, UNCONFINED)
            host.shell("systemctl daemon-reload; systemctl restart kho-handover")
        if kernel == "v3":
            host.with_module()
        host.settled()
        assert unit_states(host, "Seccomp") == ("2" if confined else "0")
        found.append(told(host, version))
    assert found[0] == found[1]
