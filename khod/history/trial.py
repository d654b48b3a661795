# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which handovers speak for or against the image that they led to."""

import hashlib
from collections.abc import Sequence
from dataclasses import field

from khod.dataclass import dataclass
from khod.history.model import AttemptRecord, ImageFacts, Timeline
from khod.model import Finding, FindingSeverity, FindingSource, Phase, Verdict

LOSSES = (FindingSeverity.lost, FindingSeverity.changed)


@dataclass(frozen=True)
class ImageTrial:
    """What the handovers into an image came to; `digest` is what `trial_digest` returns for it.

    `failures` is the number of those that failed since the last one that was verified, and since the last
    acknowledgement. `run`, `reason` and `at` are of the latest of them, empty without one. `verified` says whether the
    latest handover that counts was verified.
    """

    digest: str
    failures: int = 0
    run: str = ""
    reason: str = ""
    at: float = 0.0
    verified: bool = False


@dataclass(frozen=True)
class Past:
    """What the checks of an image are told of the past: its trial, and the times of this host's last handover.

    `timeline` has no rows if there was none, or if it cannot be read.
    """

    trial: ImageTrial
    timeline: Timeline = field(default_factory=Timeline)


def trial_digest(images: Sequence[ImageFacts]) -> str:
    """Return the digest of what boots together, kernel and initrds: SHA-256 over their digests in hex, in this order.

    A broken initrd so speaks against this kernel with this initrd, and not against the kernel with another one. Returns
    "" for no images.
    """
    return hashlib.sha256("".join(image.digest for image in images).encode()).hexdigest() if images else ""


def counts_for_image(attempt: AttemptRecord) -> bool:
    """Whether the attempt proves its image: it was verified."""
    return attempt.summary.outcome is Phase.verified


def counts_against_image(attempt: AttemptRecord) -> bool:
    """Whether the attempt failed in a way that the image may be the cause of.

    These are a cold boot unless the image is known not to have been booted, a degraded boot in which nothing arrived,
    and one in which the contents of a file differ. A rollback, a producer's own refusal and a health check are not
    among them.
    """
    if attempt.summary.outcome is Phase.cold_boot:
        return attempt.cold_boot is None or attempt.cold_boot.is_image_suspect
    if attempt.summary.outcome is not Phase.degraded or attempt.verdict is None:
        return False
    verdict = attempt.verdict
    return any(
        found.severity in LOSSES
        and (
            found.source is FindingSource.content
            or (found.source is FindingSource.kernel and not found.subject and _nothing_arrived(found, verdict))
        )
        for found in (*attempt.findings, *verdict.findings)
    )


def _nothing_arrived(found: Finding, verdict: Verdict) -> bool:
    """Whether a finding about all of the kernel's state says that none of it came.

    What is lost did not come, whatever a producer has restored from elsewhere; what has changed may have.
    """
    return found.severity is FindingSeverity.lost or not verdict.arrived
