# SPDX-License-Identifier: LGPL-2.1-or-later
"""Trees for people and scripts: each producer's, decoded by what its kernel's sources promise."""

import json
import struct

import pytest

from khod.region import Region
from khod.trees.as_json import tree_as_json
from khod.trees.difference import Change, Difference, compare_blobs, format_difference
from khod.trees.draw import ASCII, draw_summary
from khod.trees.show import show_blobs
from khod.trees.summary import summarise_tree
from tests.unit.trees import (
    KEXEC_METADATA,
    KHO_TEST,
    LUO_V1,
    LUO_V5,
    MIB,
    PAGE,
    U32,
    U64,
    compatible,
    fdt,
    ftrace,
    kho_v1,
    kho_v4,
    mem,
    memblock,
    memfd,
)

SHOWN = [
    ("", kho_v4(memblock=(0x1234000, 141)), ["preserved-data = 0x1234000", "blob-size = 0x8d (141 bytes)"]),
    ("", kho_v1(memblock=0x1234000), ["preserved-memory-map = 0x105f000", "fdt = 0x1234000"]),
    ("memblock", memblock(trace=(0x5000000, 12 * MIB)), ["trace", "start = 0x5000000", "size = 0xc00000 (12 MiB)"]),
    ("LUO", LUO_V1, ["liveupdate-number = 1", "luo-session-header = 0x1041000", "luo-flb-header = 0x1042000"]),
    ("LUO", LUO_V5, ['compatible = "luo-v5"', "liveupdate_num = 3", "sessions_pa = 0x1040000", "flbs_pa = 0x0"]),
    ("kexec-metadata", KEXEC_METADATA, ["version = 1", 'previous_release = "7.3.4-kho"', "kexec_count = 2"]),
    ("kho_test", KHO_TEST, ["magic = 0x4b484f21", "nr_folios = 512", "csum = 0xcafe", "1 page of order 0"]),
    ("memfd", memfd(), ["size = 0x10000 (64 KiB)", "nr_folios = 16", "seals = 0x1", "listed from 0x7f000"]),
    ("", ftrace([mem((0x1000, PAGE))]), ["trace-flags = 0x40401", "cpu = 0", "mem = 1 range, 4 KiB", "2 events"]),
]


@pytest.mark.parametrize(("name", "blob", "words"), SHOWN, ids=lambda value: value if isinstance(value, str) else "")
def test_a_producer_s_blob_is_decoded(name: str, blob: bytes, words: list[str]) -> None:
    shown = [line.strip() for line in show_blobs({name: blob})]
    for word in words:
        assert any(word == line or word in line for line in shown), (word, shown)
    assert not any("(!)" in line for line in shown)


def test_the_whole_of_a_mainline_tree() -> None:
    blobs = {"": kho_v4(memblock=(0x2000000, 0x1000)), "memblock": memblock(trace=(0x5000000, 12 * MIB))}
    assert list(show_blobs(blobs, width=40)) == [
        f"root: {len(blobs[''])} bytes",
        "  /",
        '    compatible = "kho-v4"',
        "    preserved-memory-map = 0x105f000",
        "    memblock",
        "      preserved-data = 0x2000000",
        "      blob-size = 0x1000 (4 KiB)",
        f"memblock: {len(blobs['memblock'])} bytes",
        "  /",
        '    compatible = "memblock-v1"',
        "    trace",
        '      compatible = "reserve-mem-v1"',
        "      start = 0x5000000",
        "      size = 0xc00000 (12 MiB)",
        "memory: 2 ranges, 12.0 MiB",
        "  merged: 2 ranges, 12.0 MiB in whole pages",
        "  largest hole: 48.0 MiB from 0x2001000",
        "|▁                               ████████|",
        "0x2000000      █ 100% used       0x5bfffff",
    ]


WRONG = [
    (ftrace([mem((0, PAGE))[:-1]]), "15 bytes", "the kernel ignores all of it"),
    (fdt(compatible("ftrace,cpu-v1") | {"cpu": U64(1)}), "cpu", "4 bytes"),
    (fdt({"compatible": b"kho-v1"}), "compatible", "each with its NUL"),
    (fdt(compatible("memfd-v2") | {"folios": U64(1)}), "folios", "struct kho_vmalloc, 16 bytes"),
    (fdt(compatible("reserve-mem-v1") | {"start": U32(1), "size": U64(PAGE)}), "start", "8 bytes"),
]


