# SPDX-License-Identifier: LGPL-2.1-or-later
"""A Linux guest with a disk: its init (recorder.c) writes numbered records, and reports each that was confirmed."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.lab.process import call

SOURCE = Path(__file__).with_name("recorder.c")
RECORD_BYTES = 512
LINE = re.compile(r"^record (?P<number>\d+) (?P<uptime>\d+\.\d+)\r?\n", re.MULTILINE)


@dataclass(frozen=True)
class Record:
    """A record that the disk has confirmed; `uptime` is the guest's after that, in seconds."""

    number: int
    uptime: float


def build_initrd(directory: Path, *programs: str) -> bytes:
    """Return an initrd whose init is the recorder, compiled in an empty `directory`; it has these programs of ours."""
    tree = directory / "tree"
    (tree / "dev").mkdir(parents=True)
    call(["gcc", "-static", "-O2", "-Wall", "-Wextra", "-Werror", "-o", tree / "init", SOURCE])
    for file in {file for program in programs for file in [program, *_list_libraries(program)]}:
        (tree / file[1:]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tree / file[1:])
    initrd = directory / "initrd"
    call(["sh", "-ec", 'find . | cpio --quiet --create --format=newc > "$1"', "pack", initrd], cwd=tree)
    return initrd.read_bytes()


def _list_libraries(program: str) -> list[str]:
    """Return the paths of the libraries that a program is linked with, and of what loads them."""
    return re.findall(r"(?:=> |^\s+)(/\S+) \(0x", call(["ldd", program]), re.MULTILINE)


def parse_records(text: str) -> list[Record]:
    """Return the records that a guest has reported on its serial line."""
    return [Record(int(found["number"]), float(found["uptime"])) for found in LINE.finditer(text)]


def record_content(number: int) -> bytes:
    """Return the bytes of a record."""
    return (b"%07d\n" % number) * (RECORD_BYTES // 8)
