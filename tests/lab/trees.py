# SPDX-License-Identifier: LGPL-2.1-or-later
"""A kernel's trees out of its own files, held against dtc and fdtget, and against khoctl's word on them."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from khod.abi import fdt
from khod.trees.as_json import tree_as_json
from khod.trees.source import write_dts
from tests.dtc import agrees
from tests.lab.host import Host

DEBUGFS = "/sys/kernel/debug/kho"
V3 = {"out": "/sys/kernel/kho/dt", "in": "/sys/firmware/kho/dt"}
ROOT = ""  # the root's name among the blobs, as on the wire


def v3(host: Host, side: str) -> dict[str, bytes]:
    """Read a side, `out` or `in`, where the kernel has the v3 interface: a root and nothing else."""
    return {ROOT: host.guest.get(V3[side])}


def mainline(host: Host, side: str) -> dict[str, bytes]:
    """Read a side, `out` or `in`, from debugfs; a root that is not there comes as nothing."""
    place = f"{DEBUGFS}/{side}"
    files = host.shell(f"cd {place}; ls -d fdt sub_fdts/* || true").split()
    return {ROOT: b""} | {
        ROOT if file == "fdt" else Path(file).name: host.guest.get(f"{place}/{file}") for file in files
    }


def held(
    host: Host,
    side: str,
    blobs: Mapping[str, bytes],
    tmp: Path,
    *,
    cut: Collection[str] = (),
    other: Collection[str] = (),
    freed: Collection[str] = (),
) -> set[str]:
    """Hold what khoctl, dtc and fdtget say of a side against its blobs; give the names of those that are whole FDTs.

    What is not one is named by the caller and must be what it is said to be: of the `cut` debugfs shows less than
    their headers promise, the `other` are a C structure or not there. In the pages of the `freed` may stand anything.
    """
    named = {name: blob for name, blob in blobs.items() if name not in freed}
    assert {name for name, blob in named.items() if fdt.missing_size(blob)} == set(cut)
    assert {name for name, blob in named.items() if not blob.startswith(fdt.U32.pack(fdt.MAGIC))} == set(other)

    shown = json.loads(host.khoctl("dt", "show", side, "--json").stdout)
    assert shown.keys() == {name or "root" for name in blobs}
    assert {name: tree for name, tree in shown.items() if name not in freed} == tree_as_json(named)

    whole = named.keys() - set(cut) - set(other)
    for name in sorted(whole):
        exported = host.khoctl("dt", "export", side, "--blob", name or "root", "--format", "dts").stdout
        assert exported == write_dts(blobs[name])[0]
        agrees(blobs[name], tmp)
    return whole


def differing(host: Host, left: str, right: str, code: int) -> set[str]:
    """Give the names of the blobs in which khoctl finds two trees to differ, or cannot tell whether they do."""
    return {found["blob"] for found in json.loads(host.khoctl("dt", "diff", left, right, "--json", code=code).stdout)}