@pytest.mark.parametrize(("blob", "place", "why"), WRONG, ids=[wrong[2] for wrong in WRONG])
def test_what_is_not_as_its_name_promises_is_marked(blob: bytes, place: str, why: str) -> None:
    (line,) = (line for line in show_blobs({"": blob}) if "(!)" in line)
    assert place in line
    assert why in line


def test_what_nobody_promises_is_shown_by_its_looks() -> None:
    node = {"text": b"two\0words\0", "four": U32(7), "eight": U64(8), "odd": b"\1\2\3", "none": b""}
    shown = [line.strip() for line in show_blobs({"": fdt(node | {"esc": b"\x1b[2J\0"})})]
    assert shown[2:] == [
        'text = "two", "words" [10 bytes]',
        "four = 0x7 [4 bytes]",
        "eight = 0x8 [8 bytes]",
        "odd = 01 02 03 [3 bytes]",
        "none",
        "esc = 1b 5b 32 4a 00 [5 bytes]",
    ]


def test_nothing_reaches_a_terminal_as_it_is() -> None:
    blob = fdt(compatible("x")).replace(b"compatible", b"comp\x1b[2Jle")
    lines = [
        *show_blobs({"\x1b]0;": blob, "\n": b"\x1b[31m"}),
        *draw_summary(summarise_tree({"\x1b": blob}), {"\x1b": blob}),
    ]
    assert all(line.isprintable() for line in lines)


def test_a_blob_that_is_no_tree() -> None:
    shown = list(show_blobs({"other": b"anything", "": b"cut"}))
    assert shown[0] == "other: 8 bytes"
    assert "neither an FDT nor a structure we know" in shown[1]
    assert "(!)" not in shown[1]
    assert shown[2].strip() == b"anything".hex(" ")
    assert "(!)" in shown[4], "the root is always a tree"


def test_a_root_that_debugfs_cuts_off_is_explained() -> None:
    """Seen on 6.19.11 and 7.3.4: out/fdt keeps the size it had when the file was made."""
    shown = "\n".join(show_blobs({"": kho_v4(memblock=(1, 2))[:-20]}))
    assert "cut off" in shown
    assert "this is expected" in shown


def test_scratch_in_the_strip() -> None:
    blob = ftrace([mem((0, PAGE), (2 * PAGE, PAGE), (5 * PAGE, PAGE))])
    scratch = [Region(PAGE, 2 * PAGE), Region(7 * PAGE, PAGE)]
    *_, bar, legend = show_blobs({"": blob}, scratch=scratch, width=8, pen=ASCII)
    assert bar == "|@sX  @ s|"
    assert legend == "0x0 @ 100% used, s scratch, X both 0x7fff"
    assert any(
        "4 KiB of it lie in scratch: the kernel refuses" in line for line in show_blobs({"": blob}, scratch=scratch)
    )
    mainline = {"memblock": memblock(a=(PAGE, PAGE))}
    assert any("the next kernel is loaded over it" in line for line in show_blobs(mainline, scratch=scratch))


def test_a_strip_is_as_dense_as_its_memory() -> None:
    ranges = mem(*[(at * PAGE, PAGE) for at in (*range(9), 16, 24)])
    *_, bar, _ = show_blobs({"": ftrace([ranges])}, width=4, pen=ASCII)
    assert bar == "|@=..|", "25 pages in columns of 6, 6, 6 and 7: full, a half, 1/6 and 1/7"


def test_a_page_in_a_terabyte_is_not_said_to_be_nothing() -> None:
    *_, legend = show_blobs({"": ftrace([mem((0, PAGE), (1 << 40, PAGE))])}, width=40)
    assert "under 1% used" in legend


def test_the_short_form_has_no_nodes() -> None:
    blobs = {"": ftrace([mem((0, PAGE)), mem((PAGE, 10))[:-1]]), "kexec-metadata": KEXEC_METADATA}
    found = list(draw_summary(summarise_tree(blobs, width=20), blobs))
    assert found[1:4] == [
        '  "kho-v1", 5 nodes, 11 properties',
        "  /ftrace/global-trace/cpu0 mem: 1 range",
        "  /ftrace/global-trace/cpu1 mem: 15 bytes, no multiple of 16: the kernel ignores it (!)",
    ]
    assert found[5] == "  1 node, 3 properties"
    assert found[6] == "memory: 1 range, 4 KiB"


