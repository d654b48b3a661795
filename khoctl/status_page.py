# SPDX-License-Identifier: LGPL-2.1-or-later
"""The page of a status: the phase, the evidence for it, and what to do next."""

import time
from collections import Counter
from collections.abc import Sequence

import typer

from khoctl.figures import format_local_time, format_seconds
from khoctl.render import (
    COLOURS,
    GENERATIONS,
    MARKS,
    MAX_SHOWN,
    count_producers,
    format_rows,
    is_notable,
    list_rows,
    phase_name,
    prepare_texts,
    producer_text,
    terms_rows,
)
from khod.model import Check, CheckResult, LuoSession, Phase, Status, render_findings
from khod.text import join_names

IN_BLACKOUT = ("freeze", "activate", "load", "restore")
"""The steps of the blackout whose time is known; the rest of the blackout is the jump and the boot."""
SECONDS_SHOWN = 120
"""From this many seconds on, an age is shown in minutes."""


def format_since(at: float) -> str:
    """Format a wall-clock time and its age; the age is left out if the clock has been set back since."""
    seconds = round(time.time() - at)
    ago = f"{seconds} s" if seconds < SECONDS_SHOWN else f"{seconds // 60} min"
    clock = format_local_time(at)
    return f"{clock} ({ago} ago)" if seconds >= 0 else clock


def render_status(status: Status, *, verbose: bool = False) -> str:
    """Return the status page: the phase with its summary, the evidence, then what to do next.

    With `verbose` every check of this boot's verification is shown, else those that found something.
    """
    status = prepare_texts(status)
    rows = [
        ("kernel", f"{status.kernel_release or '?'}, {GENERATIONS[status.generation.value]}; {_kernel_text(status)}")
    ]
    rows += _under_way(status)
    if status.outcome not in (Phase.idle, status.phase):
        rows.append(("this boot", f"{phase_name(status.outcome)}: what the handover into it came to"))
    rows += _not_undone(status)
    if status.claims:
        rows.append(("claims", f"{join_names(status.claims, MAX_SHOWN)}: left before the jump and not taken back yet"))
    rows += _waiting_rows(status)
    if status.producers:
        rows.append(("producers", count_producers(status.producers)))
    rows += [("", producer_text(found)) for found in status.producers if is_notable(found)][:MAX_SHOWN]
    rows += _session_rows(status)
    rows += _arrival_rows(status)
    if status.verdict and status.phase in (Phase.verified, Phase.degraded):
        rows += _verified_rows(status.verdict.checks, verbose=verbose)
        rows += list_rows("tolerated", [render_findings([finding]) for finding in status.verdict.tolerated])
    if verbose or status.phase not in (Phase.idle, Phase.verified):
        rows += terms_rows(status.terms)
    rows += _cold_boot_rows(status)
    if status.handovers:
        rows.append(("handovers", str(status.handovers)))
    if status.last_error:
        rows.append(("cause" if status.phase is not Phase.idle else "last time", status.last_error))
    if status.remedy:
        rows.append(("next", status.remedy))
    head = typer.style(phase_name(status.phase), fg=COLOURS.get(status.phase), bold=True)
    stale = " (the kernel is busy: its state is as of before)" if status.stale else ""
    return "\n".join([f"{head}  {status.summary}{stale}", *format_rows(rows)])


def render_outcome(status: Status, *, rolled_back: bool = False) -> str:
    """Return how a handover ended, in one line; after a rollback the status is that of the handover into this boot."""
    status = prepare_texts(status)
    if rolled_back:
        return f"rolled back  {status.last_error or 'The handover was aborted.'}"
    return f"{phase_name(status.phase)}  {status.summary} {status.remedy}".rstrip()


def _under_way(status: Status) -> list[tuple[str, str]]:
    """Return rows for who began the current handover, the steps done, and the step that runs now."""
    rows = []
    if status.begun is not None:
        image = f" to {status.begun.image}" if status.begun.image else ""
        rows.append(("begun", f"{format_since(status.begun.at)} by {status.begun.by or 'somebody unknown'}{image}"))
    if status.done and status.phase is not Phase.failed:
        rows.append(("done", ", ".join(status.done)))
    if status.under_way is not None:
        rows.append(("now", f"{status.under_way.step}, {status.under_way.seconds:.1f} s"))
    return rows


def _waiting_rows(status: Status) -> list[tuple[str, str]]:
    """Return rows for the producers whose answer is awaited."""
    waiting = [f"for {producer_text(found)}" for found in status.producers if found.waiting][:MAX_SHOWN]
    rows = list_rows("waiting", waiting)
    if (more := len(status.waiting_for) - len(waiting)) > 0:
        unconnected = [name for name in status.waiting_for if name not in {found.name for found in status.producers}]
        text = join_names(unconnected, MAX_SHOWN) if unconnected else f"and {more} more: khoctl producers"
        rows.append(("" if waiting else "waiting", text))
    return rows


