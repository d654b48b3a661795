# SPDX-License-Identifier: LGPL-2.1-or-later
"""After the jump: what the terms of the handover add to its verdict, which are those of its profile."""

from collections.abc import Iterable
from dataclasses import replace

from khod.handover.evidence import Evidence, add_evidence
from khod.model import Check, CheckResult, Finding, FindingSeverity, FindingSource, Terms, Verdict
from khod.text import join_names

BLACKOUT = "blackout"
OF_TERMS = (FindingSource.blackout, FindingSource.profile)
"""The sources of the findings that are made here."""


def judge_verdict(
    verdict: Verdict, terms: Terms, blackout_seconds: float | None, blackout_error_seconds: float
) -> Verdict:
    """Return a verdict as the terms of the handover judge it.

    A verdict that was judged before is judged anew, as after the blackout was measured better. `blackout_seconds` is
    None if the blackout is not known.
    """
    tolerated = set(terms.tolerate or ())
    found = [one for one in (*verdict.findings, *verdict.tolerated) if one.source not in OF_TERMS]
    verdict = replace(verdict, tolerated=[one for one in found if one.source.value in tolerated])
    verdict = verdict.with_findings(one for one in found if one.source.value not in tolerated)
    if terms.blackout_budget is not None:
        measured = check_blackout(terms.blackout_budget, blackout_seconds, blackout_error_seconds)
        verdict = add_evidence(verdict, [measured])
    required = (_require_check(name, verdict) for name in terms.must_pass or ())
    return verdict.with_findings([*verdict.findings, *(finding for finding in required if finding)])


def check_blackout(budget: float, seconds: float | None, error_seconds: float) -> Evidence:
    """Whether the blackout was within its budget; the measured figure counts, whatever its error."""
    if seconds is None:
        return Evidence.unknown(BLACKOUT, f"how long it was is not known; its budget is {budget:g} s")
    measured = f"{seconds:.3f} s (± {error_seconds:.3f} s)"
    if seconds <= budget:
        return Evidence.passed(BLACKOUT, f"{measured}, within its budget of {budget:g} s")
    text = f"the blackout was {measured}, longer than its budget of {budget:g} s"
    finding = Finding("", text, FindingSource.blackout, severity=FindingSeverity.unknown)
    return Evidence.failed(BLACKOUT, text, "khoctl timeline shows which part of it took how long", [finding])


def _require_check(name: str, verdict: Verdict) -> Finding | None:
    """Return the finding that a required check has not passed, None if it has; `name` may be a group, as `health`."""
    made = [check for check in verdict.checks if check.name == name or check.name.startswith(f"{name} ")]
    missed = [check for check in made if check.result is not CheckResult.passed]
    if made and not missed:
        return None
    why = _describe_missed(missed) if made else "it was not made"
    text = f"the profile requires that check {name} passes: {why}"
    return Finding("", text, FindingSource.profile, name, FindingSeverity.unknown)


def _describe_missed(missed: Iterable[Check]) -> str:
    return join_names(f"{check.name} {check.result.value} ({check.evidence})" for check in missed)
