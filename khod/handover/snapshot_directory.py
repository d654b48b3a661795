# SPDX-License-Identifier: LGPL-2.1-or-later
"""The directory of one snapshot: khod's files in it, and what is wrong with other entries.

    about.json  boot id, release, generation, the run, and the sequence number
    sequence    the sequence number again: a power failure or a bad block may destroy one of the two
    blobs/NAME  each producer's blob; %0, %1, ... for a name that is not valid for a file, which names.json has
    root        the root blob; a directory without it is not a snapshot (yet, or any more)
    sha256      the digest of root and blobs, made when it is first requested

This code never follows a symbolic link, never opens a file that is not regular, and never removes what khod did not
write.
"""

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from khod.dataclass import dataclass
from khod.errors import errno_text
from khod.kernel.protocol import Tree
from khod.text import join_names

ABOUT, SEQUENCE, ROOT, ROOT_NEW, BLOBS, NAMES, DIGEST = (
    *("about.json", "sequence", "root", "root.new", "blobs", "names.json"),
    "sha256",
)
OWN_FILES = (ROOT, ROOT_NEW, DIGEST, NAMES, SEQUENCE, ABOUT)
"""In the order of their removal: without its root, a half-removed snapshot no longer counts as one."""

RUN = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""The name of a snapshot is its run."""
NEW_RUN = re.compile(r"[0-9a-f]{12}")
"""The name khod.engine gives a run; an empty directory with such a name remains from an interrupted removal."""
UNFINISHED = re.compile(rf"{RUN.pattern}\.[A-Za-z0-9_]+\.new")
"""A snapshot's directory until it holds all that is known before the tree."""
ASIDE = re.compile(rf"{RUN.pattern}\.[A-Za-z0-9_]+\.aside")
"""What stood in the place of a snapshot and was not one."""

