# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which file systems are frozen for the jump, in which order, and that each is thawed whatever happens."""

import errno
import os
import threading
from pathlib import Path

import pytest

from khod.abi.calls import HostCalls
from khod.kernel.filesystems import FrozenFileSystems, list_filesystems, parse_mounts

MOUNTINFO = """\
22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
23 22 0:21 / /proc rw - proc proc rw
24 22 254:2 / /srv/a\\040b rw - xfs /dev/vdb rw
25 22 254:1 /etc /run/bind ro - ext4 /dev/vda1 rw
26 22 254:3 / /mnt/ro ro - ext4 /dev/vdc ro
27 22 0:40 / /net rw - nfs4 server:/export rw
28 22 0:41 / /data rw - btrfs /dev/vdd rw
29 22 7:0 / /loop rw - ext4 /dev/loop0 rw
30 22 254:9 / /ntfs rw - fuseblk /dev/vde rw
31 22 0:42 / /vm rw - virtiofs tag rw
broken
"""
FROZEN = ["/loop", "/data", "/srv/a b", "/"]


class Calls(HostCalls):
    """A kernel that notes what is frozen; `fails` has the errno for a path."""

    def __init__(self, root: Path, mountinfo: str = MOUNTINFO) -> None:
        super().__init__(root)
        (root / "proc/self").mkdir(parents=True)
        (root / "proc/self/mountinfo").write_text(mountinfo)
        self.frozen: list[str] = []
        self.thawed: list[str] = []
        self.fails: dict[str, int] = {}
        self.note = root / "run/note"
        self.noted: list[list[str]] = []

    def freeze_filesystem(self, path: str) -> None:
        self.noted.append(self.note.read_text().splitlines())
        if number := self.fails.get(path):
            raise OSError(number, os.strerror(number), path)
        self.frozen.append(path)

    def thaw_filesystem(self, path: str) -> None:
        if path not in self.frozen:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
        self.frozen.remove(path)
        self.thawed.append(path)


@pytest.fixture
def calls(tmp_path: Path) -> Calls:
    return Calls(tmp_path)


def guarded(calls: Calls) -> FrozenFileSystems:
    found = FrozenFileSystems(calls, calls.note)
    found.is_guarded = True
    return found


def test_local_writable_file_systems_are_frozen_once_the_newest_first_and_the_root_last() -> None:
    assert [mount.path for mount in list_filesystems(parse_mounts(MOUNTINFO))] == FROZEN


def test_each_is_noted_before_it_is_frozen_and_thawed_the_root_first(calls: Calls) -> None:
    filesystems = guarded(calls)
    filesystems.freeze_all(threading.Event())
    assert calls.frozen == FROZEN
    assert calls.noted == [FROZEN[:count] for count in range(1, 5)]
    FrozenFileSystems(calls, calls.note).thaw_all()  # the next khod's, after this one was killed
    assert calls.thawed == FROZEN[::-1]
    assert not calls.note.exists()
    FrozenFileSystems(calls, calls.note).thaw_all()


def test_a_kind_that_cannot_be_frozen_is_passed_over(calls: Calls) -> None:
    calls.fails["/data"] = errno.EOPNOTSUPP
    guarded(calls).freeze_all(threading.Event())
    assert calls.frozen == ["/loop", "/srv/a b", "/"]


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EIO])
def test_one_that_fails_thaws_the_others_and_is_named(calls: Calls, number: int) -> None:
    calls.fails["/srv/a b"] = number
    with pytest.raises(OSError, match="/srv/a b") as raised:
        guarded(calls).freeze_all(threading.Event())
    assert raised.value.errno == number
    assert calls.frozen == []
    assert "/srv/a b" not in calls.thawed, "another program has frozen it"


def test_a_freeze_that_is_given_up_leaves_none_frozen(calls: Calls) -> None:
    given_up = threading.Event()
    given_up.set()
    with pytest.raises(OSError, match="FIFREEZE") as raised:
        guarded(calls).freeze_all(given_up)
    assert raised.value.errno == errno.ECANCELED
    assert calls.frozen == []


def test_without_a_note_or_a_guard_nothing_is_frozen(calls: Calls) -> None:
    FrozenFileSystems(calls, None).freeze_all(threading.Event())
    FrozenFileSystems(calls, calls.note).freeze_all(threading.Event())
    assert calls.frozen == []


def test_what_the_kernel_refuses_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=str(tmp_path)) as raised:
        HostCalls().thaw_filesystem(str(tmp_path))
    assert raised.value.errno in (errno.EINVAL, errno.EPERM, errno.ENOTTY, errno.EOPNOTSUPP)
