# SPDX-License-Identifier: LGPL-2.1-or-later
"""Do kernel and initrd fit into scratch? The prediction held against the kernel's own answer, to the page.

One guest serves all cases: each leaves nothing loaded. Its scratch is set, so that the edge is the same everywhere: the
kernel does not fit into the first region, the initrd goes below the kernel in the second, and the third is smaller.
"""

import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from khod.images import sealed
from khod.images.kernel import KernelImageInfo, unpack_image
from khod.model import Generation
from khod.region import Region
from khod.target.placement import NoRoom, Placed, list_segments, place_segments
from tests.lab import kernels as lab_kernels
from tests.lab.guest import Guest
from tests.lab.host import IMAGES, KHO, Host

VERSION = "7.3.4"
IMAGE = f"{IMAGES}/{VERSION}/bzImage"
LINE = "console=ttyS0 root=/dev/vda rw"
PAGE, MIB = 1 << 12, 1 << 20
HOOK = "".join(
    f'{verb} = ["sh", "-c", "echo {verb} >> /run/told"]\n' for verb in ("prepare", "freeze", "thaw", "cancel")
)


@pytest.fixture(scope="module")
def host(lab_disk: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Boot one host for the whole file."""
    console = tmp_path_factory.mktemp("fit") / "console.log"
    sizes = "16M,96M,64M"
    kernel, extra = lab_kernels.find(VERSION), f"{KHO} kho_scratch={sizes} kho_bootmem={sizes}"  # a kernel knows one
    with Guest(kernel, lab_disk, cmdline_extra=extra, console_log=console) as guest:
        guest.wait_online()
        yield Host(guest)


@pytest.fixture(scope="module")
def scratch(host: Host) -> list[Region]:
    """Give the guest's scratch, in the kernel's order."""
    return host.scratch()


@pytest.fixture(scope="module")
def kernel() -> KernelImageInfo:
    """Give what the lab's bzImage says of itself."""
    path = lab_kernels.find(VERSION).bzimage
    with path.open("rb") as file:
        image = sealed.seal_file(file.fileno(), "image", str(path), 1 << 30)
    with closing(unpack_image(image, "x86_64", 1 << 30)) as bundle:
        return bundle.about


def predicted(kernel: KernelImageInfo, initrd: int, scratch: list[Region]) -> list[Placed] | NoRoom:
    """Say where the segments will go, from outside."""
    wanted = list_segments(kernel, initrd, len(LINE) + 1, Generation.stateless, len(scratch))
    assert wanted is not None
    return place_segments(wanted, scratch, PAGE)


def tried(host: Host, initrd: int) -> list[int] | None:
    """Load an initrd of so many zeros with kexec-tools: the addresses the kernel logs, None for EADDRNOTAVAIL."""
    load = f"kexec -d -s -l {IMAGE} --initrd=/var/tmp/zeros --command-line='{LINE}' 2>&1"
    said = host.shell(
        f"rm -f /var/tmp/zeros; truncate -s {initrd} /var/tmp/zeros; dmesg -C; {load} || true; dmesg; kexec -s -u"
    )
    addresses = [int(at, 16) for at in re.findall(r"segment\[\d+\].* mem=(0x[0-9a-f]+)", said)]
    assert bool(addresses) is not ("Cannot assign requested address" in said), said
    return addresses or None


def edge(kernel: KernelImageInfo, scratch: list[Region]) -> int:
    """Give the bytes of the largest initrd that fits, by the prediction."""
    found = predicted(kernel, 1 << 32, scratch)
    assert isinstance(found, NoRoom)
    assert found.segment.name == "initrd"
    return found.hole


def test_the_kernel_says_the_same_to_the_page(host: Host, scratch: list[Region], kernel: KernelImageInfo) -> None:
    largest = edge(kernel, scratch)
    for initrd in (MIB, 15 * MIB, 16 * MIB, largest - MIB, largest - PAGE + 1, largest):
        found, real = predicted(kernel, initrd, scratch), tried(host, initrd)
        assert isinstance(found, list)
        assert real is not None, initrd
        differences = {one.segment.name: at - one.at for one, at in zip(found, real, strict=True)}
        # What cannot be seen from outside is counted with a page to spare.
        spare = [differences.pop(name) for name in ("purgatory", "boot parameters")]
        assert all(0 <= difference <= PAGE for difference in spare)
        assert set(differences.values()) == {0}, initrd
    for initrd in (largest + 1, largest + PAGE, largest + MIB):
        assert isinstance(predicted(kernel, initrd, scratch), NoRoom)
        assert tried(host, initrd) is None, initrd


@pytest.mark.proof
def test_one_mib_too_much_is_refused_before_anyone_is_told(
    host: Host, scratch: list[Region], kernel: KernelImageInfo
) -> None:
    host.guest.put("/etc/kho/producers.d/noted.toml", HOOK)
    host.archive("/var/tmp/large", edge(kernel, scratch) + MIB)
    try:
        refused = host.khoctl("kexec", "--image", IMAGE, "--initrd", "/var/tmp/large", code=3)
        checked = host.checks("--image", IMAGE, "--initrd", "/var/tmp/large", code=3)
    finally:
        host.shell("rm /var/tmp/large /etc/kho/producers.d/noted.toml")
    assert "check fit" in refused.stderr
    assert [name for name, one in checked.items() if one["result"] == "fail"] == ["fit"]
    assert host.shell("cat /run/told", check=False) == ""
    assert host.status()["phase"] == "idle"
    assert host.word("/sys/kernel/kexec/loaded") == "0"


@pytest.mark.proof
def test_one_mib_less_than_the_most_is_loaded(host: Host, scratch: list[Region], kernel: KernelImageInfo) -> None:
    host.archive("/var/tmp/large", edge(kernel, scratch) - MIB)
    host.khoctl("kexec", "--image", IMAGE, "--initrd", "/var/tmp/large", "--load-only")
    assert host.word("/sys/kernel/kexec/loaded") == "1"
    host.khoctl("abort")
    assert host.word("/sys/kernel/kexec/loaded") == "0"
    assert host.status()["phase"] == "idle"
