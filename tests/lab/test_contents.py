# SPDX-License-Identifier: LGPL-2.1-or-later
"""The contents of preserved files over a real kexec: equal where nothing happened, and one flipped bit is found."""

import json
import mmap
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.budget import PROOF
from tests.lab.conftest import Boot
from tests.lab.holder import file_content
from tests.lab.host import IMAGES, INITRD, KHO, TRACE, Host

VERSION = "7.3.4"
MEMORY_MIB = 1536
PAGE = 4096
PAGES = 32  # of the small file: fewer than 1 MiB, so khod compares all of them
LARGE_MIB = 64
FLIPPED = 17  # the page of the small file in which a bit is flipped


@pytest.fixture
def ram() -> Iterator[Path]:
    """A file that is the guest's memory."""
    with TemporaryDirectory(prefix="khod-lab-", dir="/dev/shm") as directory:
        yield Path(directory) / "ram"


def flip_bit(ram: Path) -> int:
    """Flip one bit of the small file's page FLIPPED wherever it lies in pages of memory; return how often that is."""
    content = file_content("small", PAGES * PAGE)[FLIPPED * PAGE : (FLIPPED + 1) * PAGE]
    flipped = 0
    with ram.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        at = memory.find(content)
        while at >= 0:
            if at % PAGE == 0:
                memory[at] ^= 1
                flipped += 1
            at = memory.find(content, at + 1)
    return flipped


def verified(host: Host, code: int) -> dict[str, Any]:
    """The verdict of this boot; its checks by name."""
    found: dict[str, Any] = json.loads(host.khoctl("verify", "--json", code=code).stdout)["verdict"]
    return found | {"checks": {check["name"]: check for check in found["checks"]}}


def arrive_unchanged(host: Host) -> None:
    host.kexec(VERSION)
    checks = verified(host, 0)["checks"]
    assert {name: check["result"] for name, check in checks.items() if check["result"] != "passed"} == {}
    assert {"kho", "kernel", "tree", "memblock", "kexec-metadata", "log", "luo"} <= checks.keys()
    said = f"small: {PAGES} of {PAGES} pages compared; large: 64 of {LARGE_MIB * 256} pages compared"
    assert checks["contents holder"]["evidence"] == said
    assert "the same build" in checks["kernel"]["evidence"]


@pytest.mark.parametrize("_number", [0, *(pytest.param(number, marks=pytest.mark.proof) for number in range(1, 10))])
def test_a_flipped_bit_is_found_and_named(boot: Boot, ram: Path, _number: int) -> None:
    """In `make proof` first a handover in which nothing happens to the memory: every check passes on this kernel."""
    backend = f"memory-backend-file,id=ram,size={MEMORY_MIB}M,mem-path={ram},share=on"
    extra = ("-object", backend, "-machine", "memory-backend=ram")
    guest = boot(VERSION, cmdline_extra=f"{KHO} {TRACE}", memory_mib=MEMORY_MIB, qemu_extra=extra)
    host = Host(guest)
    guest.wait_online()
    host.install_producer("holder", f"small={PAGES * PAGE}", f"large={LARGE_MIB << 20}")
    host.shell("systemctl start holder")

    if PROOF:
        arrive_unchanged(host)

    before, seen = guest.boot_id, len(guest.console())
    guest.start(["khoctl", "kexec", "--image", f"{IMAGES}/{VERSION}/bzImage", "--initrd", INITRD])
    guest.wait_console("Starting new kernel", 180, since=seen)
    guest.qmp("stop")
    assert flip_bit(ram) >= 1
    guest.qmp("cont")
    guest.wait_reboot(before)

    found = verified(host, 7)
    (finding,) = found["findings"]
    assert (finding["source"], finding["producer"], finding["subject"]) == ("content", "holder", "small")
    assert f"page {FLIPPED}" in finding["text"]
    assert "holder" in found["changed"]
    assert found["checks"]["contents holder"]["result"] == "fail"
    assert "large: 64 of" in found["checks"]["contents holder"]["evidence"]
    assert "holder" in host.khoctl("status", code=7).stdout
