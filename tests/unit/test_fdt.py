# SPDX-License-Identifier: LGPL-2.1-or-later
"""State trees as bytes from outside: whatever they are, a tree comes out or MalformedTree."""

import struct

import libfdt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from khod.abi import fdt
from khod.abi.fdt import Node
from khod.errors import MalformedTree
from khod.region import Region
from khod.simulated.kernel import build_tree
from tests.unit import generated

VALID = build_tree(4)


def made(depth: int = 1, *, mem: bytes = b"") -> bytes:
    """A tree of `depth` nested nodes, the innermost with a `mem`."""
    writer = libfdt.FdtSw()
    writer.INC_SIZE = 65536 + len(mem)  # room for all at once: a growing tree is copied each time
    writer.finish_reservemap()
    for level in range(depth):
        writer.begin_node(f"n{level}" if level else "")
    writer.property("mem", mem)
    for _level in range(depth):
        writer.end_node()
    whole = bytes(writer.as_fdt().as_bytearray())
    return whole[: struct.unpack_from(">I", whole, 4)[0]]


def outcome(blob: bytes) -> Node | MalformedTree:
    try:
        return fdt.parse_tree(blob, "here")
    except MalformedTree as error:
        return error


@given(st.binary(max_size=300))
def test_any_bytes_are_a_tree_or_malformed(blob: bytes) -> None:
    found = outcome(blob)
    assert isinstance(found, Node) or (found.where == "here" and found.what)


@given(st.binary(max_size=300))
def test_any_bytes_behind_a_true_header_are_a_tree_or_malformed(body: bytes) -> None:
    header = struct.pack(">10I", 0xD00DFEED, 40 + len(body), 56, 40, 40, 17, 16, 0, 8, len(body))
    assert isinstance(outcome(header + body), Node | MalformedTree)


@given(st.integers(0, len(VALID) - 1), st.binary(min_size=1, max_size=4))
def test_any_damage_to_a_valid_tree_is_a_tree_or_malformed(at: int, junk: bytes) -> None:
    damaged = VALID[:at] + junk + VALID[at + len(junk) :]
    assert isinstance(outcome(damaged), Node | MalformedTree)


def test_every_truncation_of_a_valid_tree_is_malformed() -> None:
    assert isinstance(outcome(VALID), Node)
    for length in range(len(VALID)):
        with pytest.raises(MalformedTree):
            fdt.parse_tree(VALID[:length])


@pytest.mark.parametrize("total", [0, 39, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, len(VALID) + 1])
def test_a_total_size_that_is_a_lie_is_malformed(total: int) -> None:
    with pytest.raises(MalformedTree):
        fdt.parse_tree(VALID[:4] + struct.pack(">I", total) + VALID[8:])


@pytest.mark.parametrize("blob", [b"", b"\0", bytes(40), b"\xd0\x0d\xfe", VALID[:8], b"x" * 4096])
def test_what_is_no_tree_at_all(blob: bytes) -> None:
    with pytest.raises(MalformedTree):
        fdt.check_fdt(blob)


@pytest.mark.parametrize("depth", [200, 3000])
def test_a_tree_too_deep_is_malformed_and_no_recursion_error(depth: int) -> None:
    with pytest.raises(MalformedTree):
        fdt.parse_tree(made(depth))


def test_the_v3_tree_reads_as_its_document_says() -> None:
    root = fdt.parse_tree(VALID)
    assert root.compatible == "kho-v1"
    found = {path: node.compatible for path, node in root.walk()}
    assert found == {
        "/": "kho-v1",
        "/ftrace": "ftrace-v1",
        "/ftrace/global-trace": "ftrace,array-v1",
        "/ftrace/global-trace/cpu0": "ftrace,cpu-v1",
    }
    cpu = dict(root.walk())["/ftrace/global-trace/cpu0"]
    assert len(cpu.properties["mem"]) == 4 * 16
    assert len(fdt.decode_mem(cpu)) == 4


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)), max_size=20))
def test_mem_is_native_endian_and_the_tokens_are_not(ranges: list[tuple[int, int]]) -> None:
    root = fdt.parse_tree(made(mem=b"".join(struct.pack("=QQ", *pair) for pair in ranges)))
    assert fdt.decode_mem(root) == [Region(addr, size) for addr, size in ranges]


@pytest.mark.parametrize("length", [1, 8, 15, 17])
def test_a_mem_the_kernel_would_ignore_is_reported(length: int) -> None:
    root = fdt.parse_tree(made(mem=bytes(length)))
    with pytest.raises(MalformedTree, match=str(length)):
        fdt.decode_mem(root)


def test_650_000_ranges_are_a_tree() -> None:
    """10 MiB describe about that many."""
    ranges = fdt.decode_mem(fdt.parse_tree(made(mem=bytes(16) * 650_000)))
    assert len(ranges) == 650_000


