# SPDX-License-Identifier: LGPL-2.1-or-later
"""How long each producer was stopped, in words."""

from collections.abc import Sequence

from khoctl.figures import format_seconds
from khod.history.model import Standstill
from khod.text import printable

MAX_SHOWN = 8
"""The producers that have a line of their own."""


def describe_standstills(found: Sequence[Standstill]) -> list[str]:
    """Return a line for each of the producers that were stopped longest, and one for all others."""
    lines = [f"{printable(one.name)} ({printable(one.kind)}): {describe_seconds(one)}" for one in found[:MAX_SHOWN]]
    if others := found[MAX_SHOWN:]:
        lines.append(f"{len(others)} more: at most {format_seconds(others[0].seconds, others[0].error_seconds)}")
    return lines


def describe_seconds(one: Standstill) -> str:
    """Return how long it was, and how long by the producer's own clock if that is known."""
    own = "" if one.own_seconds is None else f", by its own clock {format_seconds(one.own_seconds)}"
    return f"{format_seconds(one.seconds, one.error_seconds)}{own}"
