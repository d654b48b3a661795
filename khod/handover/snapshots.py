# SPDX-License-Identifier: LGPL-2.1-or-later
"""The state trees that left, kept beside the record: raw bytes, whose they were, and their digest.

Inside the blackout a snapshot costs its write and no more: what is known of it before stands in its directory
before, and the digest is made by whoever asks first.

Which one is newer is told by a number that each gets when it is prepared; the wall clock may be set back in between
(a board without a battery), and is shown to people alone. Whatever else lies in the directory is left as it is and
listed with what is wrong with it: only a lack of room, or a disk that fails, may refuse a handover.
"""

import errno
import os
import tempfile
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from khod import config
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
"""What to do where a snapshot cannot be written."""


@dataclass(frozen=True)
class Snapshots:
    """The directory they are kept in, one each. Every method raises RecordError with path and cause."""

    directory: Path

    def prepare_snapshot(
        self, run: str, boot_id: str, release: str, generation: Generation, bounds: config.SnapshotsSettings
    ) -> None:
        """Make room for the snapshot of this run, before the blackout; the oldest ones go beyond `bounds`.

        What is made is durable, so that no loss of power later leaves a tree of which nothing is known.
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
        """Keep the outgoing tree: `blobs/NAME` and then `root`, as the kernel showed them."""
        place = self._snapshot_path(run)
        try:
            files.write_tree(place, tree)
        except OSError as error:
            raise _unwritable_error(error, place) from error

    def read_tree(self, run: str) -> Tree | None:
        """The tree of this run, None where none was kept."""
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
        """The tree that left last: none that was taken in the boot `boot_id`, unless there are no others."""
        taken = self._taken_entries()
        left = (entry for entry in taken if not boot_id or entry.about.get("boot_id") != boot_id)
        newest = next(left, next(iter(taken), None))
        return None if newest is None else self.read_tree(newest.path.name)

    def list_snapshots(self) -> list[Snapshot]:
        """Describe each, the newest first; then, with `run` empty, what else is there and is no snapshot."""
        entries, strangers = self._examine_or_raise()
        rests = [entry for entry in entries if entry.written_ns is None and entry.wrong]
        strangers += [(entry.path.name, f"the rest of a snapshot: {'; '.join(entry.wrong)}") for entry in rests]
        found = [described for entry in _newest_first(entries) if (described := _describe_entry(entry))]
        found += [_describe_stranger(self.directory / name, what) for name, what in strangers[:MAX_STRANGERS_LISTED]]
        if (more := len(strangers) - MAX_STRANGERS_LISTED) > 0:
            found.append(_describe_stranger(self.directory / f"{more} more", "not snapshots either"))
        return found

    def _taken_entries(self) -> list[SnapshotEntry]:
        """The entries that have a tree, the newest first."""
        return _newest_first(self._examine_or_raise()[0])

    def _examine_or_raise(self) -> tuple[list[SnapshotEntry], list[tuple[str, str]]]:
        try:
            return self._examine_entries()
        except OSError as error:
            raise RecordError(
                f"The snapshots cannot be listed: {errno_text(error)}", where=str(self.directory)
            ) from error

    def _examine_entries(self) -> tuple[list[SnapshotEntry], list[tuple[str, str]]]:
        """Every entry that is khod's, and by name the others with what they are; OSError for the directory alone."""
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
        """Leave room for one more within the bounds; what was never written goes, too."""
        room, size, kept = bounds.keep - 1, 0, set[Path]()
        for entry in _newest_first(entries):
            size += entry.size
            if len(kept) < room and size <= bounds.max_bytes:
                kept.add(entry.path)
        for entry in entries:
            if entry.path not in kept:
                files.remove_snapshot(entry.path)

    def _vacate_place(self, place: Path) -> None:
        """Clear the name of this run: an earlier snapshot of it goes, anything else there is put aside."""
        with suppress(FileNotFoundError):
            if isinstance(files.examine_entry(place), SnapshotEntry):
                files.remove_snapshot(place)
            if os.path.lexists(place):
                place.rename(self.directory / f"{place.name}.{uuid.uuid4().hex}.aside")

    def _make_directory(self, place: Path, about: dict[str, str], sequence: int) -> None:
        """Make the directory under a name of its own and give it its name in one step, durably."""
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
    """Those that have a tree: by their number, those without one (of an earlier khod) last."""
    return sorted((e for e in entries if e.written_ns is not None), key=lambda entry: entry.sort_key, reverse=True)


def _describe_entry(entry: SnapshotEntry) -> Snapshot | None:
    """Put a snapshot in the model's words; None where it was removed meanwhile."""
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
    """What lies in the directory and is no snapshot: it has no run, and is left as it is."""
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
