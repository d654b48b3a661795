# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who stands out in a fleet, and by which rule."""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from khoctl.figures import format_seconds
from khoctl.fleet.model import BlackoutSpread, FleetView, HostView, Remark, RemarkKind
from khod.errors import Exit
from khod.text import printable

MIN_HOSTS = 5
"""With fewer hosts no blackout stands out but by a budget."""
DEVIATIONS, DEVIATION_SCALE, MIN_SHARE = 3.0, 1.4826, 0.1
RULE = (
    "A host is slow where its last blackout, less its error, exceeds the median of all hosts' last ones by 3 standard "
    "deviations (1.4826 times the median deviation) and by 10 %."
)
ORDER = {kind: number for number, kind in enumerate(RemarkKind)}
EXITS = (
    (Exit.not_rolled_back, {RemarkKind.not_rolled_back, RemarkKind.inconsistent}),
    (Exit.degraded, {RemarkKind.degraded, RemarkKind.cold_boot}),
    (Exit.unreachable, {RemarkKind.not_reached, RemarkKind.refused_login, RemarkKind.unreadable}),
    (
        Exit.refused,
        {RemarkKind.foreign, RemarkKind.claims, RemarkKind.over_budget, RemarkKind.slow, RemarkKind.clock_off},
    ),
    (Exit.unsupported, {RemarkKind.without_kho}),
)
"""The exit code of a fleet, the first that applies; what was rolled back or is under way needs nobody."""


def assess_fleet(hosts: Sequence[HostView], budget: float | None = None) -> FleetView:
    """Return all hosts with what stands out among them, those first that need a person; `budget` is in seconds."""
    spread = measure_spread(hosts)
    limit = spread.limit if spread else None
    judged = [_judge_blackout(host, budget, limit, spread.median if spread else 0.0) for host in hosts]
    judged.sort(key=lambda host: (_urgency(host), host.name))
    kinds = {remark.kind for host in judged for remark in host.remarks}
    return FleetView(
        hosts=judged,
        blackout=spread,
        counts=_count(host.remarks[0].kind.value if host.remarks else host.state for host in judged),
        kernels=_count(host.kernel for host in judged if host.kernel),
        khods=_count(host.khod for host in judged if host.khod),
        exit_code=next((code for code, of_code in EXITS if kinds & of_code), Exit.done),
    )


def _count(names: Iterable[str]) -> dict[str, int]:
    return dict(Counter(names).most_common())


def _urgency(host: HostView) -> int:
    return ORDER[host.remarks[0].kind] if host.remarks else len(ORDER)


def _judge_blackout(host: HostView, budget: float | None, limit: float | None, median: float) -> HostView:
    last = host.last_blackout
    remarks = list(host.remarks)
    if last is not None and last.blackout_seconds is not None:
        seconds, error = last.blackout_seconds, last.blackout_error_seconds
        text = format_seconds(seconds, error)
        if budget is not None and seconds > budget:
            remarks.append(Remark(RemarkKind.over_budget, f"Its last blackout was {text}; the budget is {budget:g} s"))
        if limit is not None and seconds - error > limit:
            times = seconds / median if median else 0.0
            remarks.append(Remark(RemarkKind.slow, f"Its last blackout was {text}, {times:.1f} times the median"))
    return replace(host, remarks=sorted(remarks, key=lambda remark: ORDER[remark.kind]))


def measure_spread(hosts: Sequence[HostView]) -> BlackoutSpread | None:
    """Return the distribution of the blackouts, None without one."""
    known = [
        (one.blackout_seconds, one.blackout_error_seconds, host.name)
        for host in hosts
        for one in host.attempts
        if one.blackout_seconds is not None
    ]
    if not known:
        return None
    seconds = [one[0] for one in known]
    quartiles = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    worst = max(known)
    return BlackoutSpread(
        count=len(known),
        hosts=len({name for _seconds, _error, name in known}),
        median=statistics.median(seconds),
        lower_quartile=quartiles[0],
        upper_quartile=quartiles[2],
        error_seconds=max(error for _seconds, error, _name in known),
        worst=worst[0],
        worst_error_seconds=worst[1],
        worst_host=worst[2],
        limit=_find_limit([last.blackout_seconds or 0.0 for host in hosts if (last := host.last_blackout)]),
    )


def _find_limit(last: Sequence[float]) -> float | None:
    """Return from where on a last blackout stands out, as RULE says."""
    if len(last) < MIN_HOSTS:
        return None
    median = statistics.median(last)
    deviation = statistics.median(abs(one - median) for one in last)
    return median + max(DEVIATIONS * DEVIATION_SCALE * deviation, MIN_SHARE * median)


def describe_spread(spread: BlackoutSpread) -> str:
    """Describe the distribution in one sentence."""
    median, lower, upper = (
        format_seconds(seconds, spread.error_seconds)
        for seconds in (spread.median, spread.lower_quartile, spread.upper_quartile)
    )
    worst = format_seconds(spread.worst, spread.worst_error_seconds)
    return (
        f"median {median}, half of them from {lower} to {upper}, worst {worst} ({printable(spread.worst_host)}), "
        f"of {spread.count} handovers on {spread.hosts} hosts"
    )


def describe_counts(counts: dict[str, int]) -> str:
    """Describe how many there are of each, the most frequent first."""
    return ", ".join(f"{count} {printable(name)}" for name, count in counts.items())


def describe_versions(counts: dict[str, int]) -> str:
    """Describe on how many hosts each version runs, the most frequent first."""
    return ", ".join(f"{printable(name)} on {count}" for name, count in counts.items())
