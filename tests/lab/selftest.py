# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel's own selftests of LUO, built from the sources of the lab's kernels: oracles that no one here wrote."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.lab import cache
from tests.lab.archive import KernelArchive
from tests.lab.process import call

VERSION = "7.3.4"
FOLDER = "tools/testing/selftests/liveupdate"
WANTED = (FOLDER, "tools/testing/selftests/kselftest.h", "include/uapi/linux/liveupdate.h")


def build(name: str) -> Path:
    """Give a selftest as a program that needs nothing of the guest, or take it cached. LabError."""
    return cache.once(cache.directory() / "selftests" / f"{name}-{VERSION}", lambda path: _compile(name, path))


def _compile(name: str, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="selftest-") as place:
        tarball, tree = KernelArchive().tarball(VERSION, Path(place)), Path(place) / "tree"
        tree.mkdir()
        unpack = ("tar", "--extract", "--strip-components=1", "--file", tarball, "--directory", tree, "--wildcards")
        call([*unpack, *(f"*/{path}" for path in WANTED)])
        folder = tree / FOLDER
        headers = ("-I", folder / "lib/include", "-I", tree / "include/uapi")
        call(["gcc", "-static", "-O2", *headers, folder / f"{name}.c", folder / "lib/lu_utils.c", "-o", target])
