# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether a handover may begin or continue in khod's current state; only for operators, never for a handover."""

from khod.handover.machine import HELD, RESTING
from khod.handover.record import Record
from khod.model import Check, CheckResult, Phase, Step
from khod.text import printable

WAIT = "Wait for it: khoctl status. To call it off, if it is yours: khoctl abort"
JUMP_OR_BEGIN_AGAIN = "Jump into it with: khoctl kexec. Or begin again with: khoctl abort"
"""The remedies if an operation is under way, and if a handover has its image; refusals use them too."""


def check_handover(phase: Phase, record: Record, *, busy: bool, takes_image: bool) -> Check:
    """Check what the answer to `khoctl kexec` or `khoctl activate` would be now; `phase` is the effective phase."""
    by = f", begun by {record.begun.by}" if record.begun.by and phase not in RESTING else ""
    if busy:
        evidence = f"An operation is under way ({phase.value}{by}): another one would be refused"
        remedy = WAIT
    elif phase in RESTING or phase is Phase.foreign:  # another user of KHO has a check of its own
        return Check("handover", CheckResult.passed, "No handover is under way", "")
    elif phase not in HELD:
        evidence = f"The last handover stands at {phase.value}{by}: a new one would be refused"
        remedy = "Put it back first: khoctl abort. khoctl status says what is not undone"
    elif takes_image and Step.load in record.done:
        evidence = (
            f"The handover under way ({phase.value}{by}) has an image loaded already: another one would be refused"
        )
        remedy = JUMP_OR_BEGIN_AGAIN
    else:
        evidence = f"The handover under way ({phase.value}{by}) would go on"
        return Check("handover", CheckResult.passed, printable(evidence), "")
    return Check("handover", CheckResult.fail, printable(evidence), remedy)
