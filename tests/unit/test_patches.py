# SPDX-License-Identifier: LGPL-2.1-or-later
"""The patches for asyncvarlink apply to the installed library in their order, and their own tests pass."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import asyncvarlink

from tests.unit.khods import REPOSITORY

PATCHES = sorted((REPOSITORY / "packaging/patches/asyncvarlink").glob("*.patch"))
USE = """
import pathlib, asyncvarlink
assert pathlib.Path(asyncvarlink.__file__).is_relative_to(pathlib.Path.cwd()), asyncvarlink.__file__
assert asyncvarlink.VarlinkProtocol(max_message_size=7).max_message_size == 7
assert asyncvarlink.PeerCredentials(1, 2, 3).uid == 2
"""


def test_the_patches_apply_in_order_and_their_tests_pass(tmp_path: Path) -> None:
    (source,) = asyncvarlink.__path__
    shutil.copytree(source, tmp_path / "asyncvarlink", ignore=shutil.ignore_patterns("__pycache__"))
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent), "PYTHONPATH": str(tmp_path)}

    def run(*words: str | Path) -> str:
        done = subprocess.run(
            words,
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    assert [path.name[:4] for path in PATCHES] == ["0001", "0002", "0003", "0004"]
    for path in PATCHES:
        run("git", "apply", path)
        run(sys.executable, "-c", "import asyncvarlink")
    run(sys.executable, "-c", USE)
    assert len(list((tmp_path / "tests").glob("test_*.py"))) == len(PATCHES)
    report = run(
        sys.executable, "-W", "error::ResourceWarning", "-m", "unittest", "discover", "-s", "tests", "-t", "tests"
    )
    assert "skipped" not in report
