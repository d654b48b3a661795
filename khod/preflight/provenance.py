# SPDX-License-Identifier: LGPL-2.1-or-later
"""The check of who made the files of the next kernel; the work is done before, in `khod.provenance`."""

from khod.history.origins import describe_origin
from khod.preflight.facts import CheckFinding, Facts


def check_provenance(facts: Facts) -> CheckFinding | None:
    """Each file has the pinned digest, or the good signature, that the policy of this host or the caller requires."""
    if (target := facts.target) is None:
        return None
    if refused := [origin for origin in target.origins if origin.refusal]:
        return CheckFinding.fail_with(
            "; ".join(origin.refusal for origin in refused),
            " ".join(dict.fromkeys(origin.remedy for origin in refused)),
        )
    evidence = "; ".join(map(describe_origin, target.origins))
    if doubts := [doubt for origin in target.origins for doubt in origin.doubts]:
        return CheckFinding.warn_with(
            f"{'; '.join(doubts)}; {evidence}",
            "Find out why before you trust the file, or remove the signature beside it.",
        )
    return CheckFinding.pass_with(evidence)