MAX_SEQUENCE_DIGITS = 18
MAX_NAME_BYTES = 255  # NAME_MAX
CHUNK_BYTES = 1 << 20
SHA256 = re.compile(r"[0-9a-f]{64}")
KINDS = {
    stat.S_IFREG: "a regular file",
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


class DamagedError(Exception):
    """A snapshot cannot be read completely; the text says what is wrong."""


@dataclass(frozen=True)
class SnapshotEntry:
    """One directory of khod's, with what is known without reading its tree.

    `sequence` orders snapshots; it is 0 if it is lost or was never written (by an earlier khod). `written_ns` is the
    wall-clock time at which the tree was written, None without a tree: for people, and to order entries without a
    number.
    """

    path: Path
    about: Mapping[str, Any]
    sequence: int
    written_ns: int | None
    size: int
    wrong: tuple[str, ...]

    @property
    def sort_key(self) -> tuple[int, int, str]:
        """The sort key, oldest first; entries without a number come before all others."""
        return self.sequence, self.written_ns or 0, self.path.name


def describe_kind(mode: int) -> str:
    """Return the kind of a file in words."""
    return KINDS.get(stat.S_IFMT(mode), "of an unknown kind")


def examine_entry(path: Path) -> SnapshotEntry | str:
    """Return an entry of the snapshots' directory, or why it is not khod's; raise FileNotFoundError if it is gone."""
    status = path.lstat()
    if ASIDE.fullmatch(path.name):
        return f"{describe_kind(status.st_mode)}, put aside by khod: it stood in the place of a snapshot"
    if not stat.S_ISDIR(status.st_mode):
        return f"{describe_kind(status.st_mode)}, not a snapshot"
    if status.st_uid != os.geteuid():
        return f"a directory of the user {status.st_uid}, not khod's"
    if not RUN.fullmatch(path.name) and not UNFINISHED.fullmatch(path.name):
        return "a directory that khod did not make"
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        return f"a directory that cannot be read: {errno_text(error)}"
    known_name = UNFINISHED.fullmatch(path.name) or (not names and NEW_RUN.fullmatch(path.name))
    if not known_name and not any(name in (*OWN_FILES, BLOBS) for name in names):
        return "a directory without anything of khod's in it"
    about = _read_about(path)
    if isinstance(run := about.get("run"), str) and path.name.partition(".")[0] != run:
        return f"a copy of the snapshot {join_names([run], 1)}"
    return _read_entry(path, about, names)


def _read_entry(path: Path, about: dict[str, Any], names: list[str]) -> SnapshotEntry:
    wrong = []
    if strange := [name for name in names if name not in (*OWN_FILES, BLOBS)]:
        wrong.append(f"not khod's in it: {join_names(strange)}")
    root = _lstat(path / ROOT)
    written = root.st_mtime_ns if root is not None and stat.S_ISREG(root.st_mode) else None
    size = 0 if root is None or written is None else root.st_size
    if root is not None and written is None:
        wrong.append(f"{ROOT} is {describe_kind(root.st_mode)}")
    try:
        size += sum(status.st_size for _name, status in _list_blobs(path))
    except (OSError, DamagedError) as error:
        if written is not None or BLOBS in names:
            wrong.append(errno_text(error) if isinstance(error, OSError) else str(error))
    if written is not None and not about:
        wrong.append(f"{ABOUT} is missing or damaged: of which kernel it is is not known")
    return SnapshotEntry(path, about, _read_sequence(path, about), written, size, tuple(wrong))


def make_snapshot(path: Path, about: Mapping[str, Any], sequence: int) -> None:
    """Write a snapshot without a tree into the new directory `path`, durably; the tree follows in the blackout."""
    (path / BLOBS).mkdir(mode=0o700)
    _write_file(path / ABOUT, f"{json.dumps({**about, 'sequence': sequence})}\n".encode(), durable=True)
    _write_file(path / SEQUENCE, f"{sequence}\n".encode(), durable=True)
    sync_directory(path)


def write_tree(path: Path, tree: Tree) -> None:
    """Write the blobs, and then the root by a rename; not durable, which is left to the sync before the jump."""
    (path / BLOBS).mkdir(parents=True, exist_ok=True, mode=0o700)
    names = _file_names(tree.blobs)
    for stale in set(os.listdir(path / BLOBS)) - set(names.values()):
        _unlink_file(path / BLOBS / stale)
    _unlink_file(path / NAMES)
    if odd := {file: name for name, file in names.items() if file != name}:
        _write_file(path / NAMES, json.dumps(odd).encode())
    for name, blob in tree.blobs.items():
        _write_file(path / BLOBS / names[name], blob)
    _write_file(path / ROOT_NEW, tree.root)
    (path / ROOT_NEW).rename(path / ROOT)


def read_tree(path: Path) -> Tree:
    """Read a tree; FileNotFoundError if none was written, DamagedError if it is not as it was written."""
    if not stat.S_ISDIR(mode := path.lstat().st_mode):
        raise DamagedError(f"it is {describe_kind(mode)}")
    (path / ROOT).lstat()  # without a root there is no snapshot, whatever else exists
    names = _odd_names(path)
    blobs = {names.get(file, file): _read_file(path / BLOBS / file) for file, _status in _list_blobs(path)}
    return Tree(_read_file(path / ROOT), dict(sorted(blobs.items())))


def blob_names(path: Path) -> list[str]:
    """Return the names of the blobs, without the root."""
    names = _odd_names(path)
    return sorted(names.get(file, file) for file, _status in _list_blobs(path))


def read_digest(path: Path) -> str:
    """Return the digest made first, which differs from bytes that changed since; make it if there is none."""
    with suppress(OSError, DamagedError):
        kept = _read_file(path / DIGEST).decode("ascii", "replace").strip()
        if SHA256.fullmatch(kept):
            return kept
    names = _odd_names(path)
    files = sorted((names.get(file, file), path / BLOBS / file) for file, _status in _list_blobs(path))
    made = hashlib.sha256()
    for file in (path / ROOT, *(file for _name, file in files)):
        with open(_open_file(file), "rb", buffering=0) as opened:
            while chunk := opened.read(CHUNK_BYTES):
                made.update(chunk)
    with suppress(OSError):  # listing must also work on a read-only file system
        _write_file(path / DIGEST, f"{made.hexdigest()}\n".encode())
    return made.hexdigest()


def remove_snapshot(path: Path) -> None:
    """Remove what khod wrote; the directory stays if it has other files, or something cannot be removed."""
    for name in OWN_FILES[:2]:
        _unlink_file(path / name)
    with suppress(OSError, DamagedError):
        for file, _status in _list_blobs(path, strict=False):
            _unlink_file(path / BLOBS / file)
        (path / BLOBS).rmdir()
    for name in OWN_FILES[2:]:
        _unlink_file(path / name)
    with suppress(OSError):
        path.rmdir()


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _unlink_file(path: Path) -> None:
    """Remove a regular file; a file of another kind with this name is not khod's."""
    with suppress(OSError):
        if stat.S_ISREG(path.lstat().st_mode):
            path.unlink()


def _lstat(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except OSError:
        return None


def _list_blobs(path: Path, *, strict: bool = True) -> Iterator[tuple[str, os.stat_result]]:
    """Yield each blob's file with its status; DamagedError if blobs/ or one of them is not what khod wrote."""
    status = _lstat(path / BLOBS)
    if status is None or not stat.S_ISDIR(status.st_mode):
        raise DamagedError(f"{BLOBS}/ is {'missing' if status is None else describe_kind(status.st_mode)}")
    for file in sorted(os.listdir(path / BLOBS)):
        found = (path / BLOBS / file).lstat()
        if stat.S_ISREG(found.st_mode):
            yield file, found
        elif strict:
            raise DamagedError(f"{BLOBS}/{join_names([file], 1)} is {describe_kind(found.st_mode)}")


def _read_about(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError, RecursionError, DamagedError):  # the tree is used all the same
        found = json.loads(_read_file(path / ABOUT))
        return found if isinstance(found, dict) else {}
    return {}


def _read_sequence(path: Path, about: Mapping[str, Any]) -> int:
    """Return the sequence number from either of its two places; 0 if there is none."""
    number = about.get("sequence")
    if isinstance(number, int) and not isinstance(number, bool) and 0 < number < 10**MAX_SEQUENCE_DIGITS:
        return number
    with suppress(OSError, DamagedError):
        text = _read_file(path / SEQUENCE).strip()
        if text.isdigit() and len(text) <= MAX_SEQUENCE_DIGITS:  # of bytes: only ASCII digits
            return int(text)
    return 0


def _file_names(names: Mapping[str, object]) -> dict[str, str]:
    """Return a file name for each blob: its own, or `%` and a number if its own is not valid or begins with `%`."""
    return {name: name if _is_file_name(name) else f"%{number}" for number, name in enumerate(names)}


def _is_file_name(name: str) -> bool:
    try:
        size = len(os.fsencode(name))
    except UnicodeEncodeError:
        return False
    return 0 < size <= MAX_NAME_BYTES and name not in (".", "..") and name[0] != "%" and not {"/", "\0"} & set(name)


def _odd_names(path: Path) -> dict[str, str]:
    """Return the names of the blobs with numbered files, by file."""
    with suppress(OSError, ValueError, RecursionError, DamagedError):
        found = json.loads(_read_file(path / NAMES))
        if isinstance(found, dict):
            return {file: name for file, name in found.items() if isinstance(name, str)}
    return {}


def _open_file(path: Path) -> int:
    """Open a regular file; never follow a link, never block on a FIFO."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DamagedError(f"{path.name} is a symbolic link") from None
        raise
    if stat.S_ISREG(mode := os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise DamagedError(f"{path.name} is {describe_kind(mode)}")


def _read_file(path: Path) -> bytes:
    with open(_open_file(path), "rb", buffering=0) as file:
        return file.readall()


def _write_file(path: Path, data: bytes, *, durable: bool = False) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(fd, "wb", buffering=0) as file:
        left = memoryview(data)
        while left:
            left = left[file.write(left) :]
        if durable:
            os.fsync(fd)
