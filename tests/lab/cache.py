# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the lab builds once and keeps: a directory of files named after the hash of what they were made from."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

ENVIRONMENT = "KHO_LAB_CACHE"
IN_USE_SECONDS = 7200.0
"""Longer than the tests of one tree take."""


def directory() -> Path:
    """The cache's root, made if it is missing: KHO_LAB_CACHE or ~/.cache/khod-lab."""
    root = Path(os.environ.get(ENVIRONMENT) or "~/.cache/khod-lab").expanduser()
    root.mkdir(parents=True, exist_ok=True)
    return root


def key(parts: Iterable[str | bytes | Path]) -> str:
    """16 hex digits for these parts in this order; a Path counts with its mode and its content."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            digest.update(f"{part.stat().st_mode:o} ".encode())
            data = part.read_bytes()
        else:
            data = part.encode() if isinstance(part, str) else part
        digest.update(f"{len(data)}:".encode() + data)  # its length, or "ab", "c" would be "a", "bc"
    return digest.hexdigest()[:16]


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the lock that goes with a path; other processes (and other calls in this one) wait for it."""
    with (target.parent / f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def once(target: Path, make: Callable[[Path], None]) -> Path:
    """`target`, made by `make(scratch path)` if it is not there yet.

    It appears whole or not at all, and one process makes it while others that want the same one wait for it.
    """
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target):
        if not target.exists():
            scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
            try:
                make(scratch / target.name)
                (scratch / target.name).rename(target)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return target


def prune(folder: Path, pattern: str, keep: int) -> None:
    """Remove all but the `keep` newest entries of `folder` that match; a guest that has one open does not notice.

    What was used within IN_USE_SECONDS stays: the tests of another tree may need it again.
    """
    entries = sorted(folder.glob(pattern), key=_modified_at, reverse=True)
    for entry in entries[keep:]:
        if _modified_at(entry) > time.time() - IN_USE_SECONDS:
            continue
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _modified_at(entry: Path) -> float:
    """When an entry was modified, 0.0 if another process has removed it meanwhile."""
    try:
        return entry.stat().st_mtime
    except FileNotFoundError:
        return 0.0
