# SPDX-License-Identifier: LGPL-2.1-or-later
"""Times and dates as tables and reports write them."""

import math
from datetime import UTC, datetime, tzinfo

FINE, COARSE = 3, 1
"""Decimals of a second: of a figure that is known well, and of one whose error is COARSE_SECONDS or more."""
COARSE_SECONDS = 0.1


def format_seconds(seconds: float, error: float = 0.0) -> str:
    """Format a time with its maximum error: `15.000 s ± 0.004 s`, `15.0 s ± 1.0 s`; the error is rounded up."""
    decimals = COARSE if error >= COARSE_SECONDS else FINE
    text = f"{seconds:.{decimals}f} s"
    if not 0 < error < math.inf:
        return text
    return f"{text} ± {math.ceil(round(error * 10**decimals, 6)) / 10**decimals:.{decimals}f} s"


def format_date(seconds: float) -> str:
    """Format seconds since the epoch, in UTC; "?" for a time that no calendar has, from a clock that was wrong."""
    return _format_epoch(seconds, "%Y-%m-%d %H:%M:%S", UTC)


def format_local_time(seconds: float, form: str = "%Y-%m-%d %H:%M:%S") -> str:
    """Format seconds since the epoch, in the time zone of the reader; "?" as in `format_date`."""
    return _format_epoch(seconds, form, None)


def _format_epoch(seconds: float, form: str, zone: tzinfo | None) -> str:
    try:
        return datetime.fromtimestamp(seconds, zone).strftime(form)
    except (ValueError, OverflowError, OSError):
        return "?"
