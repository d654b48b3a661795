# SPDX-License-Identifier: LGPL-2.1-or-later
"""Checks of kernel images beside the commands that only decompress them: a real vmlinux, packed as builds do."""

import os
import statistics
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from khod.images import compressed, header, sealed
from khod.images.kernel import unpack_image
from tests.bench.figure import Figure
from tests.lab import packages

ROUNDS = 15
BOUND = 1.5
LIMIT = 1 << 30
# As the kernel's build calls them (scripts/Makefile.lib, usr/share/xz_wrap.sh), and their opposites
PACK: dict[str, Sequence[str]] = {
    "lz4": ("lz4", "-l", "-9", "-q", "-c"),
    "zstd": ("zstd", "-19", "-q", "-c"),
    "xz": ("xz", "--check=crc32", "--x86", "--lzma2=dict=32MiB", "-c"),
}


def run() -> Iterator[Figure]:
    """Pack Debian's kernel each way into a bzImage (14 MB with zstd), and check it."""
    original = packages.find("amd64").vmlinuz.read_bytes()
    with tempfile.TemporaryDirectory() as name:
        for method, command in PACK.items():
            image, packed = Path(name) / method, Path(name) / f"{method}.packed"
            _repack(original, command, image, packed)
            yield _figure(method, image, packed)


def _figure(method: str, image: Path, packed: Path) -> Figure:
    pairs = [(_check(image), _unpack(method, packed)) for _ in range(ROUNDS)]
    ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    return Figure(
        f"check of a {image.stat().st_size / 1e6:.1f} MB bzImage / {method} -dc of its payload",
        ours / theirs,
        BOUND,
        "",
        f"{ours * 1e3:.0f} ms and {theirs * 1e3:.0f} ms, medians of {ROUNDS} taken in turn",
    )


def _check(image: Path) -> float:
    fd = os.open(image, os.O_RDONLY)
    began = time.perf_counter()
    bundle = unpack_image(sealed.seal_file(fd, "image", str(image), LIMIT), "x86_64", LIMIT)
    took = time.perf_counter() - began
    assert bundle.about.opaque == ""
    bundle.close()
    os.close(fd)
    return took


def _unpack(method: str, packed: Path) -> float:
    began = time.perf_counter()
    subprocess.run([method, "-dc", packed], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def _repack(original: bytes, command: Sequence[str], image: Path, packed: Path) -> None:
    """Put the kernel in `original` into a bzImage packed by `command`; its payload alone, without the size, as well."""
    view = memoryview(original)
    found = header.read_header(view, "x86_64", "")
    assert found is not None
    assert found.payload is not None
    at, length = found.payload
    method = compressed.recognise_method(original[at : at + compressed.HEAD_BYTES])
    vmlinux = b"".join(compressed.unpack_stream(method, view[at : at + length], LIMIT, ""))
    packed.write_bytes(subprocess.run(command, input=vmlinux, check=True, capture_output=True).stdout)
    payload = packed.read_bytes() + struct.pack("<I", len(vmlinux))
    made = bytearray(original[:at] + payload)
    made += bytes(-(len(made) - found.setup_size) % header.PARAGRAPH)
    struct.pack_into("<I", made, header.SYSSIZE, (len(made) - found.setup_size) // header.PARAGRAPH)
    struct.pack_into("<I", made, header.PAYLOAD + 4, len(payload))
    made[:2] = b"\0\0"  # no PE header any more: it names sections of the kernel that was
    image.write_bytes(made)
