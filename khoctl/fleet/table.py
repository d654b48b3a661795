# SPDX-License-Identifier: LGPL-2.1-or-later
"""A fleet as a table for people: the hosts that stand out with the reason, then all of them, then the sums."""

from collections.abc import Iterator, Sequence

import typer

from khoctl.figures import format_local_time
from khoctl.fleet.assess import RULE, describe_counts, describe_spread, describe_versions
from khoctl.fleet.model import FleetView, HostView, RemarkKind
from khoctl.history import MINUTES, blackout_text
from khoctl.layout import align_table, fit_page
from khoctl.render import format_rows, prepare_texts
from khod.text import shorten

COLUMNS = ("HOST", "STATE", "KERNEL", "KHOD", "BLACKOUT", "LAST")
MAX_CELL = 28
"""The width of a name in the table; the remarks have all of it."""
QUIET = frozenset((RemarkKind.rolled_back, RemarkKind.under_way))
"""Remarks that are shown, but that need nobody."""
STAND_OUT, QUIET_ONES, WITHOUT_KHO = "Stand out", "Rolled back or under way", "Without KHO"


def render_fleet(fleet: FleetView, width: int | None) -> str:
    """Return the page of a fleet, for a terminal of `width` columns (None: no limit)."""
    hosts = [prepare_texts(host) for host in fleet.hosts]
    table = align_table([COLUMNS, *(_host_row(host) for host in hosts if host.has_kho)], width)
    lines = [line for line in table if line.strip()] if any(host.has_kho for host in hosts) else []
    for title, of_title in _group_remarks(hosts):
        lines += ["", title, *(fit_page(line, width) for line in of_title)]
    lines += ["", *(fit_page(line, width) for line in format_rows(_summarize(fleet)))]
    return "\n".join(lines).strip("\n")


def _host_row(host: HostView) -> tuple[str, ...]:
    last = host.last_blackout
    ended = host.attempts[0].ended_at if host.attempts else 0.0
    return (
        shorten(host.name, MAX_CELL),
        host.remarks[0].kind.value if host.remarks else host.state,
        shorten(host.kernel, MAX_CELL) or "?",
        shorten(host.khod, MAX_CELL) or "?",
        blackout_text(last) if last else "-",
        format_local_time(ended, MINUTES) if ended else "-",
    )


def _group_remarks(hosts: Sequence[HostView]) -> Iterator[tuple[str, list[str]]]:
    """Yield a title with a line for each remark: what stands out, what needs nobody, and who has no KHO."""
    titles: dict[str, list[str]] = {STAND_OUT: [], QUIET_ONES: [], WITHOUT_KHO: []}
    for host in hosts:
        for remark in host.remarks:
            kind = remark.kind
            title = WITHOUT_KHO if kind is RemarkKind.without_kho else QUIET_ONES if kind in QUIET else STAND_OUT
            colour = typer.colors.RED if title == STAND_OUT else None
            titles[title].append(f"  {host.name}  {typer.style(kind.value, fg=colour)}: {remark.text}")
    yield from ((title, lines) for title, lines in titles.items() if lines)


def _summarize(fleet: FleetView) -> Iterator[tuple[str, str]]:
    yield "hosts", f"{len(fleet.hosts)}: {describe_counts(fleet.counts)}"
    if fleet.kernels:
        yield "kernels", describe_versions(fleet.kernels)
    if len(fleet.khods) > 1:
        yield "khod", describe_versions(fleet.khods)
    if fleet.blackout:
        yield "blackout", describe_spread(fleet.blackout)
    if any(remark.kind is RemarkKind.slow for host in fleet.hosts for remark in host.remarks):
        yield "slow", RULE
