"""The state trees that left: as they were, by their run, and no more of them than asked for."""

import hashlib
import os
import shutil
import tracemalloc
from pathlib import Path

import pytest

from khod.abi.calls import HostCalls
from khod.config import Snapshots as Bounds
from khod.errors import RecordError, UsageError
from khod.kernel.protocol import Tree
from khod.kernel.sysfs import SysfsKho
from khod.model import Generation
from khod.snapshots import Snapshots
from tests.unit.trees import PAGE, ftrace, mem

TREES = [Tree(b"root"), Tree(b"root", {"LUO": b"", "kexec-metadata": os.urandom(5000), "memblock": b"\0\1"})]


@pytest.fixture
def kept(tmp_path: Path) -> Snapshots:
    return Snapshots(tmp_path / "snapshots")


def keep(kept: Snapshots, run: str, tree: Tree, at: int, bounds: Bounds | None = None) -> None:
    """Keep a tree as of `at`, in seconds since the epoch."""
    kept.prepare(run, "boot", "7.3.4", Generation.stateless, bounds or Bounds())
    kept.write(run, tree)
    os.utime(kept.directory / run / "root", (at, at))


@pytest.mark.parametrize("tree", TREES)
def test_a_snapshot_comes_back_as_it_was(kept: Snapshots, tree: Tree) -> None:
    keep(kept, "r1", tree, 1)
    assert kept.read("r1") == kept.last() == tree


def test_a_snapshot_holds_nothing_of_an_earlier_one_of_its_run(kept: Snapshots) -> None:
    for tree in reversed(TREES):
        keep(kept, "r1", tree, 1)
        assert kept.read("r1") == tree


def test_each_is_described(kept: Snapshots) -> None:
    for number, tree in enumerate(TREES):
        keep(kept, f"r{number}", tree, 1_700_000_000 + number)
    newest, oldest = kept.known()
    blobs = TREES[1].blobs
    assert (newest.id, newest.run, newest.taken_at) == ("r1", "r1", 1_700_000_001)
    assert (newest.boot_id, newest.release, newest.generation) == ("boot", "7.3.4", Generation.stateless)
    assert newest.blobs == sorted(blobs)
    assert newest.bytes == len(b"root") + sum(map(len, blobs.values()))
    assert newest.digest == hashlib.sha256(b"root" + b"".join(blobs[name] for name in sorted(blobs))).hexdigest()
    assert oldest.id == "r0"


def test_a_digest_is_of_the_bytes_that_were_first_there(kept: Snapshots) -> None:
    keep(kept, "r1", TREES[0], 1)
    before = kept.known()[0].digest
    (kept.directory / "r1/root").write_bytes(b"changed")
    assert kept.known()[0].digest == before


def test_the_oldest_go_when_there_are_too_many(kept: Snapshots) -> None:
    for number in range(5):
        keep(kept, f"r{number}", TREES[0], number, Bounds(keep=3))
    assert [one.id for one in kept.known()] == ["r4", "r3", "r2"]


def test_the_oldest_go_when_they_are_too_large(kept: Snapshots) -> None:
    for number in range(4):
        keep(kept, f"r{number}", Tree(bytes(1000)), number, Bounds(max_bytes=2500))
    assert [one.id for one in kept.known()] == ["r3", "r2", "r1"], "two of those before, and the new one"


def test_one_that_was_prepared_and_never_taken_is_none(kept: Snapshots) -> None:
    keep(kept, "r1", TREES[0], 1)
    kept.prepare("r2", "boot", "7.3.4", Generation.stateless, Bounds())
    assert kept.read("r2") is None
    assert kept.last() == TREES[0]
    assert [one.id for one in kept.known()] == ["r1"]
    keep(kept, "r3", TREES[0], 3)
    assert not (kept.directory / "r2").exists()


@pytest.mark.parametrize("name", ["", ".", "..", "../../etc", "a/b", "a\0b", "x" * 65])
def test_a_name_never_leaves_the_directory(kept: Snapshots, name: str) -> None:
    with pytest.raises(UsageError):
        kept.read(name)


def test_what_cannot_be_written_is_a_record_error_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    kept = Snapshots(tmp_path / "file")
    with pytest.raises(RecordError) as raised:
        kept.prepare("r1", "b", "r", Generation.none, Bounds())
    assert str(tmp_path / "file") in raised.value.where
    with pytest.raises(RecordError) as raised:
        kept.write("r1", Tree(b""))
    assert str(tmp_path / "file") in raised.value.where


def test_what_was_taken_in_this_boot_has_not_left_yet(kept: Snapshots) -> None:
    for number, (boot, tree) in enumerate([("before", TREES[0]), ("now", TREES[1])]):
        kept.prepare(f"r{number}", boot, "7.3.4", Generation.stateless, Bounds())
        kept.write(f"r{number}", tree)
        os.utime(kept.directory / f"r{number}/root", (number, number))
    assert kept.last("now") == TREES[0]
    assert kept.last("later") == TREES[1]
    shutil.rmtree(kept.directory / "r0")
    assert kept.last("now") == TREES[1], "better than nothing"


def test_within_the_blackout_a_snapshot_is_one_copy(kept: Snapshots, tmp_path: Path) -> None:
    """10 MiB of v3 tree are read into one buffer, held against the format and written from there."""
    dt = tmp_path / "sys/kernel/kho/dt"
    dt.parent.mkdir(parents=True)
    dt.write_bytes(ftrace([mem((0, PAGE)) * 650_000]))
    kernel = SysfsKho(HostCalls(tmp_path))
    kept.prepare("r1", "boot", "6.8", Generation.sysfs, Bounds())
    tracemalloc.start()
    try:
        kept.write("r1", kernel.tree())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (kept.directory / "r1/root").read_bytes() == dt.read_bytes()
    assert peak < dt.stat().st_size * 1.1
