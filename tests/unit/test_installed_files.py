# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every package lays out, and that the same files give the same archive."""

import subprocess
from pathlib import Path

import pytest

from tests.unit.khods import REPOSITORY

PACKAGING = REPOSITORY / "packaging"
MODULES = "/usr/lib/python3/dist-packages"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("root")
    subprocess.run([PACKAGING / "install-files", directory, MODULES], cwd=REPOSITORY, check=True)
    return directory


@pytest.mark.parametrize(
    "files", ["systemd/**/*", "etc/kho/**/*", "packaging/apparmor/*", "packaging/man/*", "packaging/examples/**/*"]
)
def test_no_file_is_forgotten(root: Path, files: str) -> None:
    laid_out = {(path.name, path.read_bytes()) for path in root.rglob("*") if path.is_file()}
    found = {(path.name, path.read_bytes()) for path in REPOSITORY.glob(files) if path.is_file()}
    assert found
    assert {name for name, _ in found - laid_out} == set()


def test_the_programs_and_the_schemas_are_there(root: Path) -> None:
    assert {path.name for path in (root / "usr/bin").iterdir()} == {path.name for path in (PACKAGING / "bin").iterdir()}
    assert all(path.stat().st_mode & 0o777 == 0o755 for path in (root / "usr/bin").iterdir())
    assert list((root / MODULES[1:] / "khod/trees/schemas").glob("*.json"))


def test_two_archives_of_the_same_files_are_the_same(root: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (root / "usr/bin/khod").touch()
        subprocess.run([PACKAGING / "pack-files", root / "usr", tmp_path / name], check=True)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
