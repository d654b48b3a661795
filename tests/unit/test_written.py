# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the running kernel writes: its trees, LUO's blob, and its own image where that is proven to be it."""

import functools
import struct
from pathlib import Path

import libfdt
import pytest

from khod.abi.calls import HostCalls
from khod.images import sealed
from khod.images.kernel import KernelImageInfo, unpack_image
from khod.kernel.formats import OutgoingFormats, read_formats
from khod.model import Generation
from tests.unit.images import bzimage, code

OUT = "sys/kernel/debug/kho/out"
RELEASE = "7.3.4-kho"
BANNER = "Linux version 7.3.4-kho (root@vm) (gcc (Debian 12.2.0-14) 12.2.0, GNU ld 2.40) #1 SMP PREEMPT Wed Nov 25 2026"
FORMATS = ("kho-v4", "luo-v5", "memfd-v2", "memblock-v1")
BOOT, MODULES = f"boot/vmlinuz-{RELEASE}", f"usr/lib/modules/{RELEASE}/vmlinuz"


def packed_luo(version: str) -> bytes:
    """Since Linux 7.1: its compatible in 8 bytes, the live update's number, where sessions and FLBs are."""
    return struct.pack("<8sQQQ", version.encode(), 1, 0x1000_0000, 0)


def fdt(*compatibles: str) -> bytes:
    """A tree with these compatibles, each below the one before."""
    writer = libfdt.FdtSw()
    writer.finish_reservemap()
    for depth, compatible in enumerate(compatibles):
        writer.begin_node(f"node{depth}" if depth else "")
        writer.property_string("compatible", compatible)
    for _ in compatibles:
        writer.end_node()
    made = writer.as_fdt()
    return bytes(made.as_bytearray()[: made.totalsize()])


@functools.cache
def image(banner: str = BANNER, formats: tuple[str, ...] = FORMATS) -> bytes:
    """A kernel that says so of itself, with the weak banner before it that each build has."""
    weak = banner.partition(" #")[0] + " # SMP PREEMPT\n\0"
    contents = code(formats=formats, marks=(), config=None).replace(b"Linux version 6.8.0-next (b@h) #1 SMP\n\0", b"")
    return bzimage(contents=weak.encode() + banner.encode() + b"\n\0" + contents)


@pytest.fixture
def calls(tmp_path: Path) -> HostCalls:
    """A 7.3.4 that was booted with kho=on liveupdate=on."""
    made = HostCalls(tmp_path)
    lay(made, "proc/version", f"{BANNER}\n".encode())
    lay(made, "proc/sys/kernel/osrelease", f"{RELEASE}\n".encode())
    lay(made, f"{OUT}/fdt", fdt("kho-v4"))
    lay(made, f"{OUT}/sub_fdts/memblock", fdt("memblock-v1", "reserve-mem-v1"))
    lay(made, f"{OUT}/sub_fdts/LUO", packed_luo("luo-v5"))
    return made


def lay(calls: HostCalls, path: str, contents: bytes) -> None:
    calls.host_path(path).parent.mkdir(parents=True, exist_ok=True)
    calls.host_path(path).write_bytes(contents)


def read(calls: HostCalls, following: KernelImageInfo | None = None) -> OutgoingFormats:
    return read_formats(calls, Generation.stateless, following)


@pytest.mark.parametrize(
    ("blob", "formats"),
    [
        (packed_luo("luo-v5"), {"luo-v5"}),
        (packed_luo("luo-v10"), {"luo-v10"}),
        (fdt("luo-v1", "luo-session-v2"), {"luo-v1", "luo-session-v2"}),
    ],
)
def test_luo_s_blob_says_its_version_first(calls: HostCalls, blob: bytes, formats: set[str]) -> None:
    lay(calls, f"{OUT}/sub_fdts/LUO", blob)
    found = read(calls)
    assert found.luo
    assert found.blobs["LUO"] == formats
    assert found.blobs["memblock"] == {"memblock-v1", "reserve-mem-v1"}


@pytest.mark.parametrize("path", [BOOT, MODULES])
def test_its_own_image_says_which_file_handlers_it_has(calls: HostCalls, path: str) -> None:
    lay(calls, path, image())
    found = read(calls)
    assert (found.own, found.not_inspected) == (frozenset(FORMATS), "")


def test_an_image_of_another_build_is_not_its_own(calls: HostCalls) -> None:
    """The same version, built again: `#2`."""
    lay(calls, BOOT, image(BANNER.replace("#1", "#2"), (*FORMATS[:2], "memfd-v9")))
    found = read(calls)
    assert (found.own, BOOT in found.not_inspected) == (None, True)
    lay(calls, MODULES, image())
    assert read(calls).own == frozenset(FORMATS), "the next place is looked at"


def test_an_image_that_does_not_know_what_the_trees_show_is_not_its_own(calls: HostCalls) -> None:
    """A build of fixed time and number has the same banner whatever was patched."""
    lay(calls, BOOT, image(formats=("kho-v4", "luo-v6", "memfd-v2")))
    found = read(calls)
    assert (found.own, "luo-v5" in found.not_inspected) == (None, True)


@pytest.mark.parametrize("contents", [b"", b"no kernel", image()[: 5 * 512]])
def test_what_is_no_image_was_not_inspected(calls: HostCalls, contents: bytes) -> None:
    lay(calls, BOOT, contents)
    found = read(calls)
    assert (found.own, BOOT in found.not_inspected) == (None, True)
    assert found.root == "kho-v4"
    assert found.blobs["LUO"] == {"luo-v5"}


def test_the_next_kernel_may_be_the_running_one(calls: HostCalls) -> None:
    with sealed.seal_pieces([image()], "vmlinuz") as memory:
        following = unpack_image(memory, "x86_64", 1 << 24).about
    assert following.banner == BANNER
    assert read(calls, following).own == frozenset(FORMATS)
    lay(calls, "proc/version", BANNER.replace("#1", "#2").encode())
    assert read(calls, following).own is None


def test_without_luo_nobody_asks_for_file_handlers(calls: HostCalls) -> None:
    """It was booted without liveupdate=on: no blob, no device, no files."""
    calls.host_path(f"{OUT}/sub_fdts/LUO").unlink()
    found = read(calls)
    assert (found.luo, found.own, found.not_inspected) == (False, None, "")


def test_luo_that_no_tree_shows_is_read_off_the_image(calls: HostCalls) -> None:
    """The device is there where LUO is on; in a kernel reached by a handover debugfs may not show all (7.3.4)."""
    calls.host_path(f"{OUT}/sub_fdts/LUO").unlink()
    calls.host_path(f"{OUT}/fdt").unlink()
    lay(calls, "dev/liveupdate", b"")
    assert (read(calls).luo, read(calls).root, "LUO" in read(calls).blobs) == (True, "", False)
    lay(calls, BOOT, image())
    found = read(calls)
    assert found.root == "kho-v4"
    assert found.blobs["LUO"] == {"luo-v5"}


def test_blobs_that_do_not_say_their_format_are_named(calls: HostCalls) -> None:
    lay(calls, f"{OUT}/sub_fdts/hwpoison", struct.pack("<IQ", 1, 0x2000))
    lay(calls, f"{OUT}/sub_fdts/kexec-metadata", struct.pack("<I65sI", 1, b"7.3.4", 1))
    assert read(calls).unjudged == ("hwpoison",)
