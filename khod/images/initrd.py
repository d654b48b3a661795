# SPDX-License-Identifier: LGPL-2.1-or-later
"""Walk an initrd as the kernel unpacks it (init/initramfs.c), without keeping any of it."""

import posixpath
import re
import stat
import struct
from collections.abc import Iterator

from khod.dataclass import dataclass
from khod.errors import Refused
from khod.images import accepted, compressed
from khod.images.sealed import ALIGNMENT, Sealed

MAGIC, MAGIC_CRC = b"070701", b"070702"
DIGIT = ord("0")  # an archive's first byte
HEADER = 110  # bytes: the magic, and thirteen hexadecimal numbers of eight digits
MODE, FILESIZE, NAMESIZE, CHECK = 1, 6, 11, 12  # their positions among the numbers
TRAILER = b"TRAILER!!!"
PATH_MAX = 4096
PIECE_BYTES = 1 << 20
MAX_PARTS = 1000
"""The number of parts; an empty compressed part is 20 bytes long, and takes as long to start as any other."""
NOT_ZERO = re.compile(rb"[^\0]")
BOOTCONFIG, BOOTCONFIG_NUMBERS = b"#BOOTCONFIG\n", struct.Struct("<II")  # include/linux/bootconfig.h: size, checksum
BOOTCONFIG_PADDING = 3
MODULES = re.compile(rb"(?:usr/)?lib/modules/([^/]{1,64})/")
MAX_MODULE_TREES = 64
LZ4_FRAME = b"\x04\x22\x4d\x18"  # what `lz4` makes without -l


@dataclass(frozen=True)
class Initrd:
    """The contents of an initrd.

    `formats` are those of its parts in order, for instance ("cpio", "zstd"). `files` is the number of entries,
    `unpacked` the bytes of its archives. `init` tells whether the program to start is among them. `opaque`, if not "",
    says why a part could not be examined; `files` and `init` then do not cover that part. `needs` names the options
    that a kernel needs to unpack it, `modules` the kernels whose modules are in it, by lib/modules. `bootconfig` is the
    length in bytes of the boot configuration at its end, which the kernel cuts off first.
    """

    formats: tuple[str, ...]
    files: int
    unpacked: int
    init: bool
    opaque: str = ""
    needs: frozenset[str] = frozenset()
    modules: frozenset[str] = frozenset()
    bootconfig: int = 0


def inspect_initrd(image: Sealed, limit: int, init: str = "init", *, last: bool = True) -> Initrd:
    """Walk every archive of an initrd to its end; raise Refused, with the place, if the kernel could not unpack it all.

    `limit` is the maximum of unpacked bytes, `init` the path of the program to start. A boot configuration is looked
    for only in the `last` of the joined initrds, as the kernel does.
    """
    view = image.view()
    bootconfig = _bootconfig_size(view, image.name) if last else 0
    if bootconfig:
        view = view[: len(view) - bootconfig]
    walk, formats, needs, at = _Walk(image.name, init), list[str](), set[str](), 0

    def found_so_far(opaque: str = "") -> Initrd:
        return Initrd(
            tuple(formats),
            walk.files,
            walk.unpacked,
            walk.init_seen,
            opaque,
            frozenset(needs),
            frozenset(walk.modules),
            bootconfig,
        )

    while found := NOT_ZERO.search(view, at):
        at = found.start()
        if view[at] == DIGIT and at % ALIGNMENT == 0:
            stream = _Stream((view[start : start + PIECE_BYTES] for start in range(at, len(view), PIECE_BYTES)), at)
            walk.walk_archive(stream, "")
            formats.append("cpio")
            walk.unpacked += stream.at - at
            at = stream.at
            continue
        method = compressed.recognise_method(bytes(view[at : at + compressed.HEAD_BYTES]))
        if not method:
            raise _no_archive(image.name, at, bytes(view[at : at + compressed.HEAD_BYTES]))
        formats.append(method)
        if len(formats) > MAX_PARTS:
            raise Refused(
                f"The initrd has more than {MAX_PARTS} parts",
                where=image.name,
                remedy="Pack it as one archive.",
            )
        needs |= accepted.required_options(method, view[at:], image.name)
        if method not in compressed.METHODS:
            return found_so_far(f"what follows byte {at} is compressed with {method}, which khod does not unpack")
        at += _walk_compressed(walk, method, view[at:], at, limit)
    if not formats and not bootconfig:
        raise _no_archive(image.name, 0)
    return found_so_far()


