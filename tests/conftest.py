# SPDX-License-Identifier: LGPL-2.1-or-later
"""The order in which files are taken: under `--dist loadfile` a long one must not be left at the end; one fixture."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.budget import PROOF
from tests.unit.luo import System

LONGEST = (
    # Of the unit tests
    "test_ansible_rolling",
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
    """Keep xdist from sorting the files by how many tests they have, and let interrupts reach what tests start.

    A shell ignores SIGINT for what it starts in the background, and so would every program that a test interrupts.
    """
    config.option.loadscopereorder = False
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the longest files first, and leave out what is marked `proof` but in `make proof`.

    With an argument the mark counts only where that is the test's `host`.
    """
    if not PROOF:
        left_out = [item for item in items if any(_only_proof(item, mark) for mark in item.iter_markers("proof"))]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def _only_proof(item: pytest.Item, mark: pytest.Mark) -> bool:
    """Whether a mark `proof` leaves this test out."""
    return not mark.args or (isinstance(item, pytest.Function) and item.callspec.params.get("host") in mark.args)


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    """A machine below a directory, for khods as processes on the simulated kernel."""
    made = System(tmp_path)
    yield made
    made.close()
