# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod starts before what it needs is there: beside the remount of the root file system, or after it where it must."""

import pytest

from tests.lab.conftest import Online
from tests.lab.host import Host, image
from tests.lab.store import check_arrived, fill, start_store

VERSION = "7.3.4"
MEBIBYTES = 1
REMOUNT = "systemd-remount-fs.service"
FSTAB = "/dev/vda / ext4 rw 0 1\n"
KILLER = """\
[Unit]
DefaultDependencies=no
After=kho-handover.socket
[Service]
Type=exec
ExecStart=/bin/sh -c 'until [ -e /run/khod/early-restore ]; do :; done;\
 kill -KILL $$(systemctl show -P MainPID kho-handover); touch /run/killed'
Slice=kho.slice
[Install]
WantedBy=multi-user.target
"""
"""In the wave that starts khod; it kills khod as soon as a producer is told."""


def ordering(host: Host) -> list[str]:
    """Give the units that khod is started after."""
    return host.shell("systemctl show -P After kho-handover").split()


def test_a_root_that_is_read_only_first(online: Online) -> None:
    host = Host(online(VERSION))
    assert REMOUNT not in ordering(host)
    start_store(host)
    digest = fill(host, MEBIBYTES)
    host.guest.put("/etc/fstab", FSTAB)
    host.shell("cd /etc/systemd/system-generators; rm systemd-fstab-generator khod-generator")  # the lab masks them

    assert host.guest.kexec(argv=("khoctl", "kexec", *image(VERSION), "--append", "ro")).how == "kexec"
    host.guest.wait_online()

    assert "ro" in host.word("/proc/cmdline").split()
    assert host.shell("findmnt -no OPTIONS /").startswith("rw")
    check_arrived(host, digest, MEBIBYTES)
    assert host.status()["phase"] == "verified"
    assert host.shell("cat /run/systemd/generator/kho-handover.service.d/*.conf").count(REMOUNT) == 1
    # Since then the root is writable: the next time that units are loaded, nothing orders khod after the remount.
    host.shell("systemctl daemon-reload")
    assert REMOUNT not in ordering(host)


@pytest.mark.proof
def test_khod_is_killed_as_soon_as_it_has_told_a_producer(online: Online) -> None:
    host = Host(online(VERSION))
    start_store(host)
    digest = fill(host, MEBIBYTES)
    host.guest.put("/etc/systemd/system/killer.service", KILLER)
    host.shell("systemctl daemon-reload; systemctl enable -q killer; sync")

    assert host.guest.kexec(argv=("khoctl", "kexec", "--now", *image(VERSION))).how == "kexec"
    host.guest.wait_online()

    host.shell("test -e /run/killed")
    check_arrived(host, digest, MEBIBYTES)
    checks = {check["name"]: check["result"] for check in host.status()["verdict"]["checks"]}
    assert checks["contents kv-store"] == "passed"
