# SPDX-License-Identifier: LGPL-2.1-or-later
"""The state trees that left: as they were, by their run, and no more of them than asked for."""

import errno
import hashlib
import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from khoctl.commands import dt
from khod.abi.calls import HostCalls
from khod.config import SnapshotsSettings as Bounds
from khod.errors import RecordError, UsageError
from khod.handover.snapshots import MAX_STRANGERS_LISTED, Snapshots
from khod.kernel.protocol import Tree
from khod.kernel.sysfs import SysfsKho
from khod.model import Generation
from tests.unit.harness import Host
from tests.unit.trees import PAGE, ftrace, mem

TREES = [Tree(b"root"), Tree(b"root", {"LUO": b"", "kexec-metadata": os.urandom(5000), "memblock": b"\0\1"})]


@pytest.fixture
def kept(tmp_path: Path) -> Snapshots:
    return Snapshots(tmp_path / "snapshots")


def keep(kept: Snapshots, run: str, tree: Tree, at: int, bounds: Bounds | None = None) -> None:
    """Keep a tree as of `at`, in seconds since the epoch."""
    kept.prepare_snapshot(run, "boot", "7.3.4", Generation.stateless, bounds or Bounds())
    kept.write_tree(run, tree)
    os.utime(kept.directory / run / "root", (at, at))


@pytest.mark.parametrize("tree", TREES)
def test_a_snapshot_comes_back_as_it_was(kept: Snapshots, tree: Tree) -> None:
    keep(kept, "r1", tree, 1)
    assert kept.read_tree("r1") == kept.last_tree() == tree


def test_a_snapshot_holds_nothing_of_an_earlier_one_of_its_run(kept: Snapshots) -> None:
    for tree in reversed(TREES):
        keep(kept, "r1", tree, 1)
        assert kept.read_tree("r1") == tree


def test_each_is_described(kept: Snapshots) -> None:
    for number, tree in enumerate(TREES):
        keep(kept, f"r{number}", tree, 1_700_000_000 + number)
    newest, oldest = kept.list_snapshots()
    blobs = TREES[1].blobs
    assert (newest.id, newest.run, newest.taken_at) == ("r1", "r1", 1_700_000_001)
    assert (newest.boot_id, newest.release, newest.generation) == ("boot", "7.3.4", Generation.stateless)
    assert newest.blobs == sorted(blobs)
    assert newest.bytes == len(b"root") + sum(map(len, blobs.values()))
    assert newest.digest == hashlib.sha256(b"root" + b"".join(blobs[name] for name in sorted(blobs))).hexdigest()
    assert oldest.id == "r0"


def test_a_digest_is_of_the_bytes_that_were_first_there(kept: Snapshots) -> None:
    keep(kept, "r1", TREES[0], 1)
    before = kept.list_snapshots()[0].digest
    (kept.directory / "r1/root").write_bytes(b"changed")
    assert kept.list_snapshots()[0].digest == before


def test_the_oldest_go_when_there_are_too_many(kept: Snapshots) -> None:
    for number in range(5):
        keep(kept, f"r{number}", TREES[0], number, Bounds(keep=3))
    assert [one.id for one in kept.list_snapshots()] == ["r4", "r3", "r2"]


def test_the_oldest_go_when_they_are_too_large(kept: Snapshots) -> None:
    for number in range(4):
        keep(kept, f"r{number}", Tree(bytes(1000)), number, Bounds(max_bytes=2500))
    assert [one.id for one in kept.list_snapshots()] == ["r3", "r2", "r1"], "two of those before, and the new one"


def test_one_that_was_prepared_and_never_taken_is_none(kept: Snapshots) -> None:
    keep(kept, "r1", TREES[0], 1)
    kept.prepare_snapshot("r2", "boot", "7.3.4", Generation.stateless, Bounds())
    assert kept.read_tree("r2") is None
    assert kept.last_tree() == TREES[0]
    assert [one.id for one in kept.list_snapshots()] == ["r1"]
    keep(kept, "r3", TREES[0], 3)
    assert not (kept.directory / "r2").exists()


@pytest.mark.parametrize("name", ["", ".", "..", "../../etc", "a/b", "a\0b", "x" * 65])
def test_a_name_never_leaves_the_directory(kept: Snapshots, name: str) -> None:
    with pytest.raises(UsageError):
        kept.read_tree(name)


