"""Fixtures for scenarios in real guests. Nothing here skips: what is missing is an error that says what to do."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.lab import disk
from tests.lab import kernels as lab_kernels
from tests.lab.guest import Guest
from tests.lab.process import call

REPOSITORY = Path(__file__).parents[2]
CONSOLES = pytest.StashKey[list[Path]]()
BOOTING = {"boot", "guest"}
TAIL = 20_000  # characters of each console in a report

Find = Callable[[str], lab_kernels.Kernel]
Boot = Callable[..., Guest]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that boots something as `lab`, so that -m "not lab" leaves the quick ones."""
    for item in items:
        if BOOTING & set(getattr(item, "fixturenames", ())):
            item.add_marker("lab")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Attach what the guests' consoles said to the report of a failure."""
    report = yield
    if report.failed:
        for log in item.stash.get(CONSOLES, []):
            text = log.read_bytes().decode(errors="replace") if log.exists() else "(nothing)"
            report.sections.append((f"console {log}", text[-TAIL:]))
    return report


@pytest.fixture(scope="session")
def kernels() -> Find:
    """Give the function that finds a kernel by its version: prebuilt, cached, or built now."""
    return functools.cache(lab_kernels.find)


@pytest.fixture(scope="session")
def plain_disk(kernels: Find) -> Path:
    """Give a disk with the kernels and an initrd, but nothing of the project's."""
    return disk.build([], disk.standard_files([kernels(version) for version in lab_kernels.VERSIONS]))


@pytest.fixture(scope="session")
def packages() -> list[Path]:
    """Give the project's packages as `make deb` leaves them in dist/: those of the newest version."""
    call(["make", "deb"], cwd=REPOSITORY)
    found = sorted((REPOSITORY / "dist").glob("*.deb"), key=lambda deb: deb.stat().st_mtime)
    assert found, "make deb left no package in dist/"
    version = found[-1].name.split("_")[1]
    return [deb for deb in found if deb.name.split("_")[1] == version]


@pytest.fixture(scope="session")
def lab_disk(kernels: Find, packages: list[Path]) -> Path:
    """Give the disk for scenarios: the project's packages installed, the kernels, an initrd, and the v3 module."""
    module = kernels("7.3.4").module()
    files = disk.standard_files([kernels(version) for version in lab_kernels.VERSIONS], module)
    return disk.build(packages, files)


@pytest.fixture
def boot(request: pytest.FixtureRequest, kernels: Find, tmp_path: Path) -> Iterator[Boot]:
    """Give a function that boots a guest of a kernel version; its options are Guest's.

    The disk is lab_disk unless one is given as `disk`. The guests end with the test.
    """
    with ExitStack() as stack:

        def start(version: str, *, disk: Path | None = None, **options: Any) -> Guest:
            logs = request.node.stash.setdefault(CONSOLES, [])
            logs.append(tmp_path / f"console-{len(logs)}-{re.sub('[^0-9a-z.]', '', version)}.log")
            image = disk or request.getfixturevalue("lab_disk")
            return stack.enter_context(Guest(kernels(version), image, console_log=logs[-1], **options))

        yield start
