# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a real kernel sends when devices come and go, as the guard hears it through the guest's own libudev.

The lab's kernels have no PCI hotplug driver, so a disk that QMP adds is there when somebody rescans the bus.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.lab.conftest import REPOSITORY, Online
from tests.lab.guest import Guest

RESCAN = "echo 1 > /sys/bus/pci/rescan"
READY = "/run/guard.ready"

# Told to start and to end by the test: ready when it listens, done when the device named argv[1] did argv[2].
WATCH = f"""\
import asyncio, json, os, sys
sys.path.insert(0, "/lab")
from khod.engine.guard import Guard

async def main():
    ended, told = asyncio.Event(), []
    def happened(seen):
        told.append([seen.severity.value, seen.event.device, seen.describe()])
        if [os.path.basename(seen.event.device), seen.event.action] == sys.argv[1:3]:
            ended.set()
    guard = Guard(happened)
    guard.start(["pci", "cpu"], ["virtio", "block", "mem"], {{"vm1": sys.argv[3:]}})
    with open("{READY}", "w") as ready:
        ready.write("ready")
    async with asyncio.timeout(100):
        await ended.wait()
    guard.stop()
    print(json.dumps(told))

asyncio.run(main())
"""

OVERFLOW = """\
import asyncio, sys
sys.path.insert(0, "/lab")
from khod.engine import guard

async def main():
    guard.QUEUE_BYTES = 1
    told = []
    watch = guard.Guard(told.append)
    watch.start(["pci"], [], {})
    with open("/sys/devices/virtual/mem/null/uevent", "w", buffering=1) as null:
        for _ in range(100):
            null.write("add\\n")
    watch.process_pending()
    watch.process_pending()
    print(*(f"{one.severity.value}: {one.describe()}" for one in told), sep="\\n")
    watch.stop()

asyncio.run(main())
"""


@contextmanager
def watching(guest: Guest, name: str, action: str, *devices: str) -> Iterator[list[Any]]:
    """Have the guard listen in the guest until this happens; what it told is in the list afterwards."""
    guest.run(["sh", "-ec", f"rm -f {READY}; mkfifo {READY}"])
    pending = guest.start(["python3", "-c", WATCH, name, action, *devices])
    guest.run(["cat", READY])
    told: list[Any] = []
    yield told
    result = pending.wait()
    assert result.rc == 0, result.stderr
    told += json.loads(result.stdout)


def install(guest: Guest) -> None:
    words = ("__init__.py", "deferred.py", "errors.py", "dataclass.py", "text.py")
    for name in (*words, "abi/__init__.py", "abi/devices.py", "engine/guard.py", "engine/udev.py"):
        guest.put(f"/lab/khod/{name}", (REPOSITORY / "khod" / name).read_bytes())
    guest.put("/lab/khod/engine/__init__.py", b"")  # without the engine: it needs what this disk has not


def test_devices_that_come_and_go(online: Online, plain_disk: Path) -> None:
    guest = online("7.3.4", disk=plain_disk)
    assert guest.wait_online() == "running"
    install(guest)
    port = guest.run(["sh", "-ec", "readlink -f /sys/class/pci_bus/0000:01/device"]).stdout.strip()
    card = f"{port}/0000:01:00.0"

    # A disk from QMP; that somebody asks for the events of what is there already is none.
    with watching(guest, "vdb", "add") as told:
        guest.run(["udevadm", "trigger", "--action=add", "/sys/devices/virtual/mem/null"])
        guest.qmp("blockdev-add", driver="null-co", node_name="hot0", size=1 << 20, read_zeroes=True)
        guest.qmp("device_add", driver="virtio-blk-pci", id="disk0", drive="hot0", bus="hot")
        guest.run(["sh", "-ec", RESCAN])
    block = guest.run(["readlink", "-f", "/sys/block/vdb"]).stdout.strip()
    virtio = Path(block).parents[1]
    assert virtio.parent == Path(card)
    assert told == [
        ["abort", card, "pci device 0000:01:00.0 was added"],
        ["record", str(virtio), f"virtio device {virtio.name} was added"],
        ["record", block, "block device vdb (/dev/vdb) was added"],
    ]

    # A processor, switched off and on again.
    cpu = "/sys/devices/system/cpu/cpu1"
    with watching(guest, "cpu1", "online") as told:
        guest.run(["sh", "-ec", f"echo 0 > {cpu}/online; echo 1 > {cpu}/online"])
    assert told == [["abort", cpu, "cpu device cpu1 went offline"], ["abort", cpu, "cpu device cpu1 came online"]]

    # The disk of a producer, pulled: it is named by its link in /sys/block, which goes with it.
    with watching(guest, "0000:01:00.0", "remove", "/sys/block/vdb") as told:
        guest.run(["sh", "-ec", f"echo 1 > {card}/remove"])
    assert told == [
        ["abort", block, "block device vdb (/dev/vdb) of producer vm1 was removed"],
        ["abort", str(virtio), f"virtio device {virtio.name} of producer vm1 was removed"],
        ["abort", card, "pci device 0000:01:00.0 of producer vm1 was removed"],
    ]

    lost = guest.run(["python3", "-c", OVERFLOW]).stdout
    assert lost == "abort: the kernel sent more device events than could be read: some were lost\n"
