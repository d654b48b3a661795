# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where the next kernel comes from: an installed version, a unified kernel image, an entry of either type."""

import json
import random
import re
import sys
from pathlib import Path

import pytest

from tests.lab import disk, packages
from tests.lab.conftest import Find, Online
from tests.lab.guest import compose_cmdline
from tests.lab.host import IMAGES, KHO, TRACE, Host
from tests.lab.process import call

PAGE = 4096
OWN = compose_cmdline("tcg", f"{KHO} {TRACE}")
ENTRY = """\
title    The lab's next kernel
version  7.3.4
linux    /next/linux
initrd   /next/first.img
initrd   /next/second.img
options  {first}
options  {second}
"""
RELEASE = "7.3.4-kho"


def initrd(seed: int, size: int) -> bytes:
    """Make an archive of a size that compression cannot change."""
    return disk.initrd({f"part-{seed}": random.Random(seed).randbytes(size)})


def freed(*initrds: bytes) -> str:
    """The kernel's line when it lets go of its initrd, in whole pages; khod pads each part to four bytes."""
    total = sum(len(one) + -len(one) % 4 for one in initrds)
    return f"Freeing initrd memory: {-(-total // PAGE) * PAGE // 1024}K"


def arrived(host: Host, before: str, *initrds: bytes) -> str:
    """Hold that the jump came by kexec with this initrd and all state; give the new kernel's own command line."""
    hello = host.guest.wait_reboot(before)
    assert hello.how == "kexec"
    log = host.dmesg()
    assert freed(*initrds) in log
    assert "unpacking failed" not in log
    host.khoctl("verify")
    assert host.status()["phase"] == "verified"
    assert "Revived memory reservation 'trace' from KHO" in log  # kho_test speaks after every other jump only
    return re.sub(r" khod\.run=\S+$", "", hello.cmdline)


def touched(host: Host) -> list[str]:
    """What a dry run must leave alone: the record, what is loaded, and what the kernel would hand over."""
    return [
        host.shell("sha256sum /var/lib/khod/*.json 2>/dev/null || true"),
        host.word("/sys/kernel/kexec_loaded"),
        host.shell("cd /sys/kernel/debug/kho/out; sha256sum fdt sub_fdts/*"),
        host.shell("test ! -e /run/told || cat /run/told"),
    ]


@pytest.mark.proof
def test_an_installed_kernel_a_unified_image_and_entries_of_both_types(
    online: Online, kernels: Find, tmp_path: Path
) -> None:
    host = Host(online("7.3.4"))
    installed(host)

    single = initrd(1, 1 << 20)
    uki(host, kernels("7.3.4").bzimage, single, tmp_path)
    before = host.guest.boot_id
    host.khoctl("kexec", "--image", "/lab/next.efi")
    assert arrived(host, before, single) == f"{OWN} lab.uki=1"

    first, second = initrd(2, 900_001), initrd(3, 1_500_003)
    entry(host, first, second)
    before = host.guest.boot_id
    host.khoctl("kexec", "--entry", "next")
    assert arrived(host, before, first, second) == f"{OWN} lab.entry=1"

    host.shell("mkdir -p /efi/EFI/Linux; cp /lab/next.efi /efi/EFI/Linux/unified.efi")
    before = host.guest.boot_id
    host.khoctl("kexec", "--entry", "unified", "--append", "lab.type2=1")
    assert arrived(host, before, single) == f"{OWN} lab.uki=1 lab.type2=1"


def installed(host: Host) -> None:
    """--kernel VERSION: planned, which touches nothing, then loaded."""
    host.shell(
        f"mkdir -p /boot; cp {IMAGES}/7.3.4/bzImage /boot/vmlinuz-{RELEASE};cp {disk.INITRD} /boot/initrd.img-{RELEASE}"
    )
    host.guest.put("/etc/kho/producers.d/told.toml", 'prepare = ["sh", "-c", "echo prepare >> /run/told"]\n')
    before = touched(host)
    plan = host.khoctl("plan", "--kernel", RELEASE).stdout
    planned = json.loads(host.khoctl("plan", "--kernel", RELEASE, "--json").stdout)
    assert touched(host) == before
    assert [step["step"] for step in planned["steps"]] == ["prepare", "load", "freeze", "activate", "execute", "verify"]
    assert f"/boot/vmlinuz-{RELEASE}" in plan
    assert "told" in plan
    host.khoctl("kexec", "--kernel", RELEASE, "--load-only")
    assert host.word("/sys/kernel/kexec_loaded") == "1"
    host.khoctl("abort")
    assert host.word("/sys/kernel/kexec_loaded") == "0"
    missing = host.khoctl("plan", "--kernel", "9.9.9", code=2)
    assert RELEASE in missing.stderr
    host.shell("rm /etc/kho/producers.d/told.toml")


def uki(host: Host, bzimage: Path, archive: bytes, place: Path) -> None:
    """Have Debian's ukify make a unified kernel image, and put it into the guest."""
    script, stub = packages.ukify()
    (place / "initrd").write_bytes(archive)
    (place / "os-release").write_text('ID=lab\nVERSION_ID=1\nPRETTY_NAME="The lab"\n')
    made = place / "next.efi"
    parts = [f"--linux={bzimage}", f"--initrd={place}/initrd", f"--cmdline={OWN} lab.uki=1", f"--uname={RELEASE}"]
    parts += [f"--os-release=@{place}/os-release", f"--stub={stub}", "--efi-arch=x64", f"--output={made}"]
    call([sys.executable, script, "build", *parts])
    host.guest.put("/lab/next.efi", made.read_bytes())


def entry(host: Host, first: bytes, second: bytes) -> None:
    """Write a boot loader entry of type 1 below /boot, with what it names."""
    host.shell(f"mkdir -p /boot/next; cp {IMAGES}/7.3.4/bzImage /boot/next/linux")
    host.guest.put("/boot/next/first.img", first)
    host.guest.put("/boot/next/second.img", second)
    host.guest.put("/boot/loader/entries/next.conf", ENTRY.format(first=OWN, second="lab.entry=1"))
