# SPDX-License-Identifier: LGPL-2.1-or-later
"""Coroutine tests run in an event loop of their own, under one deadline; fixtures every file shares."""

import asyncio
import gc
import inspect
import os
import signal
import threading
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.unit.harness import Host

DEADLINE = 30.0  # seconds; a test that needs it has hung
MAX_THREADS = 100
"""Threads of khods that are over end when these are collected; seteuid(2) interrupts every one that is there."""

# pytest-xdist gives its workers a width, at which khoctl would fold what it prints.
os.environ.pop("COLUMNS", None)

# A shell starts what it runs in the background with SIGINT ignored, and so would be what the tests start from there.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples every time, no clock, nothing kept between runs.
settings.register_profile("unit", derandomize=True, deadline=None, database=None, max_examples=80)
settings.load_profile("unit")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    wanted = inspect.signature(pyfuncitem.obj).parameters
    arguments = {name: pyfuncitem.funcargs[name] for name in wanted}

    async def bounded() -> None:
        async with asyncio.timeout(DEADLINE):
            await pyfuncitem.obj(**arguments)

    asyncio.run(bounded())
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, bool | None, bool | None]:
    done = yield
    if threading.active_count() > MAX_THREADS:
        gc.collect()
    return done


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str, bytes], Path]:
    def make(name: str, contents: bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(contents)
        return path

    return make