@given(st.integers(0, len(VALID) - 1), st.binary(min_size=1, max_size=4))
def test_what_libfdt_refuses_is_refused(at: int, junk: bytes) -> None:
    damaged = VALID[:at] + junk + VALID[at + len(junk) :]
    promised = struct.unpack_from(">I", damaged, 4)[0]
    if promised <= len(damaged) and libfdt.fdt_check_full(bytearray(damaged), len(damaged)) != 0:
        assert isinstance(outcome(damaged), MalformedTree)


@pytest.mark.parametrize("seed", range(40))
def test_what_libfdt_wrote_reads_as_libfdt_reads_it(seed: int) -> None:
    blob = generated.tree(seed)
    libs = libfdt.FdtRo(blob)
    for path, node in fdt.parse_tree(blob).walk():
        at = libs.path_offset(path)
        assert {key: bytes(libs.getprop(at, key)) for key in node.properties} == node.properties
        assert libs.get_name(at) == node.name


def test_reservations_and_the_header_are_read() -> None:
    writer = libfdt.FdtSw()
    writer.add_reservemap_entry(0x1000, 0x2000)
    writer.add_reservemap_entry(2**64 - 1, 1)
    writer.finish_reservemap()
    writer.begin_node("")
    writer.end_node()
    blob = bytearray(writer.as_fdt().as_bytearray())
    struct.pack_into(">I", blob, 28, 5)
    found = fdt.read_fdt(bytes(blob))
    assert found.reservations == (Region(0x1000, 0x2000), Region(2**64 - 1, 1))
    assert (found.boot_cpuid_phys, found.version) == (5, 17)


def test_a_version_16_header_ends_sooner() -> None:
    """It has no size_dt_struct; the structure block ends with its end token."""
    header = struct.pack(">9I", 0xD00DFEED, 72, 56, 72, 40, 16, 16, 0, 0) + bytes(4)
    assert fdt.parse_tree(header + bytes(16) + struct.pack(">4I", 1, 0, 2, 9)) == Node("")


def body(*tokens: bytes, names: bytes = b"a\0b\0") -> bytes:
    """A blob around the tokens of a structure block."""
    block = b"".join(tokens)
    at = 56 + len(block)
    head = struct.pack(">10I", 0xD00DFEED, at + len(names), 56, at, 40, 17, 16, 0, len(names), len(block))
    return head + bytes(16) + block + names


BEGIN, BEGIN_A, END, STOP = struct.pack(">II", 1, 0), struct.pack(">I4s", 1, b"a"), struct.pack(">I", 2), b"\0\0\0\x09"
PROP_A, PROP_B, NOP = struct.pack(">III", 3, 0, 0), struct.pack(">III", 3, 0, 2), struct.pack(">I", 4)
DAMAGED = {
    "twice the same property": (BEGIN, PROP_A, PROP_A, END, STOP),
    "twice the same child": (BEGIN, BEGIN_A, END, BEGIN_A, END, END, STOP),
    "behind a child": (BEGIN, BEGIN_A, END, PROP_A, END, STOP),
    "a second root": (BEGIN, END, BEGIN, END, STOP),
    "no end token": (BEGIN, END),
    "no end of the node": (BEGIN, STOP),
    "an unknown token": (BEGIN, struct.pack(">I", 5), END, STOP),
    "no node": (STOP,),
    "a property outside": (PROP_A, BEGIN, END, STOP),
    "a name outside the strings": (BEGIN, struct.pack(">III", 3, 0, 4), END, STOP),
    "a value longer than the tree": (BEGIN, struct.pack(">III", 3, 0xFFFFFFFF, 0), END, STOP),
    "a name without its NUL": (struct.pack(">I4s", 1, b"abcd"),),
}


@pytest.mark.parametrize("tokens", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_structure_that_is_none(tokens: tuple[bytes, ...]) -> None:
    with pytest.raises(MalformedTree):
        fdt.parse_tree(body(*tokens))


def test_nops_are_nothing() -> None:
    root = fdt.parse_tree(body(NOP, BEGIN, NOP, PROP_A, NOP, PROP_B, END, NOP, STOP))
    assert root == Node("", {"a": memoryview(b""), "b": memoryview(b"")})


def test_a_name_that_is_no_utf_8_is_kept() -> None:
    (child,) = fdt.parse_tree(body(BEGIN, struct.pack(">I4s", 1, b"\xff\xc3"), END, END, STOP)).children
    assert child.name.encode(errors="surrogateescape") == b"\xff\xc3"


def test_more_than_any_kernel_writes_is_refused_before_it_costs_memory() -> None:
    with pytest.raises(MalformedTree, match="200000"):
        fdt.parse_tree(body(BEGIN, *(struct.pack(">I8sI", 1, b"%07x" % n, 2) for n in range(200_000)), END, STOP))


def test_a_property_is_a_view_and_no_copy() -> None:
    cpu = dict(fdt.parse_tree(VALID).walk())["/ftrace/global-trace/cpu0"]
    assert cpu.properties["mem"].obj is VALID
