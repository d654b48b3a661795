# SPDX-License-Identifier: LGPL-2.1-or-later
"""Load trees from files, with limits: a blob, or a directory of blobs as written by khod or as in debugfs."""

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from khod.errors import UsageError, errno_text

MAX_BYTES = 128 << 20
"""The maximum size of one blob in bytes: far above v3's dt_max (10 MiB by default)."""
CHUNK_BYTES = 1 << 20
MAX_BLOBS = 1000
"""The maximum number of blobs in a directory."""
LAYOUTS = (("root", "blobs"), ("fdt", "sub_fdts"))
"""The names of the root blob and of the directory of the others: khod's snapshots, /sys/kernel/debug/kho/out."""

NAMES = "names.json"
"""A file of a snapshot, see `khod.handover.snapshot_directory`."""


class SupportsRead(Protocol):
    """A file that can be read in bytes."""

    def read(self, size: int, /) -> bytes | None:
        """Read at most `size` bytes."""


def load_blobs(path: str) -> dict[str, bytes]:
    """Read a tree's blobs by name (the root's is ""); `-` is standard input. Raises UsageError if that fails."""
    try:
        if path == "-":
            return {"": _read_bounded(sys.stdin.buffer, "standard input")}
        if Path(path).is_dir():
            return _load_directory(Path(path))
        if not (blob := _load_file(Path(path))):
            raise UsageError("The file is empty", where=path)
        return {"": blob}
    except OSError as error:
        raise UsageError(
            f"The tree cannot be read: {errno_text(error)}",
            where=path,
            remedy="Give out, in, snapshot, an id of khoctl dt list, or the path of a readable file or directory.",
        ) from None
    except ValueError as error:  # a NUL in the path
        raise UsageError(f"The tree cannot be read: {error}", where=ascii(path)) from None


def _load_directory(path: Path) -> dict[str, bytes]:
    for root, blobs in LAYOUTS:
        if (path / root).exists():
            names = sorted((path / blobs).iterdir()) if (path / blobs).is_dir() else []
            if len(names) > MAX_BLOBS:
                raise UsageError(f"There are more than {MAX_BLOBS} blobs", where=str(path / blobs))
            shown = _read_names(path)
            return {"": _load_file(path / root)} | {shown.get(file.name, file.name): _load_file(file) for file in names}
    raise UsageError("This directory is not a tree: it has neither `root` nor `fdt`", where=str(path))


def _read_names(path: Path) -> dict[str, str]:
    """Return the names of blobs that are not valid for a file, by the file that a snapshot uses for each."""
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(_load_file(path / NAMES))
        if isinstance(found, dict):
            return {file: name for file, name in found.items() if isinstance(name, str)}
    return {}


def _load_file(path: Path) -> bytes:
    with path.open("rb", buffering=0) as file:
        if path.is_file() and os.fstat(file.fileno()).st_size <= MAX_BYTES:
            return file.readall()
        return _read_bounded(file, str(path))


def _read_bounded(file: SupportsRead, where: str) -> bytes:
    """Read a file without a size, such as a pipe, to its end."""
    data = bytearray()
    while chunk := file.read(CHUNK_BYTES):
        data += chunk
        if len(data) > MAX_BYTES:
            raise UsageError(f"This is not a tree: it has more than {MAX_BYTES >> 20} MiB", where=where)
    return bytes(data)
