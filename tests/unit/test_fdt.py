"""State trees as bytes from outside: whatever they are, a tree comes out or MalformedTree."""

import struct
import subprocess
from pathlib import Path

import libfdt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from khod import tree
from khod.abi import fdt
from khod.abi.fdt import Node
from khod.errors import MalformedTree
from khod.kernel.simulated import serialize
from khod.model import Region

VALID = serialize(4)


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
        return fdt.parse(blob, "here")
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
            fdt.parse(VALID[:length])


@pytest.mark.parametrize("total", [0, 39, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, len(VALID) + 1])
def test_a_total_size_that_is_a_lie_is_malformed(total: int) -> None:
    with pytest.raises(MalformedTree):
        fdt.parse(VALID[:4] + struct.pack(">I", total) + VALID[8:])


@pytest.mark.parametrize("blob", [b"", b"\0", bytes(40), b"\xd0\x0d\xfe", VALID[:8], b"x" * 4096])
def test_what_is_no_tree_at_all(blob: bytes) -> None:
    with pytest.raises(MalformedTree):
        fdt.check(blob)


@pytest.mark.parametrize("depth", [200, 3000])
def test_a_tree_too_deep_is_malformed_and_no_recursion_error(depth: int) -> None:
    with pytest.raises(MalformedTree):
        fdt.parse(made(depth))


def test_the_v3_tree_reads_as_its_document_says() -> None:
    root = fdt.parse(VALID)
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
    assert len(fdt.mem(cpu)) == 4


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)), max_size=20))
def test_mem_is_native_endian_and_the_tokens_are_not(ranges: list[tuple[int, int]]) -> None:
    root = fdt.parse(made(mem=b"".join(struct.pack("=QQ", *pair) for pair in ranges)))
    assert fdt.mem(root) == [Region(addr, size) for addr, size in ranges]


@pytest.mark.parametrize("length", [1, 8, 15, 17])
def test_a_mem_the_kernel_would_ignore_is_reported(length: int) -> None:
    root = fdt.parse(made(mem=bytes(length)))
    with pytest.raises(MalformedTree, match=str(length)):
        fdt.mem(root)
    assert "ignores" in "\n".join(tree.show({"": made(mem=bytes(length))}))


def test_650_000_ranges_are_a_tree() -> None:
    """10 MiB describe about that many."""
    ranges = fdt.mem(fdt.parse(made(mem=bytes(16) * 650_000)))
    assert len(ranges) == 650_000


def test_source_of_a_tree_compiles_to_the_same_tree(tmp_path: Path) -> None:
    (tmp_path / "tree.dts").write_text(tree.dts(VALID))
    subprocess.run(
        ["dtc", "-q", "-I", "dts", "-O", "dtb", "-o", tmp_path / "tree.dtb", tmp_path / "tree.dts"], check=True
    )
    assert fdt.parse((tmp_path / "tree.dtb").read_bytes()) == fdt.parse(VALID)


@given(st.binary(max_size=60))
def test_a_blob_that_is_no_tree_is_shown_as_bytes(blob: bytes) -> None:
    """From 7.1 on a producer's blob need not be an FDT."""
    lines = list(tree.show({"": VALID, "LUO": blob}))
    assert f"LUO: {len(blob)} bytes" in lines
