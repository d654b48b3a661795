# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fixtures for scenarios in real guests. Nothing here skips: what is missing is an error that says what to do."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.lab import disk, saved
from tests.lab import kernels as lab_kernels
from tests.lab.guest import Guest
from tests.lab.host import HOTPLUG, KHO, TRACE
from tests.lab.process import call
from tests.lab.sshd import Operator
from tests.lab.vms import Vm
from tests.unit.luo import System

REPOSITORY = Path(__file__).parents[2]
CONSOLES = pytest.StashKey[list[Path]]()
BOOTING = {"boot", "online", "host"}
TAIL = 20_000  # characters of each console in a report

Find = Callable[[str], lab_kernels.Kernel]
Boot = Callable[..., Guest]
Online = Callable[..., Guest]


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
    """Give the disk for scenarios: the project's packages installed, all kernels, an initrd, and the v3 module."""
    module = kernels("7.3.4").module()
    versions = (*lab_kernels.VERSIONS, lab_kernels.SIGNED, lab_kernels.UPGRADE, lab_kernels.NEXT_LUO)
    files = disk.standard_files([kernels(version) for version in versions], module)
    return disk.build(packages, files)


@pytest.fixture
def boot(request: pytest.FixtureRequest, kernels: Find, tmp_path: Path) -> Iterator[Boot]:
    """Give a function that boots a guest of a kernel version; its options are Guest's.

    The disk is lab_disk unless one is given as `disk`. The guests end with the test.
    """
    with ExitStack() as stack:

        def start(version: str, *, disk: Path | None = None, **options: Any) -> Guest:
            image = disk or request.getfixturevalue("lab_disk")
            log = _console(request.node, tmp_path, version)
            return stack.enter_context(Guest(kernels(version), image, console_log=log, **options))

        yield start


@pytest.fixture
def online(request: pytest.FixtureRequest, kernels: Find, tmp_path: Path) -> Iterator[Online]:
    """Give a function that goes on with a guest of a kernel version that was booted and saved before.

    It has everything a kernel may hand over, and a port for hotplug: the more alike the guests, the fewer boots. The
    disk is lab_disk unless one is given as `disk`, `kho` what switches KHO and LUO on. The guests end with the test.
    """
    with ExitStack() as stack:

        def go_on(version: str, *, disk: Path | None = None, kho: str = KHO) -> Guest:
            image = disk or request.getfixturevalue("lab_disk")
            log = _console(request.node, tmp_path, version)
            return stack.enter_context(usual(kernels(version), image, log, kho))

        yield go_on


@pytest.fixture
def vm(system: System) -> Iterator[Callable[..., Vm]]:
    """Give a function that makes a guest with a khod-vm; its options are Vm's. They end with the test."""
    made: list[Vm] = []

    def make(name: str = "one", command: list[str] | None = None, **options: Any) -> Vm:
        made.append(Vm(system, name, command, **options))
        return made[-1]

    yield make
    for each in made:
        each.die()


def usual(kernel: lab_kernels.Kernel, disk: Path, console_log: Path, kho: str = KHO) -> Guest:
    """Give the guest of `online`, for a fixture of another scope."""
    return saved.resumed(kernel, disk, console_log=console_log, cmdline_extra=f"{kho} {TRACE}", qemu_extra=HOTPLUG)


def _console(item: pytest.Item, folder: Path, version: str) -> Path:
    """Name the log of another console, and note it for the report of a failure."""
    logs = item.stash.setdefault(CONSOLES, [])
    logs.append(folder / f"console-{len(logs)}-{re.sub('[^0-9a-z.]', '', version)}.log")
    return logs[-1]


@pytest.fixture
def operator(tmp_path: Path) -> Iterator[Operator]:
    """Give somebody with ssh and khoctl who has the key to every host that is added."""
    directory = tmp_path / "operator"
    directory.mkdir()
    made = Operator(directory)
    yield made
    made.close()
