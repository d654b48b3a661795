# SPDX-License-Identifier: LGPL-2.1-or-later
"""The blackout figure: from the first producer told `freeze` to the last that answered `finish`, or unknown."""

import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from khoctl.status_page import render_status
from khod.handover import verify
from khod.model import Phase, Status
from khod.simulated.kernel import Rebooted
from tests.unit.harness import Host
from tests.unit.scripted import Scripted
from tests.unit.test_render import status

FREEZE, JUMP, RESTORE, FINISH = 4.0, 2.0, 0.5, 0.25
"""Seconds each takes by the test's clock; powers of two, so that their sum is exact."""


class WallClock:
    """time.time(), which goes on where something `takes` time."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def takes(self, seconds: float) -> Callable[[], Awaitable[None]]:
        async def pass_time() -> None:
            self.now += seconds

        return pass_time


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> WallClock:
    made = WallClock()
    monkeypatch.setattr(time, "time", lambda: made.now)
    return made


async def handed_over(host: Host, clock: WallClock, *, jump: float = JUMP, uptime: str = "") -> Status:
    """How it stands after a handover with one producer."""
    takes = clock.takes
    Scripted(host, "a", restores=True, freeze=takes(FREEZE), restore=takes(RESTORE), finish=takes(FINISH))
    engine = await host.started()
    with pytest.raises(Rebooted):
        await host.kexec(engine)
    clock.now += jump
    if uptime:
        host.kernel.host_path("/proc/uptime").write_text(uptime)
    engine = await host.started()
    while engine.record.outcome is Phase.idle:
        await host.seen(lambda _event: True)
    return await engine.queries.status()


async def test_it_counts_from_the_first_freeze_to_the_last_finish(host: Host, clock: WallClock) -> None:
    found = await handed_over(host, clock)
    assert found.phase is Phase.verified
    assert found.blackout_seconds == FREEZE + JUMP + RESTORE + FINISH
    assert "6.8 s ± 1.0 s" in render_status(found)


@pytest.mark.parametrize(("jump", "uptime"), [(-3600.0, ""), (JUMP, "40.0 80.0\n")])
async def test_a_clock_that_was_set_back_tells_nothing(host: Host, clock: WallClock, jump: float, uptime: str) -> None:
    """Neither negative seconds, nor fewer than the new kernel alone has been up."""
    found = await handed_over(host, clock, jump=jump, uptime=uptime)
    assert found.blackout_seconds is None
    assert "blackout    unknown" in render_status(found)


@pytest.mark.parametrize(
    ("began", "ended", "uptime", "seconds"),
    [
        (100.0, 130.0, None, 30.0),
        (100.0, 130.0, 30.5, 30.0),  # the hardware clock has seconds
        (100.0, 130.0, 31.5, None),
        (100.0, 99.0, None, None),
        (0.0, 130.0, None, None),
    ],
)
def test_what_a_clock_is_trusted_with(began: float, ended: float, uptime: float | None, seconds: float | None) -> None:
    assert verify.blackout_seconds(began, ended, uptime) == seconds


def test_it_is_not_over_for_those_who_have_not_come_back() -> None:
    assert "not over" in render_status(replace(status(Phase.degraded), claims=["db"]))
    assert "not over" not in render_status(status(Phase.degraded))
