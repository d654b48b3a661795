# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a call gives when its caller no longer waits for it: closed or kept, never lost."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from khod.engine.startup import ASK_AGAIN_SECONDS
from khod.errors import Failed
from khod.kernel.luo import Luo
from khod.kernel.memory import MemoryBounds
from khod.model import Kept
from khod.producers.sessions import Sessions
from tests.unit.harness import KeptFds
from tests.unit.luo import memfd
from tests.unit.virtual import HangsError, InlineWorker, VirtualHost, in_virtual_time, now

SESSION = "khod-run-a"


class HangingLuo:
    """Makes and takes sessions, each a descriptor, once `comes_back` is set; counts how often."""

    def __init__(self) -> None:
        self.comes_back = False
        self.opened: list[int] = []

    def _session(self, _name: str) -> int:
        if not self.comes_back:
            raise HangsError
        self.opened.append(os.open("/dev/null", os.O_RDONLY))
        return self.opened[-1]

    create_session = retrieve_session = _session

    def retrieve_files(self, _session: int, kept: tuple[Kept, ...]) -> list[int]:
        return [os.open("/dev/null", os.O_RDONLY) for _ in kept]


def made(luo: HangingLuo) -> tuple[Sessions, InlineWorker, KeptFds]:
    worker, store = InlineWorker("kernel", "The kernel"), KeptFds()
    return Sessions(cast("Luo", luo), worker, store, memory=lambda: MemoryBounds(1 << 40, 1 << 40)), worker, store


def is_open(fd: int) -> bool:
    return os.path.exists(f"/proc/self/fd/{fd}")


async def ends_late(worker: InlineWorker, call: Callable[[], int], late: list[int]) -> None:
    with pytest.raises(Failed):
        await worker.call_within(call, "a call", 5.0, late.append)


async def is_cancelled(worker: InlineWorker, call: Callable[[], int], late: list[int]) -> None:
    waiting = asyncio.ensure_future(worker.call_within(call, "a call", None, late.append))
    await asyncio.sleep(1)
    waiting.cancel()
    await asyncio.wait({waiting})


@pytest.mark.parametrize("given_up", [ends_late, is_cancelled])
@in_virtual_time
async def test_what_comes_late_is_handed_over(given_up: Callable[..., object]) -> None:
    worker, late, answers = InlineWorker("kernel", "The kernel"), list[int](), list[int]()

    def call() -> int:
        if not answers:
            raise HangsError
        return answers.pop()

    await given_up(worker, call, late)  # type: ignore[misc]
    assert late == []
    answers.append(7)
    worker.come_back()
    await asyncio.sleep(0)
    assert late == [7]


@in_virtual_time
async def test_what_comes_in_time_is_its_caller_s_alone() -> None:
    late: list[int] = []
    assert await InlineWorker("kernel", "The kernel").call_within(lambda: 7, "a call", 5.0, late.append) == 7
    await asyncio.sleep(0)
    assert late == []


@in_virtual_time
async def test_an_outgoing_session_that_is_made_late_is_closed() -> None:
    luo = HangingLuo()
    sessions, worker, store = made(luo)
    table = memfd(b"table")
    with pytest.raises(Failed):
        await sessions.preserve_files(SESSION, [(Kept("table", 7), table)], 5.0)
    luo.comes_back = True
    worker.come_back()
    await asyncio.sleep(0)
    os.close(table)
    assert [is_open(fd) for fd in luo.opened] == [False]
    assert (sessions.session_names, store.kept) == ([], {})


@in_virtual_time
async def test_a_session_that_is_taken_late_stays_its_producer_s() -> None:
    """The kernel gives it once: whoever lost it would have lost the memory."""
    luo = HangingLuo()
    sessions, worker, store = made(luo)
    with pytest.raises(Failed):
        await sessions.retrieve_files(SESSION, [Kept("table", 7)], 5.0)
    luo.comes_back = True
    worker.come_back()
    await asyncio.sleep(0)
    assert [is_open(fd) for fd in luo.opened] == [True]
    assert list(store.kept) == [SESSION]
    (table,) = await sessions.retrieve_files(SESSION, [Kept("table", 7)], 5.0)
    assert len(luo.opened) == 1
    for fd in (table, *luo.opened, *store.kept.values()):
        os.close(fd)


@in_virtual_time
async def test_a_start_that_cannot_ask_the_kernel_asks_again_after_a_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = VirtualHost(tmp_path)
    asked: list[float] = []

    def release(_kexec: object) -> str:
        asked.append(now())
        if len(asked) < 4:
            raise OSError(5, "Input/output error")
        return "7.3.4"

    monkeypatch.setattr("khod.kernel.kexec.Kexec.kernel_release", release)
    await host.started()
    assert asked[:4] == [number * ASK_AGAIN_SECONDS for number in range(4)]
