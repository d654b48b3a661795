# SPDX-License-Identifier: LGPL-2.1-or-later
"""The Ansible collection's own functions, without Ansible."""

import importlib
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from tests.unit.khods import REPOSITORY

COLLECTION = REPOSITORY / "packaging/ansible"


@cache
def _install_for_import() -> "tempfile.TemporaryDirectory[str]":
    """Make a directory in which the collection has the name under which its modules import each other."""
    directory = tempfile.TemporaryDirectory(prefix="khod-collection-")
    install_collection(Path(directory.name))
    sys.path.insert(0, directory.name)
    return directory


def install_collection(directory: Path) -> None:
    """Install the collection below `directory`, as a link to the sources."""
    namespace = directory / "ansible_collections/khod"
    namespace.mkdir(parents=True)
    (namespace / "kho").symlink_to(COLLECTION)


def load_util(name: str) -> Any:
    """Import one of the collection's `module_utils`."""
    _install_for_import()
    return importlib.import_module(f"ansible_collections.khod.kho.plugins.module_utils.{name}")
