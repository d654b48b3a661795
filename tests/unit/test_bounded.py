# SPDX-License-Identifier: LGPL-2.1-or-later
"""A time limit that begins later than the work."""

import asyncio

import pytest

from khod.concurrency.bounded import run_within
from tests.unit.virtual import in_virtual_time, now


@in_virtual_time
async def test_a_time_limit_counts_from_its_begin() -> None:
    began, since = now(), asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_later(100, since.set_result, None)
    with pytest.raises(TimeoutError):
        await run_within(5, asyncio.sleep(1000), since)
    assert now() - began == 105


@in_virtual_time
async def test_work_that_is_done_before_its_time_limit_begins_is_not_held_up() -> None:
    began, never = now(), asyncio.get_running_loop().create_future()
    assert await run_within(5, asyncio.sleep(50, "done"), never) == "done"
    assert now() - began == 50
