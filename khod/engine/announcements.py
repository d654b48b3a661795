# SPDX-License-Identifier: LGPL-2.1-or-later
"""What khod writes to the journal in addition to the events of a handover: findings, explanations, and own troubles."""

from collections.abc import Sequence

from khod.engine.journal import write_message
from khod.engine.journal_fields import Message
from khod.history.model import ColdBoot
from khod.history.set_aside import SetAside
from khod.model import Finding, render_findings

MAX_FINDINGS = 64
"""Maximum number of findings with a record of their own: journald drops records of a service that writes too many."""


def announce_findings(findings: Sequence[Finding], run: str) -> None:
    """Write a record for each finding of a verification, of the first MAX_FINDINGS."""
    for finding in findings[:MAX_FINDINGS]:
        write_message(
            Message.finding,
            f"Verification: {render_findings([finding])}",
            run=run,
            KHO_PRODUCER=finding.producer,
            KHO_FINDING_SOURCE=finding.source.value,
            KHO_FINDING_SUBJECT=finding.subject,
            KHO_FINDING_SEVERITY=finding.severity.value,
        )
    if (more := len(findings) - MAX_FINDINGS) > 0:
        write_message(Message.finding, f"Verification: {more} more findings. To see them: khoctl status", run=run)


def announce_cold_boot(cold: ColdBoot, run: str) -> None:
    """Write what is known of a handover that ended as a cold boot, with the last words as lines of the text."""
    write_message(
        Message.cold_boot,
        "\n".join([f"The handover ended as a cold boot: {cold.reason}", *cold.last_words]),
        run=run,
        KHO_LAST_PHASE=cold.last_phase.value,
        KHO_WATCHDOG="" if cold.watchdog is None else str(int(cold.watchdog)),
    )


def announce_image_barred(name: str, digest: str, reason: str, run: str) -> None:
    """Write that an image is refused from now on; `digest` is what `khod.history.trial.trial_digest` returns for it."""
    write_message(
        Message.image_barred, f"The image {name} is refused from now on: {reason}", run=run, KHO_IMAGE_DIGEST=digest
    )


def announce_set_aside(aside: SetAside) -> None:
    """Write that the history's database could not be used and was renamed; a new one was begun."""
    write_message(
        Message.history_set_aside, aside.describe(), KHO_PATH=str(aside.path), KHO_HISTORY_FAULT=aside.fault.value
    )
