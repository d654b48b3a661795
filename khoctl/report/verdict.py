# SPDX-License-Identifier: LGPL-2.1-or-later
"""How an attempt ended, in words."""

from collections.abc import Iterator

from khoctl.figures import format_seconds
from khoctl.options import name_options
from khoctl.render import phase_name
from khod.history.model import AttemptRecord
from khod.model import Phase
from khod.text import shorten

TITLES = {
    Phase.verified: "Verified",
    Phase.degraded: "Degraded",
    Phase.cold_boot: "Cold boot",
    Phase.idle: "Rolled back",
    Phase.failed: "Failed",
}
SENTENCES = {
    Phase.verified: "The next kernel runs, and what was handed over to it has arrived.",
    Phase.degraded: "The next kernel runs, but its verification found problems.",
    Phase.cold_boot: "The host was booted without the state of the kernel before.",
    Phase.idle: "The handover was rolled back. The host stayed in the kernel it ran.",
    Phase.failed: "The handover failed, and not everything was rolled back.",
}
MAX_RELEASE = 64
"""The kernel's bound for a release (__NEW_UTS_LEN)."""
CLASSES = {Phase.verified: "good", Phase.idle: "warn"}


def outcome_title(attempt: AttemptRecord) -> str:
    """Return how the attempt ended in one or two words; the phase where no end is known."""
    outcome = attempt.summary.outcome
    if attempt.summary.refused:
        return "Refused"
    return TITLES.get(outcome) or phase_name(outcome).capitalize()


def name_kernels(attempt: AttemptRecord) -> str:
    """Return the releases of the two kernels; "?" for one that is not known."""
    releases = (attempt.summary.from_release, attempt.summary.to_release)
    return " → ".join(shorten(release, MAX_RELEASE) or "?" for release in releases)


def outcome_class(attempt: AttemptRecord) -> str:
    """Return the class of the style sheet for how the attempt ended: good, warn or bad."""
    return CLASSES.get(attempt.summary.outcome, "bad" if attempt.summary.outcome in TITLES else "warn")


def describe_outcome(attempt: AttemptRecord) -> Iterator[str]:
    """Yield what the end means for the host, the blackout, and the reason where no finding says it."""
    summary = attempt.summary
    if summary.refused:
        yield "The handover was refused before its first step. Nothing was changed."
    else:
        yield SENTENCES.get(summary.outcome, "No end of this attempt was recorded.")
    if summary.blackout_seconds is not None:
        time = format_seconds(summary.blackout_seconds, summary.blackout_error_seconds)
        yield f"The blackout was {time}, from the first freeze to the last finish."
    if summary.reason and not attempt.findings:
        yield f"Reason: {name_options(summary.reason)}"