def _bootconfig_size(view: memoryview, where: str) -> int:
    """Return the bytes that get_boot_config_from_initrd() cuts off (init/main.c), or 0 without a boot configuration.

    The kernel does so with and without CONFIG_BOOT_CONFIG. A boot loader may have padded it by up to three bytes.
    """
    tail = bytes(view[-len(BOOTCONFIG) - BOOTCONFIG_PADDING :])
    found = tail.rfind(BOOTCONFIG)
    if found < 0:
        return 0
    end = len(view) - len(tail) + found
    length = end - BOOTCONFIG_NUMBERS.size
    size = BOOTCONFIG_NUMBERS.unpack_from(view, length)[0] if length >= 0 else 0
    if length < size or length < 0:
        raise Refused(
            f"The initrd ends in a boot configuration of {size} bytes, and is shorter than that",
            where=where,
            remedy="Append it again: bootconfig -a FILE INITRD",
        )
    return len(view) - (length - size)


def _walk_compressed(walk: "_Walk", method: str, view: memoryview, at: int, limit: int) -> int:
    """Walk one compressed part and return its bytes in the file."""
    lengths: list[int] = []

    def pieces() -> Iterator[bytes]:
        lengths.append((yield from compressed.unpack_stream(method, view, limit - walk.unpacked, walk.where)))

    stream, within = _Stream(pieces(), 0), f" of what {method} packed at byte {at}"
    try:
        walk.walk_archive(stream, within)
    except Refused as error:
        if walk.is_located:
            raise
        raise Refused(f"{error.what} (the part at byte {at})", where=error.where, remedy=error.remedy) from None
    if stream.peek_byte() is not None:
        raise walk.damaged_error("no cpio header stands", stream.at, within)
    walk.unpacked += stream.at
    return lengths[0]


class _Stream:
    """A stream of bytes in pieces; `at` is the offset of the next byte."""

    def __init__(self, pieces: Iterator[bytes] | Iterator[memoryview], at: int) -> None:
        self._pieces = pieces
        self._piece: bytes | memoryview = b""
        self._used = 0
        self.at = at

    def peek_byte(self) -> int | None:
        """Return the next byte, or None at the end."""
        while self._used == len(self._piece):
            piece = next(self._pieces, None)
            if piece is None:
                return None
            self._piece, self._used = piece, 0
        return self._piece[self._used]

    def read_chunks(self, length: int) -> Iterator[bytes | memoryview]:
        """Yield the next `length` bytes in pieces, fewer at the end."""
        while length and self.peek_byte() is not None:
            chunk = self._piece[self._used : self._used + length]
            self._used += len(chunk)
            self.at += len(chunk)
            length -= len(chunk)
            yield chunk

    def read_bytes(self, length: int) -> bytes:
        """Return the next `length` bytes, fewer at the end."""
        return b"".join(self.read_chunks(length))

    def skip_zeros(self) -> None:
        """Skip to the next byte that is not zero."""
        while self.peek_byte() is not None:
            found = NOT_ZERO.search(self._piece, self._used)
            end = found.start() if found else len(self._piece)
            self.at += end - self._used
            self._used = end
            if found:
                return


