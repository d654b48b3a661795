# SPDX-License-Identifier: LGPL-2.1-or-later
"""Snapshots of state trees, kept beside the record: raw bytes, their origin, and their digest.

In the blackout a snapshot costs only the write of the tree. What is known before is written before, and the digest is
made when it is first requested.

Each snapshot gets a sequence number when it is prepared, which tells the newer one. The wall clock may be set back in
between (a board without a battery), and is only shown to people. Other entries of the directory are left as they are
and listed with what is wrong with them; only lack of space, or a failing disk, may refuse a handover.
"""

import errno
import os
import tempfile
import uuid
from contextlib import suppress
from pathlib import Path

from khod import config
from khod.dataclass import dataclass
from khod.errors import RecordError, UsageError, errno_text
from khod.handover import snapshot_directory as files
from khod.handover.snapshot_directory import DamagedError, SnapshotEntry
from khod.kernel.protocol import Tree
from khod.model import Generation, Snapshot

MAX_STRANGERS_LISTED = 20
REMEDIES = {
    errno.ENOSPC: "Free some space on that file system (df -h, df -i). Nothing of the kernel's was changed.",
    errno.EDQUOT: "Free some space within the quota of that file system. Nothing of the kernel's was changed.",
    errno.EROFS: "Mount that file system writable, and look in the kernel log for why it is not.",
    errno.EIO: "The disk fails: look at the kernel log.",
}
"""What to do if a snapshot cannot be written."""


@dataclass(frozen=True)
class Snapshots:
    """The directory of the snapshots, one directory each. Every method raises RecordError with path and cause."""

    directory: Path

    def prepare_snapshot(
        self, run: str, boot_id: str, release: str, generation: Generation, bounds: config.SnapshotsSettings
    ) -> None:
        """Create the directory of this run's snapshot before the blackout, and remove the oldest ones beyond `bounds`.

        The directory is durable, so that no later power failure leaves a tree of unknown origin.
        """
        place = self._snapshot_path(run)
        about = {"run": run, "boot_id": boot_id, "release": release, "generation": generation.name}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            entries, _strangers = self._examine_entries()
            self._prune_entries(entries, bounds)
            self._vacate_place(place)
            self._make_directory(place, about, max((entry.sequence for entry in entries), default=0) + 1)
        except OSError as error:
            raise _unwritable_error(error, place) from error

    def write_tree(self, run: str, tree: Tree) -> None:
        """Write the outgoing tree: `blobs/NAME` and then `root`, as the kernel showed them."""
        place = self._snapshot_path(run)
        try:
            files.write_tree(place, tree)
        except OSError as error:
            raise _unwritable_error(error, place) from error

    def read_tree(self, run: str) -> Tree | None:
        """Return the tree of this run, or None if none was kept."""
        place = self._snapshot_path(run)
        try:
            return files.read_tree(place)
        except FileNotFoundError:
            return None
        except (OSError, DamagedError) as error:
            what = errno_text(error) if isinstance(error, OSError) else str(error)
            raise RecordError(
                f"The snapshot cannot be read: {what}", where=str(place), remedy="khoctl dt list has the others."
            ) from error

    def last_tree(self, boot_id: str = "") -> Tree | None:
        """Return the newest tree that was not taken in the boot `boot_id`; if there is no such tree, the newest."""
        taken = self._taken_entries()
        left = (entry for entry in taken if not boot_id or entry.about.get("boot_id") != boot_id)
        newest = next(left, next(iter(taken), None))
        return None if newest is None else self.read_tree(newest.path.name)

    def list_snapshots(self) -> list[Snapshot]:
        """Describe each snapshot, newest first, then, with `run` empty, the entries that are not snapshots."""
        entries, strangers = self._examine_or_raise()
        rests = [entry for entry in entries if entry.written_ns is None and entry.wrong]
        strangers += [(entry.path.name, f"the rest of a snapshot: {'; '.join(entry.wrong)}") for entry in rests]
        found = [described for entry in _newest_first(entries) if (described := _describe_entry(entry))]
        found += [_describe_stranger(self.directory / name, what) for name, what in strangers[:MAX_STRANGERS_LISTED]]
        if (more := len(strangers) - MAX_STRANGERS_LISTED) > 0:
            found.append(_describe_stranger(self.directory / f"{more} more", "not snapshots either"))
        return found

    def _taken_entries(self) -> list[SnapshotEntry]:
        """Return the entries that have a tree, newest first."""
        return _newest_first(self._examine_or_raise()[0])

    def _examine_or_raise(self) -> tuple[list[SnapshotEntry], list[tuple[str, str]]]:
        try:
            return self._examine_entries()
        except OSError as error:
            raise RecordError(
                f"The snapshots cannot be listed: {errno_text(error)}", where=str(self.directory)
            ) from error

    def _examine_entries(self) -> tuple[list[SnapshotEntry], list[tuple[str, str]]]:
        """Return the entries that are khod's, and the names of the others with what they are.

        Raises OSError only for the directory itself.
        """
        entries, strangers = list[SnapshotEntry](), list[tuple[str, str]]()
        try:
            names = sorted(os.listdir(self.directory))
        except FileNotFoundError:
            return [], []
        for name in names:
            try:
                found = files.examine_entry(self.directory / name)
            except FileNotFoundError:
                continue  # removed since
            except OSError as error:
                found = f"it cannot be looked at: {errno_text(error)}"
            if isinstance(found, SnapshotEntry):
                entries.append(found)
            else:
                strangers.append((name, found))
        return entries, strangers

    def _prune_entries(self, entries: list[SnapshotEntry], bounds: config.SnapshotsSettings) -> None:
        """Remove snapshots until one more fits in the bounds; those without a tree are removed too."""
        room, size, kept = bounds.keep - 1, 0, set[Path]()
        for entry in _newest_first(entries):
            size += entry.size
            if len(kept) < room and size <= bounds.max_bytes:
                kept.add(entry.path)
        for entry in entries:
            if entry.path not in kept:
                files.remove_snapshot(entry.path)

    def _vacate_place(self, place: Path) -> None:
        """Free the name of this run: remove an earlier snapshot of it, rename anything else."""
        with suppress(FileNotFoundError):
            if isinstance(files.examine_entry(place), SnapshotEntry):
                files.remove_snapshot(place)
            if os.path.lexists(place):
                place.rename(self.directory / f"{place.name}.{uuid.uuid4().hex}.aside")

    def _make_directory(self, place: Path, about: dict[str, str], sequence: int) -> None:
        """Create the directory under a temporary name and rename it, durably."""
        new = Path(tempfile.mkdtemp(prefix=f"{place.name}.", suffix=".new", dir=self.directory))
        try:
            files.make_snapshot(new, about, sequence)
            new.rename(place)
        except OSError:
            files.remove_snapshot(new)
            raise
        files.sync_directory(self.directory)

    def _snapshot_path(self, run: str) -> Path:
        if not files.RUN.fullmatch(run):
            raise UsageError(
                f"{run!r} names no state tree",
                where="TREE",
                remedy="One of out, in, snapshot, or an id of: khoctl dt list",
            )
        return self.directory / run


