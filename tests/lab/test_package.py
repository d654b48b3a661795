# SPDX-License-Identifier: LGPL-2.1-or-later
"""The package on a host that runs khod: an upgrade under a handover and without one, a downgrade, and the purge."""

import re
from pathlib import Path

import pytest

from tests.lab.conftest import REPOSITORY, Online
from tests.lab.errors import GuestRebooted
from tests.lab.host import Host, image
from tests.lab.process import call

NEWER = "0.2.0"
# What is left of a package that has been purged: files, users, units, AppArmor's profiles. The masks of generators
# are the lab's.
LEFT = r"""
find / -xdev \( -path /lab -o -path /tmp -o -path /var/log -o -path '*khod-lab*' \
        -o -path /etc/systemd/system-generators \) -prune -o \
    \( -name '*kho[-d.]*' -o -name kho \) -print
find /run \( -path /run/udev -o -path /run/systemd/units \) -prune -o -name '*kho*' -not -name '*khod-lab*' -print
getent passwd | grep ^kho || true
getent group | grep ^kho || true
systemctl list-units --plain --no-legend 'kho-*' 'khod*' | grep -v -e khod-lab -e kho-verify || true
grep kho /sys/kernel/security/apparmor/profiles || true
dpkg -l khod 2>/dev/null | grep khod || true
"""


def repack(package: Path, into: Path, version: str) -> Path:
    """Give the package as one of another version, with another text in its configuration."""
    tree = into / version
    call(["dpkg-deb", "--raw-extract", package, tree])
    for path, old, new in (
        ("DEBIAN/control", r"Version: .*", f"Version: {version}"),
        ("usr/lib/python3/dist-packages/khod/__init__.py", r'__version__ = ".*"', f'__version__ = "{version}"'),
        ("etc/kho/khod.toml", r"\A", f"# khod {version}\n"),
    ):
        file = tree / path
        file.write_text(re.sub(old, new, file.read_text(), count=1))
    deb = into / f"khod_{version}_all.deb"
    call(["dpkg-deb", "--root-owner-group", "--build", tree, deb])
    return deb


@pytest.fixture
def host(online: Online, packages: list[Path], tmp_path: Path) -> Host:
    """Give a host with a producer, its own line in the configuration, and a package of a newer version."""
    host = Host(online("7.3.4"))
    host.install_producer("holder", "state=4096")
    host.guest.put("/tmp/new.deb", repack(packages[0], tmp_path, NEWER).read_bytes())
    host.guest.put("/tmp/old.deb", packages[0].read_bytes())
    host.shell("systemctl start holder; echo '# ours' >> /etc/kho/khod.toml")
    return host


def khod_pid(host: Host) -> str:
    return host.shell("systemctl show --value --property=MainPID kho-handover").strip()


def dpkg(host: Host, *words: str, code: int = 0) -> str:
    ended = host.guest.run(["dpkg", "--force-confold", *words], check=False, env={"DEBIAN_FRONTEND": "noninteractive"})
    assert ended.rc == code, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def installed(host: Host) -> str:
    return host.shell("dpkg-query --show --showformat '${db:Status-Status} ${Version}' khod")


@pytest.mark.proof
def test_a_handover_is_not_cut_short(host: Host) -> None:
    host.khoctl("activate")
    running, phase, version = khod_pid(host), host.status()["phase"], installed(host)
    for words in (("--install", "/tmp/new.deb"), ("--remove", "khod")):
        said = dpkg(host, *words, code=1)
        assert "a handover is under way" in said
        assert "khoctl abort" in said
    assert (khod_pid(host), host.status()["phase"], installed(host)) == (running, phase, version)


@pytest.mark.proof
def test_the_package_from_its_upgrade_to_its_purge(host: Host) -> None:
    running, history = khod_pid(host), host.khoctl("history", "--json").stdout
    dpkg(host, "--install", "/tmp/new.deb")
    assert installed(host) == f"installed {NEWER}"
    assert khod_pid(host) not in ("0", running)
    assert NEWER in host.khoctl("--version").stdout
    assert host.guest.get("/etc/kho/khod.toml").endswith(b"# ours\n")
    assert host.khoctl("history", "--json").stdout == history
    host.shell("timeout 60 sh -c 'until khoctl producers | grep -q holder; do sleep 0.2; done'")

    # What is older goes on with what it knows, and refuses the rest before anything is changed.
    dpkg(host, "--install", "/tmp/old.deb")
    host.shell('sed -i \'s/^"version": 1,/"version": 2,/\' /var/lib/khod/handover.json')
    assert "A newer khod wrote it" in dpkg(host, "--install", "/tmp/old.deb", code=1)
    host.shell('sed -i \'s/^"version": 2,/"version": 1,/\' /var/lib/khod/handover.json')

    dpkg(host, "--remove", "khod")
    assert "handover.json" in host.shell("ls /var/lib/khod")
    dpkg(host, "--purge", "khod")
    left = host.shell(LEFT)
    assert left == "", left


@pytest.mark.proof
def test_autopkgtest_s_handover_on_a_kernel_that_can(online: Online) -> None:
    host = Host(online("7.3.4"))
    host.guest.put("/root/kexec", (REPOSITORY / "packaging/debian/tests/kexec").read_bytes(), mode=0o755)
    host.guest.put("/tmp/autopkgtest-reboot-prepare", "#!/bin/sh\n", mode=0o755)
    environment, before = {"KHOD_TEST_KERNEL": " ".join(image("7.3.4"))}, host.guest.boot_id
    with pytest.raises(GuestRebooted):
        host.guest.run(["/root/kexec"], env=environment)
    assert host.guest.wait_reboot(before).how == "kexec"
    said = host.guest.run(["/root/kexec"], env={**environment, "AUTOPKGTEST_REBOOT_MARK": "arrived"}).stdout
    assert "verified" in said.splitlines()[-1]