def test_what_cannot_be_written_is_a_record_error_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    kept = Snapshots(tmp_path / "file")
    with pytest.raises(RecordError) as raised:
        kept.prepare_snapshot("r1", "b", "r", Generation.none, Bounds())
    assert str(tmp_path / "file") in raised.value.where
    with pytest.raises(RecordError) as raised:
        kept.write_tree("r1", Tree(b""))
    assert str(tmp_path / "file") in raised.value.where


def test_what_was_taken_in_this_boot_has_not_left_yet(kept: Snapshots) -> None:
    for number, (boot, tree) in enumerate([("before", TREES[0]), ("now", TREES[1])]):
        kept.prepare_snapshot(f"r{number}", boot, "7.3.4", Generation.stateless, Bounds())
        kept.write_tree(f"r{number}", tree)
        os.utime(kept.directory / f"r{number}/root", (number, number))
    assert kept.last_tree("now") == TREES[0]
    assert kept.last_tree("later") == TREES[1]
    shutil.rmtree(kept.directory / "r0")
    assert kept.last_tree("now") == TREES[1], "better than nothing"


def test_within_the_blackout_a_snapshot_is_one_copy(kept: Snapshots, tmp_path: Path) -> None:
    """10 MiB of v3 tree are read into one buffer, held against the format and written from there."""
    dt = tmp_path / "sys/kernel/kho/dt"
    dt.parent.mkdir(parents=True)
    dt.write_bytes(ftrace([mem((0, PAGE)) * 650_000]))
    kernel = SysfsKho(HostCalls(tmp_path))
    kept.prepare_snapshot("r1", "boot", "6.8", Generation.sysfs, Bounds())
    tracemalloc.start()
    try:
        kept.write_tree("r1", kernel.outgoing_tree())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (kept.directory / "r1/root").read_bytes() == dt.read_bytes()
    assert peak < dt.stat().st_size * 1.1


# Order: by the number each snapshot gets, whatever the wall clock says.


def ids(kept: Snapshots) -> list[str]:
    return [one.id for one in kept.list_snapshots() if one.run]


