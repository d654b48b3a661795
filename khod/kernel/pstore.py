# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a kernel that died left behind: its last messages in pstore (ramoops, the firmware's variables, ERST).

At boot systemd-pstore.service moves the files out of /sys/fs/pstore, into folders below its own directory.
"""

import re
from collections.abc import Iterator
from contextlib import suppress

from khod.abi.calls import Calls
from khod.text import printable, shorten

PLACES = ("/sys/fs/pstore", "/var/lib/systemd/pstore")
MAX_DEPTH = 3
"""systemd's folders: one for the time of the dump, one for its number."""
MAX_FILES = 256
MAX_LINES = 12
MAX_CHARACTERS = 160
KINDS = ("dmesg-", "console-", "pmsg-")
"""The names of the files, the most telling kind first: a dump is written at an oops or a panic, the console always."""
COMPRESSED = ".enc.z"
"""The end of the name of a dump that this kernel cannot unpack."""
PANIC = re.compile(r"Kernel panic - not syncing: (?P<cause>.*)")


def read_last_words(calls: Calls, since: float) -> list[str]:
    """Return the last lines of the newest file that was written after `since` (seconds since the epoch).

    Where the kernel panicked, the lines begin with that. An empty list if there is no such file. Raises OSError if the
    file cannot be read.
    """
    found = [(path, name) for place in PLACES for path, name in _list_files(calls, place, MAX_DEPTH)][:MAX_FILES]
    for kind in KINDS:
        dated = [(_modified_at(calls, path), path) for path, name in found if name.startswith(kind)]
        if recent := [path for at, path in dated if at >= since and at == max(dated)[0]]:
            return _last_lines(calls.read_file(min(recent)))  # of a dump in parts, the first is the newest
    return []


def _list_files(calls: Calls, directory: str, depth: int) -> Iterator[tuple[str, str]]:
    """Yield the path and the name of each file of pstore in a directory and in those below it."""
    names: list[str] = []
    with suppress(OSError):
        names = calls.list_directory(directory)
    for name in names:
        path = f"{directory}/{name}"
        if name.startswith(KINDS) and not name.endswith(COMPRESSED):
            yield path, name
        elif depth > 1:
            yield from _list_files(calls, path, depth - 1)


def _modified_at(calls: Calls, path: str) -> float:
    with suppress(OSError):
        return calls.modified_at(path)
    return 0.0


def _last_lines(raw: bytes) -> list[str]:
    lines = [line for line in raw.decode(errors="replace").splitlines() if line.strip(" \0")]
    begin = next((at for at in reversed(range(len(lines))) if PANIC.search(lines[at])), None)
    kept = lines[-MAX_LINES:] if begin is None else lines[begin : begin + MAX_LINES]
    return [shorten(printable(line), MAX_CHARACTERS) for line in kept]
