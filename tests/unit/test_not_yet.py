# SPDX-License-Identifier: LGPL-2.1-or-later
"""A producer that says `not_yet`, and is overtaken."""

import asyncio
import threading
from pathlib import Path

from khod.producer import Producer, Step
from tests.unit.khods import Khod


async def test_whoever_is_called_off_while_it_says_not_yet_hears_the_undo(tmp_path: Path) -> None:
    """The undo is the answer to `not_yet`: it must not be lost between the handler and the library."""
    khod = Khod(tmp_path)
    told: list[str] = []
    deep, thawed = threading.Event(), threading.Event()

    def freeze(step: Step) -> None:
        told.append("freeze")
        deep.set()
        while True:
            step.not_yet("copying", 0.5)

    def thaw(_step: Step) -> None:
        told.append("thaw")

    def cancel(_step: Step) -> None:
        told.append("cancel")
        thawed.set()

    producer = Producer("kv", freeze=freeze, thaw=thaw, cancel=cancel, socket=khod.socket)
    try:
        await asyncio.to_thread(producer.start)
        activating = asyncio.ensure_future(asyncio.to_thread(khod.khoctl, "activate"))
        assert await asyncio.to_thread(deep.wait, 20)
        assert (await asyncio.to_thread(khod.khoctl, "abort")).code == 0
        assert (await activating).code == 1
        assert await asyncio.to_thread(thawed.wait, 20)
    finally:
        producer.stop()
        khod.close()
    assert told == ["freeze", "thaw", "cancel"]