def _arrival_rows(status: Status) -> list[tuple[str, str]]:
    """Return rows for what arrived in this boot, from which kernel, and how long the blackout was."""
    rows = []
    if status.verdict and status.phase in (Phase.verified, Phase.degraded):
        verdict = status.verdict
        rows.append(("arrived", f"{len(verdict.arrived)}: {', '.join(verdict.arrived) or 'nothing'}"))
        rows += [
            (key, ", ".join(names))
            for key, names in (
                ("missing", verdict.missing),
                ("changed", verdict.changed),
                ("not known", verdict.unknown),
            )
            if names
        ]
    if status.previous_release and status.phase in (Phase.verified, Phase.degraded, Phase.cold_boot):
        rows.append(("from", status.previous_release))
    if status.handovers and status.phase in (Phase.verified, Phase.degraded):
        rows.append(("blackout", _blackout_text(status)))
    return rows


def _verified_rows(checks: Sequence[Check], *, verbose: bool) -> list[tuple[str, str]]:
    """Return a row for how many checks of the verification had which result, and one for each that is shown."""
    counts = Counter(check.result for check in checks)
    words = ((CheckResult.passed, "passed"), (CheckResult.fail, "failed"), (CheckResult.warn, "with a warning"))
    said = [
        f"{counts[result]} {word}" for result, word in (*words, (CheckResult.skipped, "not known")) if counts[result]
    ]
    rows = [("checks", ", ".join(said))] if said else []
    for check in checks:
        if verbose or check.result is not CheckResult.passed:
            mark, colour = MARKS[check.result]
            rows.append(("", f"{typer.style(mark, fg=colour)}  {check.name}: {check.evidence}"))
    return rows


def _cold_boot_rows(status: Status) -> list[tuple[str, str]]:
    """Return rows for what is known of the handover that ended as this cold boot."""
    found = status.cold_boot
    if found is None or status.phase is not Phase.cold_boot:
        return []
    watchdog = {None: "the kernel does not tell", True: "a watchdog reset the host", False: "none says that it did"}
    rows = [
        ("why", found.reason if found.reason != status.last_error else ""),
        ("image", status.image),
        ("last phase", phase_name(found.last_phase)),
        ("journal", found.journal_end or "it is being read"),
        ("watchdog", watchdog[found.watchdog]),
        *list_rows("last words", found.last_words),
    ]
    return [(key, text) for key, text in rows if text]


def _session_rows(status: Status) -> list[tuple[str, str]]:
    """Return rows for the LUO sessions that no producer registered."""
    rows = [_session_text(found) for found in status.sessions[:MAX_SHOWN]]
    if (more := len(status.sessions) - MAX_SHOWN) > 0:
        rows.append(f"and {more} more: khoctl status --json")
    if status.sessions_unseen:
        rows.append(f"there may be more: {status.sessions_unseen}")
    return list_rows("sessions", rows)


def _session_text(found: LuoSession) -> str:
    """Describe a LUO session that no producer registered, and what an orderly jump does to it."""
    fate = {"kept": "an orderly jump keeps it", "lost": "an orderly jump ends it, --now keeps it"}
    does = fate.get(found.fate.value, "an orderly jump may end it, --now keeps it")
    if found.incoming:
        does = "no jump keeps it"
    return f"{found.name or 'one without a name'}, held by {found.holder}: {does}: {found.why}"


def _blackout_text(status: Status) -> str:
    """Format how long the producers were stopped, and how precise that is."""
    seconds = status.blackout_seconds
    if seconds is None:
        return "unknown: nobody has taken its state back, or the wall clock was set back"
    over = ", and not over for those who have not taken back what they left" if status.claims else ""
    length = f"{format_seconds(seconds, status.blackout_error_seconds)}, from the first freeze to the last finish"
    return f"{length}{over}{_blackout_parts(status)}"


def _blackout_parts(status: Status) -> str:
    """Format the parts of the blackout; "" if the timings are those of a handover begun since."""
    took = {timing.step: timing.seconds for timing in status.timings if timing.step in IN_BLACKOUT}
    if "restore" not in took or status.blackout_seconds is None:
        return ""
    others = max(0.0, status.blackout_seconds - sum(took.values()))
    named = [f"{step} {took[step]:.1f} s" for step in IN_BLACKOUT if step in took]
    return f": {', '.join([*named[:-1], f'jump and boot {others:.1f} s', named[-1]])} and finish"


def _not_undone(status: Status) -> list[tuple[str, str]]:
    """Return rows for each step that was not rolled back: its producer, why, and what to do."""
    rows = [
        f"{item.step}{f' of {item.producer}' if item.producer else ''}: {item.why}. {item.remedy}".rstrip()
        for item in status.not_undone[:MAX_SHOWN]
    ]
    if not rows and status.left:
        rows = [", ".join(status.left)]
    if (more := len(status.not_undone) - MAX_SHOWN) > 0:
        rows.append(f"and {more} more: khoctl status --json")
    return list_rows("not undone", rows)


def _kernel_text(status: Status) -> str:
    phase = {True: "active, ", False: "inactive, ", None: ""}[status.kernel_active]
    image = {True: "an image is loaded", False: "no image is loaded", None: "not asked yet"}[status.kernel_loaded]
    return phase + image
