# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes the attempt that is remembered of the log of a run."""

from khod.history.model import AttemptRecord, AttemptSummary, KernelFacts, RunBegun, RunEnd, RunLog, Timeline
from khod.model import Phase


def assemble_attempt(log: RunLog, timeline: Timeline) -> AttemptRecord:
    """Return the attempt of a log that has ended; what a damaged log lacks is left empty, and said in `damage`."""
    begun = log.begun or RunBegun(log.run, 0.0, "", KernelFacts(), "")
    end = log.end or RunEnd(Phase.inconsistent, 0.0, "the log of the run has no end")
    target, arrived = log.target, log.arrival.kernel if log.arrival else None
    measured = timeline.blackout_seconds is not None
    summary = AttemptSummary(
        run=log.run,
        began_at=begun.at,
        ended_at=end.at,
        outcome=end.outcome,
        reason=end.reason,
        from_release=begun.origin.release,
        to_release=arrived.release if arrived else target.kernel.release if target else "",
        blackout_seconds=timeline.blackout_seconds if measured else end.blackout_seconds,
        blackout_error_seconds=timeline.error_seconds if measured else end.blackout_error_seconds,
        by=begun.by,
        first_boot_id=begun.origin.boot_id,
        last_boot_id=arrived.boot_id if arrived else "",
        refused=end.refused,
    )
    return AttemptRecord(
        summary=summary,
        origin=begun.origin,
        target=target,
        arrived=arrived,
        generation=begun.generation,
        verdict=end.verdict,
        findings=end.verdict.findings if end.verdict else [],
        events=log.events,
        checks=log.checks,
        timeline=timeline,
        cold_boot=log.cold_boot,
        trees=end.trees,
        terms=begun.terms,
        damage=_describe_damage(log),
    )


def _describe_damage(log: RunLog) -> str:
    parts = []
    if log.begun is None:
        parts.append("how the run began")
    if log.end is None:
        parts.append("how it ended")
    if log.damaged_lines:
        parts.append(f"{log.damaged_lines} line{'' if log.damaged_lines == 1 else 's'} that could not be read")
    return f"missing in the log of the run: {', '.join(parts)}" if parts else ""
