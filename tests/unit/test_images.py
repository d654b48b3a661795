# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files taken once into a sealed memfd; every kind of file that is none; several made one."""

import fcntl
import gc
import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from khod import files
from khod.errors import Exit, KhoError, Refused, UsageError
from khod.images import sealed
from khod.images.sealed import Sealed
from tests.unit.images import bzimage
from tests.unit.khods import NOBODY

LIMIT = 1 << 30


@contextmanager
def taken(path: Path, role: str = "image", limit: int = LIMIT) -> Iterator[Sealed]:
    fd = files.open_regular(str(path), role)
    try:
        with sealed.seal_file(fd, role, str(path), limit) as image:
            yield image
    finally:
        os.close(fd)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file"


def test_what_was_checked_is_what_gets_loaded(path: Path) -> None:
    path.write_bytes(bzimage())
    with taken(path) as image:
        path.write_bytes(b"changed behind our back")
        assert os.pread(image.fd, image.size, 0) == bzimage()
        assert image.sha256 == hashlib.sha256(bzimage()).hexdigest()
        for change in (lambda: os.pwrite(image.fd, b"x", 0), lambda: os.ftruncate(image.fd, 0)):
            with pytest.raises(PermissionError):
                change()
        with pytest.raises(PermissionError):
            fcntl.fcntl(image.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        assert fcntl.fcntl(image.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC


def test_the_offset_of_the_given_descriptor_does_not_matter(path: Path) -> None:
    path.write_bytes(bzimage())
    with path.open("rb") as file:
        file.seek(1000)
        with sealed.seal_file(file.fileno(), "image", "x", LIMIT) as image:
            assert image.size == len(bzimage())
        assert file.tell() == 1000


def test_nothing_is_left_open(path: Path) -> None:
    gc.collect()  # earlier tests' files are not to be closed meanwhile
    before = len(os.listdir("/proc/self/fd"))
    path.write_bytes(bzimage())
    with taken(path):
        pass
    for limit in (1, 100):
        with pytest.raises(Refused), taken(path, limit=limit):
            pass
    path.write_bytes(b"")
    with pytest.raises(Refused), taken(path):
        pass
    assert len(os.listdir("/proc/self/fd")) == before


def test_every_kind_of_file_that_is_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "directory").mkdir()
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
    names = ["fifo", "directory", "socket", "nowhere", "nul\0in it", "n" * 300, "/dev/zero", "/dev/null", ""]
    for name in names:
        with pytest.raises(UsageError) as raised:
            files.open_regular(str(tmp_path / name) if name else "", "image")
        assert raised.value.exit is Exit.usage
        assert "image" in raised.value.what
        assert "\0" not in str(raised.value)
        assert raised.value.remedy


def test_a_file_that_may_not_be_read(path: Path) -> None:
    path.write_bytes(bzimage())
    path.chmod(0)
    os.seteuid(NOBODY)
    try:
        with pytest.raises(UsageError, match="EACCES"):
            files.open_regular(str(path), "image")
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_PATH])
def test_a_descriptor_that_cannot_be_read(path: Path, flags: int) -> None:
    path.write_bytes(bzimage())
    fd = os.open(path, flags)
    with pytest.raises(KhoError, match="EBADF"):
        sealed.seal_file(fd, "image", "x", LIMIT)
    os.close(fd)


def test_the_bound_holds_by_size_and_by_what_is_read(path: Path) -> None:
    path.write_bytes(bytes(1001))
    with taken(path, limit=1001) as image:
        assert image.size == 1001
    with pytest.raises(Refused, match="max_size"), taken(path, limit=1000):
        pass


def test_initrds_are_joined_in_order_each_at_four_bytes(path: Path) -> None:
    parts = []
    for contents in (b"one12", b"two", b"four"):
        path.write_bytes(contents)
        fd = files.open_regular(str(path), "initrd")
        parts.append(sealed.seal_file(fd, "initrd", str(path), LIMIT))
        os.close(fd)
    with sealed.join_initrds(parts, "all") as joined:
        assert bytes(joined.view()) == b"one12\0\0\0two\0four"
        assert (joined.size, joined.name) == (16, "all")
        with pytest.raises(PermissionError):
            os.pwrite(joined.fd, b"x", 0)
    for part in parts:
        part.close()


def test_a_view_outlives_the_file(path: Path) -> None:
    path.write_bytes(bzimage())
    with taken(path) as image:
        view = image.view()
    assert bytes(view) == bzimage()
