# SPDX-License-Identifier: LGPL-2.1-or-later
"""A file in memory is sealed although something holds its pages for a while, as what moves memory does."""

import errno
import fcntl
import os
import threading
from collections.abc import Iterator

import pytest

from khod.abi import memfd
from khod.abi.memfd import SEALS, seal_memfd
from khod.errors import Refused
from khod.images import sealed

LONGER_THAN_THE_KERNEL_WAITS = 0.5


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, bytes(8192))
    yield fd
    os.close(fd)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def pin_page(fd: int, pipe: tuple[int, int]) -> None:
    """Hold the first page of a file until the pipe is read."""
    assert os.splice(fd, pipe[1], 4096, offset_src=0) == 4096


def test_it_is_sealed_once_its_pages_are_let_go(fd: int, pipe: tuple[int, int]) -> None:
    pin_page(fd, pipe)
    with pytest.raises(OSError, match="busy"):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    letting_go = threading.Timer(LONGER_THAN_THE_KERNEL_WAITS, os.read, [pipe[0], 4096])
    letting_go.start()
    seal_memfd(fd)
    letting_go.join()
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == SEALS


def test_one_whose_pages_are_never_let_go_is_not(
    fd: int, pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memfd, "PINNED_SECONDS", LONGER_THAN_THE_KERNEL_WAITS)
    pin_page(fd, pipe)
    with pytest.raises(OSError, match="busy") as raised:
        seal_memfd(fd)
    assert raised.value.errno == errno.EBUSY
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == 0


def test_another_error_is_not_waited_for(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)
    with pytest.raises(PermissionError):
        seal_memfd(fd)


def test_an_image_whose_copy_cannot_be_sealed_is_refused(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    create = os.memfd_create

    def note(name: str, flags: int) -> int:
        made.append(create(name, flags))
        return made[-1]

    def pieces() -> Iterator[bytes]:
        yield bytes(8192)
        pin_page(made[0], pipe)

    monkeypatch.setattr(memfd, "PINNED_SECONDS", 0.0)
    monkeypatch.setattr(os, "memfd_create", note)
    with pytest.raises(Refused) as raised:
        sealed.seal_pieces(pieces(), "/boot/vmlinuz")
    assert "/boot/vmlinuz" in str(raised.value)
    assert "busy" in str(raised.value)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(made[0])