def test_json_has_every_byte_and_its_meaning() -> None:
    blobs = {"": ftrace([mem((PAGE, PAGE))]), "other": b"\1\2"}
    made = json.loads(json.dumps(tree_as_json(blobs)))
    cpu = made["root"]["children"]["ftrace"]["children"]["global-trace"]["children"]["cpu0"]
    assert cpu["compatible"] == "ftrace,cpu-v1"
    assert cpu["properties"]["mem"] == {
        "raw": mem((PAGE, PAGE)).hex(),
        "length": 16,
        "kind": "mem",
        "value": {"ranges": 1, "bytes": PAGE},
    }
    assert made["root"]["fdt"] == {"version": 17, "boot_cpuid_phys": 0, "reservations": []}
    assert made["other"]["bytes"] == "0102"


# What differs


def found(left: dict[str, bytes], right: dict[str, bytes]) -> list[str]:
    return [line for item in compare_blobs(left, right) for line in format_difference(item)]


def test_the_same_tree_has_no_difference() -> None:
    assert found({"": ftrace([])}, {"": ftrace([])}) == []


def test_a_difference_is_named_by_its_path_and_in_words() -> None:
    left = {"": kho_v1(memblock=PAGE), "memblock": memblock(trace=(0, MIB)), "gone": b"12"}
    right = {"": kho_v1(memblock=2 * PAGE, LUO=PAGE), "memblock": memblock(trace=(0, 2 * MIB)), "came": b"1"}
    assert found(left, right) == [
        "-root:/memblock fdt = 0x1000",
        "+root:/memblock fdt = 0x2000",
        "+root:/LUO a node (no compatible, 0 below it)",
        "+came 1 byte",
        "-gone 2 bytes",
        "-memblock:/trace size = 0x100000 (1 MiB)",
        "+memblock:/trace size = 0x200000 (2 MiB)",
    ]


def test_memory_that_differs_is_counted_by_ranges() -> None:
    left, right = mem((0, PAGE), (PAGE, PAGE)), mem((PAGE, PAGE), (8 * PAGE, 2 * PAGE), (16 * PAGE, PAGE))
    assert found({"": ftrace([left])}, {"": ftrace([right])}) == [
        "-root:/ftrace/global-trace/cpu0 mem = 2 ranges, 8 KiB; 1 range, 4 KiB only here",
        "+root:/ftrace/global-trace/cpu0 mem = 3 ranges, 16 KiB; 2 ranges, 12 KiB only here",
    ]
    (one,) = compare_blobs({"": ftrace([left])}, {"": ftrace([mem((PAGE, PAGE), (0, PAGE))])})
    assert "the same ranges in another order" in one.right


def test_the_same_tree_in_another_layout_is_said_to_be_that() -> None:
    blob = ftrace([])
    moved = bytearray(blob + bytes(4))
    struct.pack_into(">I", moved, 4, len(moved))
    (one,) = compare_blobs({"": blob}, {"": bytes(moved)})
    assert (one.left, one.right) == ("the same tree", "the same tree, laid out otherwise")


def test_bytes_that_are_no_tree_differ_by_their_offsets() -> None:
    left, right = bytes(10_000), bytearray(10_002)
    right[5:7], right[4096] = b"ab", 1
    (one,) = compare_blobs({"x": left}, {"x": bytes(right)})
    assert isinstance(one, Difference)
    assert "differs at 0x5-0x6, 0x1000-0x1000, 0x2710-0x2711" in one.left


def test_what_a_kernel_does_not_show_is_no_difference() -> None:
    """Seen on 7.3.4: the outgoing root is cut off or not there, and LUO's page is free once it was read."""
    left = {"": kho_v4(memblock=(PAGE, 141))[:-20], "LUO": LUO_V5, "memblock": memblock(a=(0, PAGE))}
    right = {"": kho_v4(memblock=(PAGE, 141)), "LUO": bytes(range(32)), "memblock": memblock(a=(0, PAGE))}
    unknown = list(compare_blobs(left, right, kernels=True))
    assert [(one.change, one.blob) for one in unknown] == [(Change.unknown, "root"), (Change.unknown, "LUO")]
    assert [line[:5] for one in unknown for line in format_difference(one)] == ["?root", "?LUO "]
    assert all("(seen on Linux" in one.right for one in unknown)
    assert [one.change for one in compare_blobs(left, right)] == [Change.changed, Change.changed], "in files it is one"
    (hidden,) = compare_blobs({"": b""}, {"": right[""]}, kernels=True)
    assert "There is no root" in hidden.right
    assert "LUO's page back" in "\n".join(show_blobs({"LUO": right["LUO"]}))
