# SPDX-License-Identifier: LGPL-2.1-or-later
"""What two virtual machines may not have in common: a disk, or a socket at which QEMU listens.

QEMU removes the socket of another one without a word. It locks its disks, unless it is told not to, and its message
names no machine. Of a machine that others start, the file has the QMP socket alone; its disks are asked of QEMU.
"""

import os
import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

from khod.errors import ConfigError
from khod.files import list_toml, read_toml
from khod.vm.arguments import list_options
from khod.vm.settings import DIRECTORY, KEPT_DIRECTORY

RUNTIME = Path("/run/khod-vm")
DISK_OPTIONS = ("drive", "blockdev", "hda", "hdb", "hdc", "hdd", "pflash")
DISK = re.compile(r"(?:^|\bfile=|\bfilename=|\"filename\"\s*:\s*\")(?P<path>/[^,\"]+)")
READ_ONLY = re.compile(r"\bread-?only(?:=on|\"\s*:\s*true|,|$)|\bmedia=cdrom\b")
SOCKET = re.compile(r"(?:\bunix:|^socket\b.*\bpath=)(?P<path>/[^,]+)")
SERVES = re.compile(r",server(?:=on|,|$)")
SHARED = "share-rw=on"
"""Of a device: its disk may be another machine's too, as the two file systems know."""


def check_unshared(name: str, root: Path, disks: Collection[Path] = ()) -> None:
    """Raise ConfigError that names both files where another machine has a socket or a disk of this one.

    `disks` are those that its QEMU has, besides those that its file names. A file that is wrong is left out: its own
    machine is told of it.
    """
    own = root / DIRECTORY / f"{name}.toml"
    if not own.exists():
        own = root / KEPT_DIRECTORY / own.name
    ours = {os.path.realpath(disk): "disk" for disk in disks} | _read_places(own)
    for path in _list_files(root):
        if path != own:
            theirs = _read_places(path)
            for place in sorted(ours.keys() & theirs.keys()):
                raise ConfigError(
                    f"Two virtual machines have the {ours[place]} {place}: {own} and {path}",
                    where=str(own),
                    remedy="Give each its own, or remove one of the files.",
                )


def _list_files(root: Path) -> Iterator[Path]:
    for directory in (DIRECTORY, KEPT_DIRECTORY):
        with suppress(ConfigError):
            yield from list_toml(root / directory, "virtual machine")


def _read_places(path: Path) -> dict[str, str]:
    """Return the disks and sockets that a file names, each with what it is."""
    with suppress(ConfigError):
        values = read_toml(path, "virtual machine")[1]
        if path.parent.name != Path(DIRECTORY).name:
            return {os.path.realpath(values["qmp"]): "socket"} if isinstance(values.get("qmp"), str) else {}
        words = values.get("command")
        if isinstance(words, list) and all(isinstance(word, str) for word in words):
            own = str(RUNTIME / path.stem / "qmp")
            return {os.path.realpath(place): what for place, what in _list_places(words)} | {own: "socket"}
    return {}


def _list_places(words: list[str]) -> Iterator[tuple[str, str]]:
    is_shared = any(SHARED in word for word in words)
    for option, value in list_options(words[1:]):
        if option in DISK_OPTIONS and not is_shared and not READ_ONLY.search(value):
            yield from ((found["path"], "disk") for found in DISK.finditer(value))
        elif (found := SOCKET.search(value)) and (SERVES.search(value) or option == "vnc"):
            yield found["path"], "socket"
