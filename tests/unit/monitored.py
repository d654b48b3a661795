# SPDX-License-Identifier: LGPL-2.1-or-later
"""States of a host as monitoring may find them, for unit tests and for promtool in the lab."""

from dataclasses import replace

from khod.history.model import AttemptSummary, Standstill
from khod.metrics.table import MetricFacts
from khod.model import (
    Finding,
    FindingSource,
    Generation,
    NotUndone,
    Phase,
    Producer,
    Status,
    StepTiming,
    Verdict,
)

HOSTILE = '<script>alert("x")</script>\n# TYPE kho_x gauge\nkho_x{a="\\"} 1\r\x1b[2J\\\\ \udcff\u2028'
"""A name that would end a label, a line, or a page."""

BARE = Status(
    phase=Phase.idle,
    summary="No handover is under way.",
    remedy="",
    exit_code=0,
    generation=Generation.none,
    kernel_active=None,
    kernel_loaded=None,
    kernel_release="",
    boot_id="",
    run="",
    done=[],
    left=[],
    waiting_for=[],
    producers=[],
    verdict=None,
    previous_release="",
    handovers=0,
    blackout_seconds=None,
    timings=[],
    last_error="",
    stale=True,
)
"""A host of which khod knows nothing yet."""

LAST = AttemptSummary(
    run="0123456789ab",
    began_at=1790000000.0,
    ended_at=1790000012.5,
    outcome=Phase.degraded,
    reason="producer db: gone",
    from_release="7.3.4",
    to_release="7.3.4",
    blackout_seconds=2.75,
    blackout_error_seconds=0.001,
    by="root",
    first_boot_id="a" * 32,
    last_boot_id="b" * 32,
)
COUNTS = {Phase.verified: 41, Phase.degraded: 2, Phase.idle: 7}


def producer(name: str, phase: str, answer: str, seconds: float = 0.5, *, waiting: bool = False) -> Producer:
    """One row of the status."""
    return Producer(name, "hook", 0, phase, answer, seconds, waiting, None)


ARRIVED = replace(
    BARE,
    phase=Phase.degraded,
    outcome=Phase.degraded,
    generation=Generation.stateless,
    kernel_release="7.3.4",
    handovers=3,
    blackout_seconds=2.5,
    timings=[StepTiming("prepare", 1.0, 0.25), StepTiming("freeze", 2.0, 1.5)],
    stale=False,
    claims=["db"],
    producers=[
        producer("db", "restore", "gone"),
        producer("cache", "restore", "ready", 1.25),
        producer("web", "restore", "", waiting=True),
        producer("new", "", ""),
    ],
    verdict=Verdict(findings=[Finding.of_producer("db", "gone"), Finding("", "torn", FindingSource.content)]),
)
FAILED = replace(BARE, phase=Phase.failed, foreign=True, not_undone=[NotUndone("freeze", "db", "hangs", "wait")] * 2)
MANY = replace(
    ARRIVED,
    kernel_release=HOSTILE,
    producers=[producer(f"{number}{HOSTILE}", "freeze", HOSTILE, float(number)) for number in range(1000)],
    timings=[StepTiming("freeze", 1.0, 1.0), StepTiming("freeze", 2.0, 2.0), StepTiming(HOSTILE, 1.0, 1e-9)],
)

STANDSTILLS = [Standstill("guest", "vm", 2.25, 0.001, 2.125), Standstill("cache", "hook", 2.0, 0.001)]

STATES = {
    "bare": MetricFacts(BARE),
    "arrived": MetricFacts(ARRIVED, COUNTS, LAST, STANDSTILLS),
    "not undone": MetricFacts(FAILED, {Phase.failed: 1}, replace(LAST, outcome=Phase.failed, blackout_seconds=None)),
    "many": MetricFacts(MANY, COUNTS, LAST, [replace(STANDSTILLS[0], name=HOSTILE, kind=HOSTILE)]),
    **{phase.value: MetricFacts(replace(ARRIVED, phase=phase)) for phase in Phase},
}
