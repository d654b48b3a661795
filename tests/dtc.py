# SPDX-License-Identifier: LGPL-2.1-or-later
"""What dtc and fdtget say about a tree, held against what ours says: for unit tests and for the lab's real trees."""

import re
import subprocess
from pathlib import Path
from typing import Any

from khod.trees.as_json import tree_as_json
from khod.trees.source import write_dts


def dtc(form: str, data: bytes, *options: str) -> bytes:
    """Run dtc on a tree in `form` (dts or dtb); the blob it makes. What it warns about is not asked for."""
    argv = ["dtc", "-q", "-q", "-I", form, "-O", "dtb", *options]
    return subprocess.run(argv, input=data, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True).stdout


def agrees(blob: bytes, tmp: Path) -> None:
    """Assert that `khoctl dt export` and `dtc` lose nothing of a blob, and that fdtget reads in it what we read."""
    compiles(blob)
    reads(blob, tmp)


def compiles(blob: bytes) -> None:
    """Assert that the source compiles to the blob's own bytes, or where it says it does not, to dtc's of the blob."""
    source, note = write_dts(blob)
    told = re.match(r"/dts-v1/;\n/\* `dtc -I dts -O dtb(.*?)`", source)
    assert told, "the source does not say how it is compiled"
    options = told[1].split()
    made = dtc("dts", source.encode(), *options)
    assert made == (dtc("dtb", blob, *options) if note else blob)
    assert not note or made != blob, "the source says that the bytes are others, and they are the same"


def reads(blob: bytes, tmp: Path) -> None:
    """Assert that every node, property and byte is what fdtget says."""
    path = tmp / "agrees.dtb"
    path.write_bytes(blob)
    nodes = dict(_walk("", tree_as_json({"": blob})["root"]))
    asked = [(where, key) for where, node in nodes.items() for key in node["properties"]]
    words = [word for pair in asked for word in pair]
    values = _fdtget("-t", "bx", "--", str(path), *words) if words else []
    assert [_hex(line) for line in values] == [nodes[where]["properties"][key]["raw"] for where, key in asked]
    for where, node in nodes.items():
        assert _fdtget("-p", "--", str(path), where) == list(node["properties"])
        assert _fdtget("-l", "--", str(path), where) == list(node["children"])


def _walk(path: str, node: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    below = [found for name, child in node["children"].items() for found in _walk(f"{path}/{name}", child)]
    return [(path or "/", node), *below]


def _fdtget(*words: str) -> list[str]:
    return subprocess.run(["fdtget", *words], capture_output=True, check=True, text=True).stdout.splitlines()


def _hex(line: str) -> str:
    return "".join(byte.zfill(2) for byte in line.split())
