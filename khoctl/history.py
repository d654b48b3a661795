# SPDX-License-Identifier: LGPL-2.1-or-later
"""Past attempts as pages for people."""

from collections.abc import Sequence

import typer

from khoctl.figures import format_local_time, format_seconds
from khoctl.layout import align_table
from khoctl.render import (
    COLOURS,
    GENERATIONS,
    MARKS,
    NOTED_RESULTS,
    format_rows,
    list_rows,
    phase_name,
    prepare_texts,
    render_event,
    terms_rows,
)
from khoctl.standstills import describe_standstills
from khod.history.model import AttemptRecord, AttemptSummary, ColdBoot, KernelFacts, RunTarget
from khod.history.origins import describe_proofs
from khod.model import EventKind, Phase, render_findings
from khod.text import format_size

RUN_DIGITS = 8
"""The number of characters of a run in a list; a unique beginning names it."""
MINUTES = "%Y-%m-%d %H:%M"
"""How a list writes times."""
COLUMNS: tuple[str, ...] = ("RUN", "BEGUN", "FROM -> TO", "OUTCOME", "BLACKOUT", "WHO", "REASON")
NO_ATTEMPTS = "No attempts: no handover has ended yet."
NO_CHAIN = "This kernel was not reached by a handover."
SHOWN_EVENTS = (EventKind.phase, EventKind.step_ended, EventKind.device, EventKind.note)
"""The events of an attempt's page; the JSON has all."""


def render_history(found: Sequence[AttemptSummary], width: int | None) -> list[str]:
    """Return a table of attempts; a column that is empty everywhere, as for a reader without rights, is left out."""
    rows = [COLUMNS, *(_summary_row(prepare_texts(summary)) for summary in found)]
    columns = [at for at in range(len(rows[0])) if any(row[at] for row in rows[1:])]
    return [line for line in align_table([[row[at] for at in columns] for row in rows], width) if line.strip()]


def _summary_row(found: AttemptSummary) -> tuple[str, ...]:
    if found.damage:
        return (found.run[:RUN_DIGITS], "?", "?", "damaged", "-", "", found.damage)
    return (
        found.run[:RUN_DIGITS],
        format_local_time(found.began_at, MINUTES),
        f"{found.from_release or '?'} -> {found.to_release or '?'}",
        outcome_name(found),
        blackout_text(found) or "-",
        found.by,
        "" if found.outcome is Phase.verified else found.reason,
    )


def outcome_name(found: AttemptSummary) -> str:
    """Return the outcome of an attempt for people: after a rollback or a refusal its phase is idle, or failed."""
    names = {Phase.idle: "refused" if found.refused else "rolled back", Phase.failed: "not rolled back"}
    return names.get(found.outcome, phase_name(found.outcome))


def blackout_text(found: AttemptSummary) -> str:
    """Format how long the producers were stopped, with its maximum error; "" if that is not known."""
    if found.blackout_seconds is None:
        return ""
    return format_seconds(found.blackout_seconds, found.blackout_error_seconds)


def render_attempt(found: AttemptRecord) -> str:
    """Return the page of one attempt: how it ended and why, the kernels, what was found, and the events in order."""
    found = prepare_texts(found)
    summary = found.summary
    outcome = typer.style(outcome_name(summary), fg=COLOURS.get(summary.outcome), bold=True)
    lines = [f"{outcome}  {summary.run}{f': {summary.reason}' if summary.reason else ''}"]
    lines += format_rows(_attempt_rows(found))
    events = [event for event in found.events if event.kind in SHOWN_EVENTS and event.message]
    lines += ["", *map(render_event, events)] if events else []
    return "\n".join(lines)


def _attempt_rows(found: AttemptRecord) -> list[tuple[str, str]]:
    summary = found.summary
    by = f" by {summary.by}" if summary.by else ""
    rows = [("damaged", found.damage)] if found.damage else []
    rows.append(("begun", f"{format_local_time(summary.began_at)}{by}"))
    rows.append(("ended", format_local_time(summary.ended_at)))
    rows += terms_rows(found.terms)
    rows.append(("from", f"{_kernel_text(found.origin)}, {GENERATIONS.get(found.generation, found.generation)}"))
    if found.target is not None:
        rows.append(("to", f"{_kernel_text(found.target.kernel)}{', at once' if found.target.at_once else ''}"))
        rows += [
            ("", f"{image.role} {image.name}, {format_size(image.bytes)}, SHA-256 {image.digest}")
            for image in found.target.images
        ]
        rows += list_rows("origin", _list_origins(found.target))
    if found.arrived is not None:
        rows.append(("arrived in", _kernel_text(found.arrived)))
    if text := blackout_text(summary):
        rows.append(("blackout", f"{text}; its parts: khoctl timeline {summary.run}"))
    rows += list_rows("stopped", describe_standstills(found.timeline.standstills))
    if found.verdict is not None:
        rows.append(("arrived", ", ".join(found.verdict.arrived) or "nothing"))
    rows += list_rows("found", [render_findings([finding]) for finding in found.findings])
    if found.verdict is not None:
        rows += list_rows("tolerated", [render_findings([finding]) for finding in found.verdict.tolerated])
    rows += list_rows("tree", found.trees)
    noted = [check for check in found.checks if check.result in NOTED_RESULTS]
    rows += list_rows("checks", [f"{MARKS[check.result][0]} {check.name}: {check.evidence}" for check in noted])
    if found.cold_boot is not None:
        rows += _cold_boot_rows(found.cold_boot)
    return rows


def _list_origins(target: RunTarget) -> list[str]:
    """Return a line for each file as it was given: who vouches for it, and its digest if it was not loaded as it is."""
    loaded = {image.digest for image in target.images}
    return [
        f"{origin.role} {origin.name}: {describe_proofs(origin)}"
        + ("" if origin.digest in loaded else f"; as it was given: SHA-256 {origin.digest}")
        for origin in target.origins
    ]


def _cold_boot_rows(found: ColdBoot) -> list[tuple[str, str]]:
    rows = [("cold boot", found.reason)]
    if found.last_phase is not Phase.idle:
        rows.append(("", f"the last phase recorded: {phase_name(found.last_phase)}"))
    if found.watchdog is not None:
        rows.append(("", f"a watchdog {'reset' if found.watchdog else 'did not reset'} the host"))
    if found.journal_end:
        rows.append(("", f"its journal: {found.journal_end}"))
    return rows + list_rows("last words", found.last_words)


def _kernel_text(kernel: KernelFacts) -> str:
    cmdline = f", {kernel.cmdline}" if kernel.cmdline else ""
    return f"{kernel.release or '?'}{cmdline}"