def removed(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Put something else in the place of one of a snapshot's files."""

    def replace_file(place: Path) -> None:
        removed(place / name)
        make(place / name)

    return replace_file


def without_number(place: Path) -> None:
    """Make it look as an earlier khod left it."""
    about = json.loads((place / "about.json").read_text())
    (place / "about.json").write_text(json.dumps({name: about[name] for name in ("boot_id", "release", "generation")}))
    (place / "sequence").unlink()


def test_a_clock_that_was_set_back_changes_neither_the_last_nor_what_is_pruned(kept: Snapshots) -> None:
    keep(kept, "one", Tree(b"one"), 2_000_000_000, Bounds(keep=2))
    keep(kept, "two", Tree(b"two"), 1_000_000, Bounds(keep=2))
    assert kept.last_tree() == Tree(b"two")
    assert ids(kept) == ["two", "one"]
    keep(kept, "three", Tree(b"three"), 500_000, Bounds(keep=2))
    assert ids(kept) == ["three", "two"]


def test_times_that_no_calendar_has_are_listed_all_the_same(kept: Snapshots) -> None:
    keep(kept, "one", Tree(b"one"), 0)
    item = kept.list_snapshots()[0]
    for seconds in (1e12, -1e12, float("nan"), float("inf")):
        assert any("  ?  " in line for line in dt._snapshot_table([replace(item, taken_at=seconds)]))
    assert any("1970-01-01 00:00:00" in line for line in dt._snapshot_table([item]))


def test_an_id_that_is_used_again_is_the_newest(kept: Snapshots) -> None:
    for number, run in enumerate(("one", "two", "one")):
        keep(kept, run, Tree(run.encode()), 9 - number)
    assert ids(kept) == ["one", "two"]


def test_snapshots_of_an_earlier_khod_are_older_than_those_with_a_number(kept: Snapshots) -> None:
    for run, at in (("old", 4_000_000_000), ("older", 3_999_999_999), ("new", 1)):
        keep(kept, run, Tree(run.encode()), at)
    for run in ("old", "older"):
        without_number(kept.directory / run)
    assert ids(kept) == ["new", "old", "older"]
    assert kept.last_tree() == Tree(b"new")
    keep(kept, "newest", Tree(b"newest"), 0, Bounds(keep=3))
    assert ids(kept) == ["newest", "new", "old"]


DAMAGES: dict[str, Callable[[Path], object]] = {
    "about.json gone": lambda place: (place / "about.json").unlink(),
    "about.json empty": lambda place: (place / "about.json").write_text(""),
    "about.json cut": lambda place: (place / "about.json").write_text('{"sequence": 9'),
    "about.json a list": lambda place: (place / "about.json").write_text("[9]"),
    "about.json deep": lambda place: (place / "about.json").write_text("[" * 100_000),
    "about.json no text": lambda place: (place / "about.json").write_bytes(b"\xff\xfe"),
    "about.json a FIFO": replaced("about.json", os.mkfifo),
    "a number that is none": lambda place: (place / "about.json").write_text('{"sequence": "9"}'),
    "true": lambda place: (place / "about.json").write_text('{"sequence": true}'),
    "negative": lambda place: (place / "about.json").write_text('{"sequence": -9}'),
    "a float": lambda place: (place / "about.json").write_text('{"sequence": 9e99, "generation": ["x"]}'),
    "too large": lambda place: (place / "about.json").write_text('{"sequence": 1' + 99 * "0" + "}"),
    "sequence gone": lambda place: (place / "sequence").unlink(),
    "sequence empty": lambda place: (place / "sequence").write_text(""),
    "sequence no number": lambda place: (place / "sequence").write_text("\u0663"),
    "sequence a directory": replaced("sequence", Path.mkdir),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_one_place_of_the_number_is_enough(kept: Snapshots, name: str) -> None:
    for number, run in enumerate(("one", "two", "three")):
        keep(kept, run, Tree(run.encode()), 9 - number)
    DAMAGES[name](kept.directory / "three")
    assert kept.last_tree() == Tree(b"three")
    assert ids(kept) == ["three", "two", "one"]
    keep(kept, "four", Tree(b"four"), 0, Bounds(keep=3))
    assert ids(kept) == ["four", "three", "two"]


def test_a_loss_of_power_before_the_tree_leaves_what_is_no_snapshot(kept: Snapshots) -> None:
    keep(kept, "one", Tree(b"one"), 1)
    for name in ("two.abcd1234.new", "0123456789ab"):  # before anything was in it
        (kept.directory / name).mkdir()
    (kept.directory / "three.abcd1234.new/blobs").mkdir(parents=True)
    kept.prepare_snapshot("four", "boot", "7.3.4", Generation.stateless, Bounds())
    assert [one.id for one in kept.list_snapshots()] == ["one"]
    assert sorted(path.name for path in kept.directory.iterdir()) == ["four", "one"]


@pytest.mark.parametrize("gone", ["root", "blobs", "about.json", "sequence", "sha256"])
def test_a_removal_that_was_cut_short_ends_with_the_next_prune(kept: Snapshots, gone: str) -> None:
    for run in ("one", "two"):
        keep(kept, run, TREES[1], 1)
    kept.list_snapshots()  # which makes the digests
    removed(kept.directory / "one" / gone)
    keep(kept, "three", TREES[0], 1, Bounds(keep=2))
    assert sorted(path.name for path in kept.directory.iterdir()) == ["three", "two"]


def test_a_tree_that_is_removed_while_it_is_listed_is_left_out(
    kept: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    for run in ("one", "two"):
        keep(kept, run, TREES[1], 1)
    listed = os.listdir

    def vanishing(path: Path | str) -> list[str]:
        found = listed(path)
        if Path(path) == kept.directory / "one" / "blobs":
            shutil.rmtree(kept.directory / "one")
        return found

    monkeypatch.setattr(os, "listdir", vanishing)
    assert ids(kept) in (["two"], ["two", "one"])
    assert ids(kept) == ["two"]


# What else may lie there.

STRANGERS: dict[str, Callable[[Path], object]] = {
    "a file": lambda place: place.write_text("kept for the post-mortem"),
    "a link to a snapshot": lambda place: place.symlink_to("one"),
    "a link to a file": lambda place: place.symlink_to("/etc/hostname"),
    "a link to /": lambda place: place.symlink_to("/"),
    "a link to itself": lambda place: place.symlink_to(place.name),
    "a link to nowhere": lambda place: place.symlink_to("nowhere"),
    "a FIFO": os.mkfifo,
    "a directory": lambda place: (place / "deep").mkdir(parents=True),
    "an empty directory": lambda place: place.mkdir(),
    "a copy of a snapshot": lambda place: shutil.copytree(place.parent / "one", place),
}


@pytest.mark.parametrize("name", ["mine", "lost+found", ".hidden", "x" * 65, "a b", "two.old", "abc.x.new"])
@pytest.mark.parametrize("what", STRANGERS)
def test_a_stranger_is_never_followed_or_removed_and_is_named(kept: Snapshots, what: str, name: str) -> None:
    keep(kept, "one", TREES[1], 1)
    place = kept.directory / name
    STRANGERS[what](place)
    before = tuple(place.lstat())[:7]
    for run in ("two", "three"):
        keep(kept, run, TREES[0], 1, Bounds(keep=2))
    if name == "abc.x.new" and what == "an empty directory":
        assert not place.exists(), "that is one of khod's, which a loss of power left"
        return
    assert tuple(place.lstat())[:7] == before
    found = kept.list_snapshots()
    assert [one.id for one in found] == ["three", "two", name]
    assert found[-1].wrong
    assert not found[-1].run
    assert any(name in line and found[-1].wrong in line for line in dt._snapshot_table(found))
    assert kept.last_tree() == TREES[0]


def test_what_belongs_to_another_user_is_left_alone(kept: Snapshots, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(kept, "one", TREES[1], 1)
    another = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: another)
    for run in ("two", "three"):
        keep(kept, run, TREES[0], 1, Bounds(keep=1))
    assert sorted(path.name for path in kept.directory.iterdir()) == ["one", "three", "two"]
    assert [one.wrong for one in kept.list_snapshots()] == 3 * [f"a directory of the user {os.getuid()}, not khod's"]


def test_what_is_not_khod_s_within_a_snapshot_outlives_it(kept: Snapshots, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("!")
    keep(kept, "one", TREES[1], 1)
    (kept.directory / "one/notes").write_text("look at this one")
    (kept.directory / "one/blobs/link").symlink_to(outside)
    (kept.directory / "one/elsewhere").symlink_to(outside)
    assert "notes" in kept.list_snapshots()[0].wrong
    for run in ("two", "three"):
        keep(kept, run, TREES[0], 1, Bounds(keep=1))
    assert (outside / "precious").read_text() == "!"
    assert sorted(path.name for path in (kept.directory / "one").iterdir()) == ["blobs", "elsewhere", "notes"]
    named = {one.id: one.wrong for one in kept.list_snapshots()}
    assert list(named) == ["three", "one"]
    assert "notes" in named["one"]


UNREADABLE: dict[str, Callable[[Path], object]] = {
    "blobs/ is missing": lambda place: shutil.rmtree(place / "blobs"),
    "blobs/ is a symbolic link": replaced("blobs", lambda path: path.symlink_to("../one/blobs")),
    "blobs/ is a regular file": replaced("blobs", Path.touch),
    "blobs/pipe is a FIFO": lambda place: os.mkfifo(place / "blobs/pipe"),
    "blobs/link is a symbolic link": lambda place: (place / "blobs/link").symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("wrong", UNREADABLE)
def test_a_damaged_snapshot_is_named_and_hinders_nothing(kept: Snapshots, wrong: str) -> None:
    for run in ("one", "two"):
        keep(kept, run, TREES[1], 1)
    UNREADABLE[wrong](kept.directory / "two")
    assert wrong in {one.id: one.wrong for one in kept.list_snapshots()}["two"]
    with pytest.raises(RecordError, match=wrong):
        kept.read_tree("two")
    with pytest.raises(RecordError, match=wrong):
        kept.last_tree()
    assert kept.read_tree("one") == TREES[1]
    keep(kept, "three", TREES[0], 1)
    assert kept.last_tree() == TREES[0]


def test_a_root_that_is_no_file_is_no_snapshot(kept: Snapshots) -> None:
    for run in ("one", "two"):
        keep(kept, run, TREES[1], 1)
    (kept.directory / "two/root").unlink()
    (kept.directory / "two/root").symlink_to("/dev/zero")
    assert kept.last_tree() == TREES[1]
    assert {one.id: one.wrong for one in kept.list_snapshots()}["two"].endswith("root is a symbolic link")
    with pytest.raises(RecordError, match="root is a symbolic link"):
        kept.read_tree("two")


def test_a_link_in_the_place_of_a_snapshot_is_put_aside(kept: Snapshots) -> None:
    keep(kept, "one", TREES[1], 1)
    (kept.directory / "two").symlink_to("one")
    with pytest.raises(RecordError, match="a symbolic link"):
        kept.read_tree("two")
    keep(kept, "two", TREES[0], 1)
    assert (kept.read_tree("two"), kept.read_tree("one")) == (TREES[0], TREES[1])
    aside = next(one for one in kept.list_snapshots() if not one.run)
    assert (kept.directory / aside.id).readlink() == Path("one")
    assert "put aside by khod" in aside.wrong


ODD_NAMES = ["", ".", "..", "a/b", "../../../escaped", "/etc/passwd", "nul\0in it", "%0", "%", "x" * 256, "\udc80",
             "\ud800", "new\nline", "\x1b[2J", "-rf", "\u202e", "e\u0301", "\u00e9", "NUL", "root"]  # fmt: skip


def test_blobs_of_any_name_come_back_under_it(kept: Snapshots, tmp_path: Path) -> None:
    tree = Tree(b"root", {name: ascii(name).encode() for name in ODD_NAMES})
    keep(kept, "one", tree, 1)
    assert kept.read_tree("one") == tree
    assert sorted(path.name for path in tmp_path.iterdir()) == ["snapshots"]
    (found,) = kept.list_snapshots()
    assert (sorted(found.blobs), found.wrong) == (sorted(ODD_NAMES), "")
    assert all(line.isprintable() for line in dt._snapshot_table([found]))
    keep(kept, "two", Tree(b""), 1, Bounds(keep=1))
    assert [path.name for path in kept.directory.iterdir()] == ["two"]


def test_a_directory_full_of_strangers_is_named_in_part(kept: Snapshots) -> None:
    keep(kept, "one", TREES[0], 1)
    for number in range(1000):
        (kept.directory / f"{number:04}").write_text("")
    keep(kept, "two", TREES[0], 1)
    found = kept.list_snapshots()
    assert [one.id for one in found if one.run] == ["two", "one"]
    assert len(found) == 2 + MAX_STRANGERS_LISTED + 1
    assert found[-1].id == f"{1000 - MAX_STRANGERS_LISTED} more"


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "Free some space"), (errno.EDQUOT, "quota"), (errno.EROFS, "writable"), (errno.EIO, "kernel log")],
)
def test_what_refuses_says_truly_why(
    kept: Snapshots, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    def full(_fd: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RecordError, match=errno.errorcode[number]) as raised:
        kept.prepare_snapshot("one", "boot", "7.3.4", Generation.stateless, Bounds())
    assert remedy in raised.value.remedy
    assert ("Free some space" in raised.value.remedy) is (number in (errno.ENOSPC, errno.EDQUOT))
    assert list(kept.directory.iterdir()) == [], "what was begun is removed"


async def test_a_snapshot_that_is_removed_by_hand_while_prepared_is_made_again(kept: Snapshots) -> None:
    kept.prepare_snapshot("one", "boot", "7.3.4", Generation.stateless, Bounds())
    shutil.rmtree(kept.directory)
    kept.write_tree("one", TREES[1])
    assert kept.last_tree() == TREES[1]


@pytest.mark.parametrize("what", ["a file", "a link", "blobs/ gone", "a FIFO", "unreadable"])
async def test_no_stranger_refuses_a_handover(host: Host, what: str) -> None:
    engine = await host.started()
    await engine.activate()
    await engine.abort()
    kept = host.store.directory / "snapshots"
    first = next(kept.iterdir())
    match what:
        case "a file":
            (kept / "notes").write_text("kept for the post-mortem")
        case "a link":
            (kept / "last").symlink_to(first.name)
        case "blobs/ gone":
            shutil.rmtree(first / "blobs")
        case "a FIFO":
            os.mkfifo(kept / "pipe")
        case _:
            (first / "about.json").write_bytes(b"\0" * 64)
    await engine.activate()
    assert any(one.wrong for one in await engine.queries.snapshots())
    await engine.abort()
