"""What reaches the kernel in an ioctl of /dev/liveupdate, and what never does. The device itself is the lab's."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from khod.abi import liveupdate

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


def test_no_device_is_an_oserror_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        liveupdate.open_device(tmp_path / "liveupdate")
    assert caught.value.filename == f"open {tmp_path / 'liveupdate'}"


def test_the_device_is_opened_close_on_exec(tmp_path: Path) -> None:
    path = tmp_path / "liveupdate"
    path.touch()
    fd = liveupdate.open_device(path)
    try:
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize("function", [liveupdate.create_session, liveupdate.retrieve_session])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("n" * 63, errno.ENOTTY),
        ("n" * 64, errno.ENAMETOOLONG),
        ("ü" * 32, errno.ENAMETOOLONG),  # 64 bytes
        ("two\0names", errno.EINVAL),
    ],
)
def test_a_name_that_would_be_cut_never_reaches_the_kernel(
    nothing: int, function: Callable[[int, str], int], name: str, expected: int
) -> None:
    with pytest.raises(OSError, match=".") as caught:
        function(nothing, name)
    assert caught.value.errno == expected
    assert caught.value.filename == f"{function.__name__.upper()}({name!r})"


@pytest.mark.parametrize(
    ("token", "expected"), [(0, errno.ENOTTY), (2**64 - 1, errno.ENOTTY), (2**64, errno.EINVAL), (-1, errno.EINVAL)]
)
def test_a_token_has_64_bits(nothing: int, token: int, expected: int) -> None:
    with pytest.raises(OSError, match=".") as caught:
        liveupdate.preserve_fd(nothing, 7, token)
    assert caught.value.errno == expected
    assert caught.value.filename == f"SESSION_PRESERVE_FD(session={nothing}, fd=7, token={token:#x})"
    with pytest.raises(OSError, match=".") as caught:
        liveupdate.retrieve_fd(nothing, token)
    assert caught.value.errno == expected
    assert caught.value.filename == f"SESSION_RETRIEVE_FD(session={nothing}, token={token:#x})"


def test_the_other_calls_name_themselves_too(nothing: int) -> None:
    with pytest.raises(OSError, match="SESSION_FINISH") as caught:
        liveupdate.finish(nothing)
    assert caught.value.errno == errno.ENOTTY
    with pytest.raises(OSError, match="SESSION_GET_NAME") as caught:
        liveupdate.get_name(nothing)
    assert caught.value.errno == errno.ENOTTY
