# SPDX-License-Identifier: LGPL-2.1-or-later
"""dtc agrees: what is exported compiles to the same tree, and fdtget reads in a blob what we read."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from khod.errors import UsageError
from khod.simulated.kernel import build_tree
from khod.trees.source import write_dts
from tests.budget import repetitions
from tests.dtc import agrees, compiles, dtc, reads
from tests.unit.generated import tree
from tests.unit.test_fdt import made

GENERATED = repetitions(10_000, test=1_000)
READ = repetitions(200, test=50)
"""Of these also held against fdtget, which runs twice a node."""


def test_generated_trees_compile_to_the_same_tree() -> None:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(lambda seed: compiles(tree(seed)), range(GENERATED), chunksize=100):
            pass


@pytest.mark.parametrize("seed", range(0, GENERATED, GENERATED // READ))
def test_fdtget_reads_the_same(tmp_path: Path, seed: int) -> None:
    reads(tree(seed), tmp_path)


@pytest.mark.parametrize("ranges", [0, 1, 100, 10_000])
def test_a_v3_tree(tmp_path: Path, ranges: int) -> None:
    agrees(build_tree(ranges), tmp_path)


@pytest.mark.parametrize("seed", range(50))
def test_what_dtc_laid_out_comes_back_byte_for_byte(seed: int) -> None:
    blob = dtc("dtb", tree(seed), "-f")
    source, note = write_dts(blob)
    assert not note
    assert "makes the same bytes" in source.splitlines()[1]
    compiles(blob)


@pytest.mark.parametrize("options", [("-V", "16"), ("-S", "4096"), ("-b", "7"), ("-V", "16", "-S", "1000", "-b", "1")])
def test_what_stands_in_no_source_stands_in_the_command(options: tuple[str, ...]) -> None:
    blob = dtc("dtb", build_tree(3), *options)
    source, note = write_dts(blob)
    assert not note
    assert all(word in source.splitlines()[1] for word in options)
    compiles(blob)


def test_what_the_kernel_laid_out_is_said_to_come_back_in_another_layout() -> None:
    source, note = write_dts(build_tree(3))
    assert "not the identical bytes" in note
    assert note in source.splitlines()[1]


@pytest.mark.parametrize("name", ["a b", "a/b", "ä", "a{", "a;b"])
def test_a_name_that_no_source_can_hold(name: str) -> None:
    blob = made(2).replace(b"n1\0\0", name.encode().ljust(4, b"\0"))
    with pytest.raises(UsageError, match="`format=json`"):
        write_dts(blob)