def _newest_first(entries: list[SnapshotEntry]) -> list[SnapshotEntry]:
    """Return the entries with a tree, by sequence number; those without one (from an earlier khod) come last."""
    return sorted((e for e in entries if e.written_ns is not None), key=lambda entry: entry.sort_key, reverse=True)


def _describe_entry(entry: SnapshotEntry) -> Snapshot | None:
    """Describe a snapshot as in the model; None if it was removed meanwhile."""
    about, blobs, digest, wrong = entry.about, list[str](), "", list(entry.wrong)
    try:
        blobs, digest = files.blob_names(entry.path), files.read_digest(entry.path)
    except FileNotFoundError:
        if not os.path.lexists(entry.path):
            return None
    except OSError as error:
        wrong.append(f"it cannot be read: {errno_text(error)}")
    except DamagedError as error:
        wrong += [str(error)] if str(error) not in wrong else []
    generation = about.get("generation")
    return Snapshot(
        id=entry.path.name,
        run=entry.path.name,
        taken_at=(entry.written_ns or 0) / 1e9,
        boot_id=str(about.get("boot_id", "")),
        release=str(about.get("release", "")),
        generation=Generation.__members__.get(generation, Generation.none)
        if isinstance(generation, str)
        else Generation.none,
        bytes=entry.size,
        blobs=blobs,
        digest=digest,
        wrong="; ".join(wrong),
    )


def _describe_stranger(path: Path, what: str) -> Snapshot:
    """Describe an entry of the directory that is not a snapshot: it has no run, and is left as it is."""
    return Snapshot(
        id=path.name,
        run="",
        taken_at=0.0,
        boot_id="",
        release="",
        generation=Generation.none,
        bytes=0,
        blobs=[],
        digest="",
        wrong=what,
    )


def _unwritable_error(error: OSError, path: Path) -> RecordError:
    remedy = REMEDIES.get(error.errno or 0, f"Look at it (ls -la {path.parent}) and at the kernel log.")
    at = error.filename if isinstance(error.filename, str) else str(path)
    return RecordError(f"The snapshot cannot be written: {errno_text(error)}", where=at, remedy=remedy)
