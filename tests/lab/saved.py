# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests that have booted once: saved when systemd is through, resumed in a second as often as scenarios ask.

What is saved is QEMU's own migration stream, what that boot wrote to its disk, what its console said, and its hello.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from pathlib import Path
from typing import Any

from tests.lab import accel, cache
from tests.lab import guest as lab_guest
from tests.lab.errors import LabError
from tests.lab.guest import Guest, Hello, Saved
from tests.lab.kernels import Kernel
from tests.lab.machine import QEMU
from tests.lab.process import call

KEPT_GUESTS = 8
SAVE_DEADLINE = 120.0  # seconds; it is half a GiB at most
UUID = slice(1024 + 0x68, 1024 + 0x78)  # s_uuid of ext4's super block: another one in each image that mke2fs makes
MEMORY, DISK, CONSOLE, HELLO = "memory", "disk.qcow2", "console.log", "hello.json"


def resumed(kernel: Kernel, disk: Path, *, console_log: Path, **options: Any) -> Guest:
    """Give a guest that is online as soon as its context is entered; `options` are Guest's.

    The first for a kernel, a disk and these options is booted, and saved in the cache. LabError where its systemd does
    not come up as "running".
    """
    with disk.open("rb") as image:
        uuid = image.read(UUID.stop)[UUID]
    arguments = accel.machine_arguments(accel.accel(kernel))
    sources = Path(__file__), Path(lab_guest.__file__), Path(accel.__file__)
    key = cache.key(
        [*sources, call([QEMU, "--version"]), repr(arguments), kernel.bzimage, str(disk), uuid, repr(options)]
    )
    target = cache.directory() / "guests" / f"guest-{key}"
    folder = cache.once(target, lambda path: _save(path, kernel, disk, options))
    os.utime(folder)
    cache.prune(target.parent, "guest-*", KEPT_GUESTS)
    hello = Hello(**json.loads((folder / HELLO).read_text()))
    saved = Saved(folder / MEMORY, folder / DISK, folder / CONSOLE, hello)
    return Guest(kernel, disk, saved=saved, console_log=console_log, **options)


def _save(folder: Path, kernel: Kernel, disk: Path, options: dict[str, Any]) -> None:
    """Boot a guest that writes to an overlay in `folder`, and leave there what it is when it is online."""
    folder.mkdir()
    call(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", disk, folder / DISK])
    drive = f"file={folder / DISK},format=qcow2"
    with Guest(kernel, disk, drive=drive, console_log=folder / CONSOLE, **options) as guest:
        if (state := guest.wait_online()) != "running":
            failed = guest.run(["systemctl", "--failed", "--no-legend"]).stdout
            raise LabError(f"a guest that is to be saved is {state}\n{failed}{guest.machine.tail()}")
        (folder / HELLO).write_text(json.dumps(dataclasses.asdict(guest.hellos[0])))
        guest.qmp("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
        guest.qmp("migrate-set-parameters", max_bandwidth=1 << 40)
        guest.qmp("migrate", uri=f"exec:cat > {shlex.quote(str(folder / MEMORY))}")
        guest.machine.wait_event("MIGRATION", SAVE_DEADLINE, status="completed")
