# SPDX-License-Identifier: LGPL-2.1-or-later
"""The local file systems, frozen for the jump, so that the next kernel finds their journals clean.

Between the first FIFREEZE and the jump khod writes to no disk, and waits for nobody who does. FITHAW comes first when
reboot(2) returns, and first in a khod that finds the note of one that died in between.
"""

import errno
import re
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from khod.abi.calls import Calls
from khod.dataclass import dataclass

MOUNTINFO = "/proc/self/mountinfo"
NOTE_NAME = "frozen-filesystems"
CANNOT_BE_FROZEN = (errno.EOPNOTSUPP, errno.ENOTTY)
"""Errnos of FIFREEZE for a kind of file system without a journal (vfat): sync(2) is all that it has."""


@dataclass(frozen=True)
class Mount:
    """One mount: proc_pid_mountinfo(5). `device` is major:minor of st_dev; `kind` the type of the file system."""

    path: str
    device: str
    kind: str
    source: str
    is_whole: bool
    """Whether it shows the root of the file system, and is no bind mount of a part."""
    is_read_only: bool
    """Whether the file system itself is."""

    @property
    def is_local(self) -> bool:
        """Whether the file system is on a block device of this host, and needs no process that serves it (FUSE).

        btrfs and bcachefs have a device number without a major one.
        """
        on_device = not self.device.startswith("0:") or self.source.startswith("/dev/")
        return on_device and not self.kind.startswith("fuse")


def parse_mounts(mountinfo: str) -> list[Mount]:
    """Parse a mountinfo file, in its order; lines that cannot be understood are left out."""
    return [mount for line in mountinfo.splitlines() if (mount := _parse_mount(line)) is not None]


def _parse_mount(line: str) -> Mount | None:
    before, _, after = line.partition(" - ")
    try:
        _, _, device, root, path, *_ = before.split(" ")
        kind, source, options, *_ = after.split(" ")
    except ValueError:
        return None
    return Mount(_unescape(path), device, kind, _unescape(source), root == "/", "ro" in options.split(","))


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def list_filesystems(mounts: Sequence[Mount]) -> list[Mount]:
    """Return one mount of each local, writable file system, in the order in which they are frozen.

    That is the reverse of the order in which they were mounted: a file system in a file of another one comes first,
    and the root last.
    """
    found: dict[str, Mount] = {}
    for mount in mounts:
        if mount.is_local and not mount.is_read_only and "\n" not in mount.path:
            best = found.get(mount.device)
            if best is None or (mount.is_whole and not best.is_whole):
                found[mount.device] = mount
    newest_first = [*found.values()][::-1]
    return sorted(newest_first, key=lambda mount: mount.path == "/")


class FrozenFileSystems:
    """Freezes and thaws the local file systems. `note` is a file in memory (/run) with those that may be frozen.

    Without a note, and while `is_guarded` is not set, none is frozen: nobody would thaw it after khod's death.
    """

    def __init__(self, calls: Calls, note: Path | None) -> None:
        self._calls = calls
        self.note = note
        self.is_guarded = False

    def freeze_all(self, given_up: threading.Event) -> None:
        """Freeze every local file system; OSError names the one that cannot be frozen, with the others thawed again.

        EBUSY: another program (a backup) has frozen it. Once `given_up` is set, all are thawed again (ECANCELED).
        """
        if self.note is None or not self.is_guarded or not self._calls.path_exists(MOUNTINFO):
            return
        mounts = list_filesystems(parse_mounts(self._calls.read_file(MOUNTINFO).decode(errors="surrogateescape")))
        frozen: list[str] = []
        try:
            for mount in mounts:
                _raise_if_set(given_up)
                write_note(self.note, [*frozen, mount.path])
                if self._freeze(mount.path):
                    frozen.append(mount.path)
            write_note(self.note, frozen)
            _raise_if_set(given_up)
        except BaseException:
            write_note(self.note, frozen)
            self.thaw_all()
            raise

    def _freeze(self, path: str) -> bool:
        """Freeze one; whether its kind can be frozen."""
        try:
            self._calls.freeze_filesystem(path)
        except OSError as error:
            if error.errno not in CANNOT_BE_FROZEN:
                raise
            return False
        return True

    def thaw_all(self) -> None:
        """Thaw what the note names, the root first."""
        if self.note is None:
            return
        for path in reversed(read_note(self.note)):
            with suppress(OSError):  # it is not frozen, or not mounted any more
                self._calls.thaw_filesystem(path)
        with suppress(OSError):
            self.note.unlink(missing_ok=True)


def write_note(note: Path, paths: Sequence[str]) -> None:
    """Write which file systems may be frozen, a line each: a shell script reads it too."""
    note.parent.mkdir(parents=True, exist_ok=True)
    new = note.with_name(f"{note.name}.new")  # a khod that is killed here leaves the note of before
    new.write_text("".join(f"{path}\n" for path in paths), errors="surrogateescape")
    new.rename(note)


def read_note(note: Path) -> list[str]:
    """Return what a note names; nothing if it is not there."""
    with suppress(OSError):
        return note.read_text(errors="surrogateescape").splitlines()
    return []


def _raise_if_set(given_up: threading.Event) -> None:
    if given_up.is_set():
        raise OSError(errno.ECANCELED, "The handover was ended meanwhile", "FIFREEZE")
