# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files copied into a sealed memfd before the blackout, so that the bytes that were checked are loaded."""

import functools
import hashlib
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Self

from khod.abi.memfd import seal_memfd
from khod.dataclass import dataclass
from khod.errors import Refused, errno_text
from khod.files import check_regular

CHUNK_BYTES = 1 << 20
ALIGNMENT = 4  # init/initramfs.c: where an archive may begin


@dataclass(frozen=True)
class Sealed:
    """The contents of a file, permanently read-only; the object owns `fd`, and `size` is in bytes."""

    fd: int
    size: int
    name: str

    @functools.cached_property
    def sha256(self) -> str:
        """The SHA-256 of the contents in hex, computed on first use."""
        return hashlib.sha256(self.view()).hexdigest()

    def view(self) -> memoryview:
        """Map the contents, for as long as the view or a slice of it is held."""
        # Private: before 6.7 a write-sealed memfd could not be mapped shared, not even for reading.
        return memoryview(mmap.mmap(self.fd, self.size, mmap.MAP_PRIVATE, mmap.PROT_READ))

    def close(self) -> None:
        """Free the memory."""
        os.close(self.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def seal_file(fd: int, role: str, name: str, limit: int) -> Sealed:
    """Copy a regular file into a sealed memfd; raise UsageError or Refused if it cannot be used as `role`.

    `limit` in bytes bounds what a client can make khod hold. The given fd stays the caller's.
    """
    check_regular(fd, role, name)
    size = os.fstat(fd).st_size
    if size == 0:
        raise Refused(f"The {role} is empty", where=name, remedy="Copy it again; the kernel loads no empty file.")
    if size > limit:
        raise Refused(
            f"The {role} is {size} bytes, more than the {limit} allowed",
            where=name,
            remedy="Raise `images.max_size` in /etc/kho/khod.toml if this is meant.",
        )
    return seal_pieces(_read_pieces(fd, role, name, limit), name)


def seal_pieces(pieces: Iterable[bytes | memoryview], name: str) -> Sealed:
    """Write pieces into a sealed memfd, in order; raise Refused if they are empty or cannot be kept in memory."""
    memfd = os.memfd_create("khod-image", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        size = 0
        for piece in pieces:
            size += _write_piece(memfd, piece, size, name)
        if size == 0:
            raise Refused("The file holds nothing", where=name, remedy="Copy it again; the kernel loads no empty file.")
        _seal(memfd, name)
    except BaseException:
        os.close(memfd)
        raise
    return Sealed(memfd, size, name)


def join_initrds(parts: Sequence[Sealed], name: str) -> Sealed:
    """Join initrds in order, each padded with zeros to 4 bytes, as the kernel unpacks them.

    The parts stay the caller's. Raises Refused if there is no memory for it.
    """
    return seal_pieces((piece for part in parts for piece in (part.view(), bytes(-part.size % ALIGNMENT))), name)


def _read_pieces(fd: int, role: str, name: str, limit: int) -> Iterator[memoryview]:
    """Read a file to its end, through one buffer."""
    buffer, copied = memoryview(bytearray(CHUNK_BYTES)), 0
    while True:
        try:
            length = os.preadv(fd, [buffer], copied)
        except OSError as error:
            raise Refused(
                f"The {role} cannot be read: {errno_text(error)}",
                where=name,
                remedy="Check the file and the disk it lies on.",
            ) from error
        if not length:
            return
        copied += length
        if copied > limit:
            raise Refused(f"The {role} grows while it is read", where=name, remedy="Wait for its writer.")
        yield buffer[:length]


def _write_piece(memfd: int, piece: bytes | memoryview, at: int, name: str) -> int:
    """Write all of a piece and return its length in bytes."""
    length = len(piece)
    try:
        while piece:
            written = os.pwrite(memfd, piece, at)
            piece, at = piece[written:], at + written
    except OSError as error:
        raise Refused(
            f"There is no memory for it: {errno_text(error)}",
            where=name,
            remedy="Free memory on this host, or give kho-handover.service more (MemoryMax=).",
        ) from error
    return length


def _seal(memfd: int, name: str) -> None:
    try:
        seal_memfd(memfd)
    except OSError as error:
        raise Refused(
            f"Its copy in memory cannot be made read-only: {errno_text(error)}",
            where=name,
            remedy="Something on this host holds pages of it, as what reclaims or moves memory does. Try again.",
        ) from error