class _Walk:
    """The state of the walk; its methods raise Refused where the kernel would stop."""

    def __init__(self, where: str, init: str) -> None:
        self.where = where
        self._init = init
        self.files = 0
        self.unpacked = 0
        self.init_seen = False
        self.modules = set[str]()
        self.is_located = False
        """Whether the refusal already names the place."""

    def walk_archive(self, stream: _Stream, within: str) -> None:
        """Walk entries, trailers and zeros until other data; `within` says what the offsets are relative to."""
        while (byte := stream.peek_byte()) in (0, DIGIT):
            if byte == 0:
                stream.skip_zeros()
            elif stream.at % ALIGNMENT:
                raise self.damaged_error("an entry is not aligned to 4 bytes", stream.at, within)
            else:
                self._walk_entry(stream, within)

    def damaged_error(self, what: str, at: int, within: str) -> Refused:
        """Return the refusal of a damaged initrd."""
        self.is_located = True
        return Refused(
            f"The initrd is damaged: {what} at byte {at}{within}",
            where=self.where,
            remedy="Copy it again, or make it again (update-initramfs, dracut, mkosi-initrd).",
        )

    def _walk_entry(self, stream: _Stream, within: str) -> None:
        start = stream.at
        head = stream.read_bytes(HEADER)
        if head[: len(MAGIC)] not in (MAGIC, MAGIC_CRC):
            raise self.damaged_error("no newc header stands", start, within)
        try:
            fields = struct.unpack(">13I", bytes.fromhex(head[len(MAGIC) :].decode("ascii")))
        except (ValueError, struct.error):
            raise self.damaged_error("an entry's header is not a row of numbers", start, within) from None
        mode, size, name_size, check = (fields[place] for place in (MODE, FILESIZE, NAMESIZE, CHECK))
        name = self._read_name(stream, name_size, start, within)
        total = 0
        for chunk in stream.read_chunks(size):
            total += len(chunk)
            check -= sum(chunk) if head.startswith(MAGIC_CRC) and stat.S_ISREG(mode) else 0
        if total < size:
            raise self.damaged_error("it ends within the entry", start, within)
        if head.startswith(MAGIC_CRC) and stat.S_ISREG(mode) and check % (1 << 32):
            raise self.damaged_error("the checksum does not fit the entry", start, within)
        stream.read_bytes(-stream.at % ALIGNMENT)
        if name not in (TRAILER, b""):
            self.files += 1
            regular = stat.S_ISREG(mode) or stat.S_ISLNK(mode)
            path = posixpath.normpath(b"/" + name).lstrip(b"/")
            self.init_seen |= regular and path == self._init.encode()
            if regular and len(self.modules) < MAX_MODULE_TREES and (tree := MODULES.match(path)):
                self.modules.add(tree[1].decode(errors="replace"))

    def _read_name(self, stream: _Stream, size: int, start: int, within: str) -> bytes:
        """Read an entry's name; b"" if the kernel skips the entry."""
        padded = size + -(HEADER + size) % ALIGNMENT
        if not 0 < size <= PATH_MAX:
            skipped = sum(len(chunk) for chunk in stream.read_chunks(padded))
            name, short = b"", skipped < size
        else:
            name = stream.read_bytes(padded)[:size]
            short = len(name) < size
        if short:
            raise self.damaged_error("it ends within the entry", start, within)
        if name and name[-1] != 0:
            raise self.damaged_error("a name has no end in the entry", start, within)
        return name.split(b"\0")[0]


def _no_archive(where: str, at: int, head: bytes = b"") -> Refused:
    if head.startswith(LZ4_FRAME):
        return Refused(
            f"The initrd is in lz4's frame format, which no kernel unpacks, at byte {at}",
            where=where,
            remedy="Pack it with: lz4 -l",
        )
    return Refused(
        f"The initrd is neither a cpio archive nor compressed in a way a kernel knows, at byte {at}",
        where=where,
        remedy="Give `kernel.initrds` an initramfs, for instance /boot/initrd.img-VERSION.",
    )
