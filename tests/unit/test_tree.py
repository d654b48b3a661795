"""Trees for people: text, JSON, and source that dtc turns back into the same tree."""

import json
import shutil
import struct
import subprocess

import libfdt
import pytest

from khod import tree
from khod.abi import fdt
from khod.kernel.simulated import serialize


def test_a_v3_tree_is_shown_with_its_ranges_added_up() -> None:
    shown = "\n".join(tree.show({"": serialize(3)}))
    assert 'compatible = "kho-v1"' in shown
    assert "3 ranges, 12 KiB" in shown  # three pages of 4096 bytes


def test_a_mem_property_the_kernel_would_ignore_is_said_to_be_one() -> None:
    made = libfdt.FdtSw()
    made.finish_reservemap()
    made.begin_node("")
    made.property("mem", b"\0" * 17)
    made.end_node()
    shown = "\n".join(tree.show({"": bytes(made.as_fdt().as_bytearray())}))
    assert "no multiple of 16" in shown


def test_a_blob_that_is_no_tree_is_shown_as_bytes() -> None:
    metadata = struct.pack("=I65sI", 1, b"7.3.4", 2)  # kexec-metadata since 7.0
    assert list(tree.show({"kexec-metadata": metadata}))[1].split()[:4] == ["01", "00", "00", "00"]


def test_json_has_every_property() -> None:
    plain = json.loads(json.dumps(tree.plain({"": serialize(1), "other": b"\1\2"})))
    cpu = plain["root"]["children"]["ftrace"]["children"]["global-trace"]["children"]["cpu0"]
    assert cpu["properties"]["mem"] == struct.pack("=QQ", 0x40000000, 0x1000).hex()
    assert plain["other"]["bytes"] == "0102"


@pytest.mark.parametrize("ranges", [0, 1, 100])
def test_dtc_turns_the_source_back_into_the_same_tree(ranges: int) -> None:
    blob = serialize(ranges)
    dtc = shutil.which("dtc")
    assert dtc, "dtc is missing: apt-get install device-tree-compiler"
    again = subprocess.run(
        [dtc, "-q", "-I", "dts", "-O", "dtb"], input=tree.dts(blob).encode(), capture_output=True, check=True
    ).stdout
    assert fdt.parse(again) == fdt.parse(blob)
