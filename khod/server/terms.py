# SPDX-License-Identifier: LGPL-2.1-or-later
"""The terms of a call, checked before anything is done."""

import dataclasses
from dataclasses import replace

from khod.errors import UsageError
from khod.model import MAX_TERMS_SECONDS, TOLERABLE, VERIFICATION_CHECKS, Terms, names_check
from khod.producers.configured import one_line


def check_terms(terms: Terms) -> Terms:
    """Return terms whose texts are fit for a page; UsageError, with the field, if a value is not valid."""
    deadlines = dataclasses.asdict(terms.deadlines) if terms.deadlines is not None else {}
    seconds = {f"terms.deadlines.{name}": value for name, value in deadlines.items()}
    for name, value in (seconds | {"terms.blackout_budget": terms.blackout_budget}).items():
        if value is not None and not 0 < value <= MAX_TERMS_SECONDS:
            remedy = f"It must be a number of seconds, {MAX_TERMS_SECONDS:g} at most."
            raise UsageError(f"{name} is {value:g}", where=name, remedy=remedy)
    known = [source.value for source in TOLERABLE]
    for source in terms.tolerate or ():
        if source not in known:
            raise UsageError(
                f"Findings of {one_line(source)!r} cannot be tolerated",
                where="terms.tolerate",
                remedy=f"Only these can: {', '.join(known)}.",
            )
    for name in terms.must_pass or ():
        if not names_check(name):
            raise UsageError(
                f"Not a check of the verification: {one_line(name)!r}",
                where="terms.must_pass",
                remedy=f"One of: {', '.join(VERIFICATION_CHECKS)}; or one of the last two with a name behind it.",
            )
    return replace(
        terms,
        profile=terms.profile and one_line(terms.profile),
        asked_by=None,  # the record of who began the handover has it, which not every reader is shown
        window=terms.window and one_line(terms.window),
        require=terms.require and [one_line(name) for name in terms.require],
        must_pass=terms.must_pass and [one_line(name) for name in terms.must_pass],
    )
