"""Images by content, taken once into a sealed memfd; every kind of file that is none."""

import fcntl
import gzip
import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from khod import files
from khod.errors import Exit, KhoError, Refused, UsageError
from khod.images import recognise, sealed
from khod.images.sealed import Sealed
from tests.unit.images import CMDLINE_SIZE, CPIO, bzimage
from tests.unit.khods import NOBODY

LIMIT = 1 << 30


@contextmanager
def taken(path: Path, role: str = "image", limit: int = LIMIT) -> Iterator[Sealed]:
    fd = files.open_regular(str(path), role)
    try:
        with sealed.seal(fd, role, str(path), limit) as image:
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
        with sealed.seal(file.fileno(), "image", "x", LIMIT) as image:
            assert image.size == len(bzimage())
        assert file.tell() == 1000


def test_nothing_is_left_open(path: Path) -> None:
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
        sealed.seal(fd, "image", "x", LIMIT)
    os.close(fd)


def test_the_bound_holds_by_size_and_by_what_is_read(path: Path) -> None:
    path.write_bytes(bytes(1001))
    with taken(path, limit=1001) as image:
        assert image.size == 1001
    with pytest.raises(Refused, match="max_size"), taken(path, limit=1000):
        pass


def test_a_bzimage_is_recognised_with_what_it_says_of_itself(path: Path) -> None:
    path.write_bytes(bzimage())
    with taken(path) as image:
        found = recognise.kernel(image, "x86_64")
    assert (found.format, found.version, found.cmdline_limit) == ("bzImage", "6.8.0-next", CMDLINE_SIZE)
    assert found.init_size == 1 << 24


def test_every_truncation_of_a_bzimage_is_refused(path: Path) -> None:
    whole = bzimage(size=0x1400)
    for length in range(1, len(whole), 7):
        path.write_bytes(whole[:length])
        with taken(path) as image, pytest.raises(Refused) as raised:
            recognise.kernel(image, "x86_64")
        assert raised.value.where == str(path)


def test_a_signature_after_the_image_does_not_matter(path: Path) -> None:
    path.write_bytes(bzimage() + b"~Module signature appended~\n")
    with taken(path) as image:
        assert recognise.kernel(image, "x86_64").format == "bzImage"


NO_KERNELS = {
    "ELF": b"\x7fELF\x02\x01" + bytes(0x4000),
    "gzip": gzip.compress(bytes(0x4000)),
    "MZ": b"MZ" + bytes(0x4000),
    "zeroes": bytes(0x4000),
    "HdrS without boot_flag": bytes(0x202) + b"HdrS" + bytes(0x4000),
    "boot_flag without HdrS": bytes(0x1FE) + b"\x55\xaa" + bytes(0x4000),
}


@pytest.mark.parametrize("name", NO_KERNELS)
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_what_this_machine_s_loader_does_not_take(path: Path, name: str, machine: str) -> None:
    path.write_bytes(NO_KERNELS[name])
    with taken(path) as image, pytest.raises(Refused) as raised:
        recognise.kernel(image, machine)
    assert raised.value.exit is Exit.refused
    assert "--image" in raised.value.remedy


def test_an_arm64_image_is_recognised_there_and_nowhere_else(path: Path) -> None:
    path.write_bytes(bytes(0x38) + b"ARM\x64" + bytes(0x1000))
    with taken(path) as image:
        assert recognise.kernel(image, "aarch64").format == "Image"
        with pytest.raises(Refused):
            recognise.kernel(image, "x86_64")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 0x290), st.binary(min_size=1, max_size=8))
def test_a_damaged_header_is_taken_or_refused(path: Path, at: int, junk: bytes) -> None:
    damaged = bytearray(bzimage(size=0x1400))
    damaged[at : at + len(junk)] = junk
    path.write_bytes(damaged)
    found: object
    with taken(path) as image:
        try:
            found = recognise.kernel(image, "x86_64")
        except Refused as error:
            found = error
    assert isinstance(found, recognise.Kernel | Refused)


INITRDS = {
    "cpio": CPIO,
    "gzip": gzip.compress(CPIO),
    "zstd": b"\x28\xb5\x2f\xfd" + bytes(8),
    "xz": b"\xfd7zXZ\0" + bytes(8),
    "lz4": b"\x02\x21\x4c\x18" + bytes(8),
    "bzip2": b"BZh9" + bytes(8),
}


@pytest.mark.parametrize("name", INITRDS)
def test_an_initrd_is_named_by_its_outer_format(path: Path, name: str) -> None:
    path.write_bytes(INITRDS[name])
    with taken(path, "initrd") as image:
        assert recognise.initrd(image) == name


@pytest.mark.parametrize("contents", [b"0", b"07070", b"no initrd", bzimage(), b"070707", bytes(100)])
def test_what_no_kernel_unpacks(path: Path, contents: bytes) -> None:
    path.write_bytes(contents)
    with taken(path, "initrd") as image, pytest.raises(Refused) as raised:
        recognise.initrd(image)
    assert "--initrd" in raised.value.remedy
