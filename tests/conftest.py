# SPDX-License-Identifier: LGPL-2.1-or-later
"""The order in which files are taken: under `--dist loadfile` a long one must not be left at the end; one fixture."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.luo import System

LONGEST = (
    # Of the unit tests
    "test_producer",
    "test_fuzz",
    "test_bombs",
    "test_operator_table",
    "test_many",
    "test_attackers",
    # Of the lab
    "test_assessment",
    "test_safety",
    "test_put_back",
    "test_mainline",
    "test_unit",
    "test_formats",
    "test_sources",
    "test_producers",
    "test_signed",
    "test_unsupported",
    "test_liveupdate",
    "test_v3",
    "test_lab",
)


def pytest_configure(config: pytest.Config) -> None:
    """Keep xdist from sorting the files by how many tests they have."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    """A machine below a directory, for khods as processes on the simulated kernel."""
    made = System(tmp_path)
    yield made
    made.close()
