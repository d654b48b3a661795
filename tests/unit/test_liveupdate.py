# SPDX-License-Identifier: LGPL-2.1-or-later
"""What reaches the kernel in an ioctl of /dev/liveupdate, and what never does. The device itself is the lab's."""

import errno
import fcntl
import gc
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from khod.abi import liveupdate
from khod.abi.calls import HostCalls

HEADER = """\
LIVEUPDATE_IOCTL_CREATE_SESSION 0xba00
LIVEUPDATE_IOCTL_RETRIEVE_SESSION 0xba01
LIVEUPDATE_SESSION_PRESERVE_FD 0xba40
LIVEUPDATE_SESSION_RETRIEVE_FD 0xba41
LIVEUPDATE_SESSION_FINISH 0xba42
LIVEUPDATE_SESSION_GET_NAME 0xba43
"""
"""What a C compiler makes of include/uapi/linux/liveupdate.h on x86-64."""


@pytest.fixture
def nothing() -> Iterator[int]:
    """A descriptor whose driver knows no ioctl: ENOTTY means that the call went as far as the kernel."""
    fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("line", HEADER.splitlines())
def test_numbers_are_the_headers(line: str) -> None:
    name, number = line.split()
    assert getattr(liveupdate, name) == int(number, 16)


def test_structs_are_laid_out_as_in_the_header() -> None:
    """Sizes are offsetof() and sizeof() in C: the kernel refuses a struct whose size field is another."""
    assert liveupdate.NAMED.size == 4 + 4 + 64
    assert liveupdate.TOKEN.size == 4 + 4 + 8
    assert liveupdate.FINISH.size == 4 + 4
    assert liveupdate.GET_NAME.size == 4 + 4 + 64
    packed = liveupdate.TOKEN.pack(16, -1, 2**64 - 1)
    assert packed == (16).to_bytes(4, "little") + b"\xff" * 12
    assert liveupdate.NAMED.pack(72, -1, b"ab") == (72).to_bytes(4, "little") + b"\xff" * 4 + b"ab" + bytes(62)


def refusal(function: Callable[..., object], *arguments: object) -> tuple[int | None, str]:
    """The errno of a call that must fail, and what its OSError says of it."""
    with pytest.raises(OSError, match=r"\S") as caught:
        function(*arguments)
    return caught.value.errno, caught.value.filename


def test_no_device_is_an_oserror_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "liveupdate"
    assert refusal(liveupdate.open_device, path) == (errno.ENOENT, f"open {path}")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("n" * 63, errno.ENOTTY),
        ("n" * 64, errno.ENAMETOOLONG),
        ("ü" * 32, errno.ENAMETOOLONG),  # 64 bytes
        ("two\0names", errno.EINVAL),
    ],
)
def test_a_name_that_would_be_cut_never_reaches_the_kernel(nothing: int, name: str, expected: int) -> None:
    assert refusal(liveupdate.create_session, nothing, name) == (expected, f"CREATE_SESSION({name!r})")
    assert refusal(liveupdate.retrieve_session, nothing, name) == (expected, f"RETRIEVE_SESSION({name!r})")


@pytest.mark.parametrize(
    ("token", "expected"), [(0, errno.ENOTTY), (2**64 - 1, errno.ENOTTY), (2**64, errno.EINVAL), (-1, errno.EINVAL)]
)
def test_a_token_has_64_bits(nothing: int, token: int, expected: int) -> None:
    arguments = f"session={nothing}, fd=7, token={token:#x}"
    assert refusal(liveupdate.preserve_fd, nothing, 7, token) == (expected, f"SESSION_PRESERVE_FD({arguments})")
    arguments = f"session={nothing}, token={token:#x}"
    assert refusal(liveupdate.retrieve_fd, nothing, token) == (expected, f"SESSION_RETRIEVE_FD({arguments})")


def test_the_other_calls_name_themselves_too(nothing: int) -> None:
    assert refusal(liveupdate.finish_session, nothing) == (errno.ENOTTY, f"SESSION_FINISH(session={nothing})")
    assert refusal(liveupdate.get_name, nothing) == (errno.ENOTTY, f"SESSION_GET_NAME(session={nothing})")


def test_another_process_s_file_is_no_session() -> None:
    """Copied by pidfd_getfd(2) and closed again: a file that has a type, and an anonymous inode that is no session."""
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=(event := os.eventfd(0),))
    try:
        gc.collect()  # earlier tests' files are not to be closed meanwhile
        open_before = os.listdir("/proc/self/fd")
        assert HostCalls().describe_session(child.pid, 0) is None
        assert HostCalls().describe_session(child.pid, event) is None
        with pytest.raises(OSError, match="pidfd_getfd"):
            HostCalls().describe_session(child.pid, 1000)
        assert os.listdir("/proc/self/fd") == open_before
    finally:
        child.communicate()
        os.close(event)


@pytest.mark.parametrize(
    ("number", "incoming"),
    [(errno.EINVAL, True), (errno.EBADF, False), (errno.EEXIST, False), (errno.ENOSPC, False), (errno.ENOTTY, None)],
)
def test_which_sessions_came_is_told_by_what_they_say_to_no_file(
    monkeypatch: pytest.MonkeyPatch, number: int, incoming: bool | None
) -> None:
    def refused(session: int, request: int, argument: bytes) -> None:
        assert (session, request) == (7, liveupdate.LIVEUPDATE_SESSION_PRESERVE_FD)
        assert liveupdate.TOKEN.unpack(argument)[1] == -1, "no file, so nothing can be preserved"
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "ioctl", refused)
    if incoming is None:
        with pytest.raises(OSError, match="PRESERVE_FD"):
            liveupdate.is_incoming(7)
    else:
        assert liveupdate.is_incoming(7) is incoming
