# SPDX-License-Identifier: LGPL-2.1-or-later
"""The state directory: real files, and a list of what would be left of them after a loss of power.

What khod writes is in the page cache, and outlives khod. It outlives the power only once it was synced: a file by
fsync(2) of it and of the directory its name is in, everything by sync(2).
"""

import errno
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

WRITES = frozenset("wax+")
FULL, READ_ONLY = "full", "read-only"
TROUBLES = {FULL: errno.ENOSPC, READ_ONLY: errno.EROFS}
NOTHING_FREE = 0
PLENTY = 1 << 30


class Disk:
    """The file system below `directory`. `point` is called before and after each call that is looked at."""

    def __init__(self, directory: Path, point: Callable[[str, str], None]) -> None:
        self.directory = directory
        self.trouble = ""
        self.changes = 0
        """How often anything here was written."""
        self.point = point
        self._handed = False
        """Whether somebody else than khod writes: that meets no trouble."""
        self._below = f"{directory}{os.sep}"
        self._durable: dict[str, bytes] = {}
        """What a loss of power leaves at least, by path."""
        self._synced: dict[int, bytes] = {}
        """Contents that were fsynced, by inode."""
        self._since: dict[str, list[bytes]] = {}
        """Contents a name was given since it was durable, the last one last."""

    def close(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    def has(self, path: Any) -> bool:
        """Whether a path lies here."""
        if self._handed or not isinstance(path, str | os.PathLike):
            return False
        return os.fspath(path).startswith(self._below) or os.fspath(path) == str(self.directory)

    # The calls, as khod makes them

    def open(self, opened: Callable[..., Any], path: Any, mode: str, arguments: tuple[Any, ...], more: Any) -> Any:
        if WRITES.isdisjoint(mode):
            self.point("disk.read", "before")
            return opened(path, mode, *arguments, **more)
        self._writable("disk.open", path)
        self.changes += 1
        file = opened(path, mode, *arguments, **more)
        self.point("disk.open", "after")
        return file

    def mkdir(self, made: Callable[..., None], path: Any, mode: int) -> None:
        self._writable("disk.mkdir", path)
        made(path, mode)

    def fsync(self, fd: int) -> bool:
        """Sync a file or directory; False where it lies elsewhere."""
        path = os.readlink(f"/proc/self/fd/{fd}")
        if not self.has(path):
            return False
        self.point("disk.fsync", "before")
        if os.path.isdir(path):
            for name in [name for name in self._since if os.path.dirname(name) == path]:
                self._settle(name)
        else:
            self._synced[os.fstat(fd).st_ino] = _content(path)
        self.point("disk.fsync", "after")
        return True

    def rename(self, renamed: Callable[..., None], old: Any, new: Any) -> None:
        self._writable("disk.rename", new)
        if os.path.isdir(old):  # a snapshot's, which the sync before the jump makes durable
            renamed(old, new)
            self.changes += 1
            return
        content = _content(os.fspath(old))
        renamed(old, new)
        self.changes += 1
        self._since.setdefault(os.fspath(new), []).append(content)
        self.point("disk.rename", "after")

    def statvfs(self, path: Any) -> os.statvfs_result:
        self.point("disk.space", "before")
        free = NOTHING_FREE if self.trouble == FULL else PLENTY
        os.stat(path)
        return os.statvfs_result((4096, 4096, free, free // 4096, free // 4096, 1, 1, 1, 0, 255))

    def sync(self) -> None:
        """All of it is written back."""
        self._durable = self._contents()
        self._since.clear()
        self._synced.clear()

    # What happens to it

    def lose_power(self, choice: int) -> None:
        """Keep of each file what was durable, or what it was given since, or its name with nothing in it.

        `choice` decides: its digits in the base of three, one for each file that is not certain.
        """
        now = self._contents()
        for path in sorted({*now, *self._durable, *self._since}):
            versions = [*self._since.get(path, []), *([now[path]] if path in now else [])]
            kept = self._durable.get(path)
            if not versions or versions[-1] == kept:
                continue
            choice, which = divmod(choice, 3)
            if which == 1:
                kept = versions[-1]
            elif which == 2:
                kept = versions[0] if versions[0] in self._synced.values() else b""
            self._put(path, kept)
        self.sync()

    def damage(self, name: str, content: bytes | None) -> None:
        """Have an operator's hand write this file, or remove it."""
        self._put(f"{self._below}{name}", content)
        self.sync()

    def _settle(self, name: str) -> None:
        """The name is durable; its content only where the file was synced too, and may be empty otherwise."""
        versions = self._since.pop(name)
        synced = versions[-1] in self._synced.values()
        self._durable[name] = versions[-1] if synced else self._durable.get(name, b"")
        if not synced:
            self._since[name] = versions[-1:]

    def _put(self, path: str, content: bytes | None) -> None:
        self._handed = True
        self.changes += 1
        try:
            if content is None:
                Path(path).unlink(missing_ok=True)
            else:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                Path(path).write_bytes(content)
        finally:
            self._handed = False

    def _contents(self) -> dict[str, bytes]:
        found = {}
        for base, _directories, names in os.walk(self.directory):
            for name in names:
                path = f"{base}{os.sep}{name}"
                found[path] = _content(path)
        return found

    def _writable(self, site: str, path: Any) -> None:
        self.point(site, "before")
        if number := TROUBLES.get(self.trouble):
            raise OSError(number, os.strerror(number), os.fspath(path))


def _content(path: str) -> bytes:
    with io.FileIO(path) as file:
        return file.readall() or b""
