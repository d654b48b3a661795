"""The state trees that left, kept beside the record: raw bytes, whose they were, and their digest.

Inside the blackout a snapshot costs its write and no more: what is known of it before stands in its directory
before, and the digest is made by whoever asks first.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from khod import config
from khod.errors import RecordError, UsageError, errno_text
from khod.kernel.protocol import Tree
from khod.model import Generation, Snapshot

ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""A snapshot is named as the run that took it."""
ABOUT, ROOT, BLOBS, DIGEST = "about.json", "root", "blobs", "sha256"


@dataclass(frozen=True)
class Snapshots:
    """The directory they are kept in, one each. Every method raises RecordError with path and cause."""

    directory: Path

    def prepare(self, run: str, boot_id: str, release: str, generation: Generation, bounds: config.Snapshots) -> None:
        """Make room for the snapshot of this run, before the blackout; the oldest ones go beyond `bounds`."""
        place = self._place(run)
        try:
            self._prune(bounds)
            if place.exists():
                shutil.rmtree(place)
            (place / BLOBS).mkdir(parents=True, mode=0o700)
            about = {"boot_id": boot_id, "release": release, "generation": generation.name}
            (place / ABOUT).write_text(json.dumps(about) + "\n")
        except OSError as error:
            raise _unwritable(error, place) from error

    def write(self, run: str, tree: Tree) -> None:
        """Keep the outgoing tree: `blobs/NAME` and then `root`, as the kernel showed them."""
        place = self._place(run)
        try:
            for name, blob in tree.blobs.items():
                (place / BLOBS / name).write_bytes(blob)
            (place / ROOT).write_bytes(tree.root)
        except OSError as error:
            raise _unwritable(error, place) from error

    def read(self, run: str) -> Tree | None:
        """The tree of this run, None where none was kept."""
        place = self._place(run)
        try:
            blobs = {path.name: path.read_bytes() for path in sorted((place / BLOBS).iterdir())}
            return Tree((place / ROOT).read_bytes(), blobs)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RecordError(f"The snapshot cannot be read: {errno_text(error)}", where=str(place)) from error

    def last(self, boot_id: str = "") -> Tree | None:
        """The tree that left last: none that was taken in the boot `boot_id`, unless there are no others."""
        taken = list(self._taken())
        left = (place for place in taken if not boot_id or _about(place).get("boot_id") != boot_id)
        newest = next(left, next(iter(taken), None))
        return None if newest is None else self.read(newest.name)

    def known(self) -> list[Snapshot]:
        """Describe each, the newest first."""
        try:
            return [_described(place) for place in self._taken()]
        except OSError as error:
            raise RecordError(f"A snapshot cannot be read: {errno_text(error)}", where=str(self.directory)) from error

    def _taken(self) -> Iterator[Path]:
        """The directories that have a tree, the newest first."""
        found = [place for place in self._all() if (place / ROOT).exists()]
        return iter(sorted(found, key=lambda place: (place / ROOT).stat().st_mtime_ns, reverse=True))

    def _all(self) -> list[Path]:
        return [place for place in self.directory.glob("*") if ID.fullmatch(place.name)]

    def _prune(self, bounds: config.Snapshots) -> None:
        """Leave room for one more within the bounds; what was never written goes, too."""
        room, size, kept = bounds.keep - 1, 0, set[Path]()
        for place in self._taken():
            size += sum(len(blob) for blob in _blobs(place).values())
            if len(kept) < room and size <= bounds.max_bytes:
                kept.add(place)
        for place in self._all():
            if place not in kept:
                shutil.rmtree(place)

    def _place(self, run: str) -> Path:
        if not ID.fullmatch(run):
            raise UsageError(
                f"{run!r} names no state tree",
                where="TREE",
                remedy="One of out, in, snapshot, or an id of: khoctl dt list",
            )
        return self.directory / run


def _described(place: Path) -> Snapshot:
    blobs = _blobs(place)
    about = _about(place)
    generation = about.get("generation", "")
    return Snapshot(
        id=place.name,
        run=place.name,
        taken_at=(place / ROOT).stat().st_mtime,
        boot_id=str(about.get("boot_id", "")),
        release=str(about.get("release", "")),
        generation=Generation[generation] if generation in Generation.__members__ else Generation.none,
        bytes=sum(len(blob) for blob in blobs.values()),
        blobs=[name for name in blobs if name],
        digest=_digest(place, blobs),
    )


def _about(place: Path) -> dict[str, Any]:
    with suppress(ValueError, FileNotFoundError):  # a power cut may have taken it; the tree counts all the same
        found = json.loads((place / ABOUT).read_text())
        return found if isinstance(found, dict) else {}
    return {}


def _blobs(place: Path) -> dict[str, bytes]:
    names = sorted((place / BLOBS).iterdir())
    return {"": (place / ROOT).read_bytes(), **{path.name: path.read_bytes() for path in names}}


def _digest(place: Path, blobs: dict[str, bytes]) -> str:
    """The digest as it was made first: bytes that have changed since show in it."""
    kept = place / DIGEST
    if kept.exists():
        return kept.read_text().strip()
    made = hashlib.sha256()
    for blob in blobs.values():
        made.update(blob)
    kept.write_text(f"{made.hexdigest()}\n")
    return made.hexdigest()


def _unwritable(error: OSError, path: Path) -> RecordError:
    return RecordError(
        f"The snapshot cannot be written: {errno_text(error)}",
        where=str(path),
        remedy="Make room or mount the file system writable; the kernel was not touched since.",
    )
