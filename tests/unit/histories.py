# SPDX-License-Identifier: LGPL-2.1-or-later
"""Attempts for tests of the history."""

from dataclasses import replace
from pathlib import Path

from khod.history.database import Database
from khod.history.model import (
    AttemptRecord,
    AttemptSummary,
    BootCost,
    ImageFacts,
    KernelFacts,
    RowKind,
    RunTarget,
    Timeline,
)
from khod.history.opening import open_database
from khod.model import Check, CheckResult, Event, Fate, Finding, Phase, Verdict, Word

BEGAN_AT = 1_790_000_000.0
KERNEL = ImageFacts("kernel", "vmlinuz-7.3.5", "5a" * 32, 12_000_000)
INITRD = ImageFacts("initrd", "initrd.img-7.3.5", "c3" * 32, 40_000_000)
SECRET = "luks.key=hunter2"


def attempt(
    number: int,
    outcome: Phase = Phase.verified,
    *,
    reason: str = "",
    images: tuple[ImageFacts, ...] = (KERNEL, INITRD),
    events: int = 3,
) -> AttemptRecord:
    """Attempt NUMBER, from the boot of this number to the next; it took 20 seconds, a day after the one before."""
    run = run_of(number)
    began_at = BEGAN_AT + number * 86_400
    led = f"boot-{number + 1}" if outcome in (Phase.verified, Phase.degraded, Phase.cold_boot) else ""
    summary = AttemptSummary(
        run=run,
        began_at=began_at,
        ended_at=began_at + 20,
        outcome=outcome,
        reason=reason,
        from_release="7.3.4",
        to_release="7.3.5",
        blackout_seconds=1.5 if led else None,
        blackout_error_seconds=0.25 if led else 0.0,
        by="root (khoctl, process 1)",
        first_boot_id=f"boot-{number}",
        last_boot_id=led,
    )
    changed = Event(1.0, Phase.loading, f"the next command line: {SECRET}", run, words=[Word(SECRET, Fate.added)])
    return AttemptRecord(
        summary=summary,
        origin=KernelFacts("7.3.4", "Linux version 7.3.4", summary.first_boot_id, f"{SECRET} quiet"),
        target=RunTarget(
            KernelFacts("7.3.5", cmdline=f"{SECRET} verbose"),
            list(images),
            costs=[BootCost([RowKind.jump], SECRET, "")],
        ),
        arrived=KernelFacts("7.3.5", "Linux version 7.3.5", led, f"{SECRET} verbose") if led else None,
        generation="sysfs",
        verdict=Verdict(["memblock"]),
        findings=[],
        events=[changed, *(Event(float(at), Phase.frozen, f"event {at}", run) for at in range(events))],
        checks=[Check(name, CheckResult.warn, f"{SECRET} is named", "") for name in ("cmdline", "boot_cost")],
        timeline=Timeline(),
    )


def degraded(number: int, *findings: Finding, arrived: tuple[str, ...] = ("memblock",)) -> AttemptRecord:
    """A degraded attempt with these findings."""
    verdict = Verdict(list(arrived)).with_findings(findings)
    made = attempt(number, Phase.degraded, reason=verdict.reason)
    return replace(made, verdict=verdict, findings=list(findings))


def run_of(number: int) -> str:
    """The run of attempt NUMBER: twelve hex digits, of which no two have the same beginning for long."""
    return f"{number * 2654435761 % (1 << 32):08x}{number:04x}"


def fill(path: Path, *attempts: AttemptRecord) -> None:
    """Make a database with these attempts."""
    database, _ = open_database(path)
    for one in attempts:
        database.add_attempt(one)
    database.close()


def opened(path: Path) -> Database:
    """The database, opened as khod opens it."""
    return open_database(path)[0]
