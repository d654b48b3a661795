# SPDX-License-Identifier: LGPL-2.1-or-later
"""A fleet as a page (HTML): who stands out, how long the blackouts were, and a row for each host."""

import math
from collections.abc import Iterable, Sequence

from khoctl.figures import format_date, format_seconds
from khoctl.fleet.assess import RULE, describe_counts, describe_spread, describe_versions
from khoctl.fleet.model import FleetView, HostView, Remark, RemarkKind
from khoctl.history import blackout_text, outcome_name
from khoctl.report.frame import frame_page, section
from khoctl.report.markup import EMPTY, Markup, element, escape_text, text_element
from khoctl.report.tables import fact_list, make_table

WIDTH, HEIGHT, BASE, TOP = 880, 190, 150, 20
"""The picture of the blackouts, in pixels, and the line on which its bars stand."""
MAX_BARS = 40
COLOURS = {
    RemarkKind.clock_off: "warn",
    RemarkKind.rolled_back: "warn",
    RemarkKind.under_way: "warn",
    RemarkKind.without_kho: "muted",
}
"""The classes of the remarks that are not bad."""


def write_fleet_page(fleet: FleetView) -> str:
    """Return the page of a fleet; the same fleet always gives the same page."""
    return frame_page(f"Fleet of {len(fleet.hosts)} hosts", _write_header(fleet), *_write_sections(fleet))


def _write_header(fleet: FleetView) -> Markup:
    without = sum(not host.has_kho for host in fleet.hosts)
    facts = [
        ("Hosts", describe_counts(fleet.counts)),
        ("Kernels", describe_versions(fleet.kernels)),
        ("khod", describe_versions(fleet.khods)),
        ("Without KHO, counted apart", str(without) if without else ""),
    ]
    return element(
        "header",
        text_element("p", "Kernel handover", class_="eyebrow"),
        text_element("h1", f"Fleet of {len(fleet.hosts)} hosts"),
        fact_list([(name, value) for name, value in facts if value], name="across"),
    )


def _write_sections(fleet: FleetView) -> Iterable[Markup]:
    standing = [(host, remark) for host in fleet.hosts for remark in host.remarks]
    if standing:
        yield section("Hosts that stand out", _remark_table(standing), text_element("p", RULE, class_="muted"))
    if fleet.blackout:
        seconds = [
            one.blackout_seconds for host in fleet.hosts for one in host.attempts if one.blackout_seconds is not None
        ]
        sentence = f"Blackout: {describe_spread(fleet.blackout)}."
        yield section(
            "Blackouts", text_element("p", sentence), element("figure", draw_histogram(seconds, fleet.blackout.limit))
        )
    yield section("Hosts", _host_table([host for host in fleet.hosts if host.has_kho]))


def _remark_table(found: Sequence[tuple[HostView, Remark]]) -> Markup:
    rows = (
        element(
            "tr",
            text_element("td", remark.kind.value, class_=f"mark {COLOURS.get(remark.kind, 'bad')}"),
            text_element("td", host.name, class_="name"),
            text_element("td", remark.text),
        )
        for host, remark in found
    )
    return make_table(["mark", "name", ""], ["Why", "Host", "Finding"], rows)


def _host_table(hosts: Sequence[HostView]) -> Markup:
    if not hosts:
        return text_element("p", "No host has Kexec HandOver.", class_="muted")
    return make_table(
        ["name", "", "", "number", ""],
        ["Host", "State", "Kernel, khod", "Last blackout", "Last attempts"],
        map(_host_row, hosts),
    )


def _host_row(host: HostView) -> Markup:
    last = host.last_blackout
    return element(
        "tr",
        text_element("td", host.name, class_="name"),
        text_element("td", host.remarks[0].kind.value if host.remarks else host.state),
        element(
            "td",
            escape_text(host.kernel or "?"),
            text_element("span", f"khod {host.khod}", class_="remedy") if host.khod else EMPTY,
        ),
        text_element("td", blackout_text(last) if last else "", class_="number", data_label="last blackout"),
        element("td", *(text_element("div", _attempt_line(host, at)) for at in range(min(3, len(host.attempts))))),
    )


def _attempt_line(host: HostView, at: int) -> str:
    one = host.attempts[at]
    return f"{format_date(one.ended_at)} {one.from_release or '?'} → {one.to_release or '?'} {outcome_name(one)}"


def draw_histogram(seconds: Sequence[float], limit: float | None) -> Markup:
    """Return a picture of how many blackouts were how long; bars from `limit` on have another colour."""
    lowest, highest = min(seconds), max(seconds)
    count = min(MAX_BARS, max(1, math.ceil(math.sqrt(len(seconds)) * 2))) if highest > lowest else 1
    step = (highest - lowest) / count or 1.0
    bars = [0] * count
    for one in seconds:
        bars[min(count - 1, int((one - lowest) / step))] += 1
    wide, tall = WIDTH / count, (BASE - TOP) / max(bars)
    drawn = [
        element(
            "rect",
            class_="t-jump" if limit is not None and lowest + (at + 1) * step > limit else "t-khod",
            x=at * wide + 1,
            y=BASE - bar * tall,
            width=max(1.0, wide - 2),
            height=bar * tall,
        )
        for at, bar in enumerate(bars)
        if bar
    ]
    ends = (
        text_element("text", format_seconds(lowest), class_="t-text t-small", x=0, y=BASE + 18),
        text_element("text", format_seconds(highest), class_="t-text t-small t-value", x=WIDTH, y=BASE + 18),
        text_element("text", f"{max(bars)} handovers", class_="t-text t-small", x=0, y=TOP - 6),
    )
    label = f"{len(seconds)} blackouts from {format_seconds(lowest)} to {format_seconds(highest)}"
    line = element("path", class_="t-grid", d=f"M0 {BASE}H{WIDTH}")
    return element("svg", *drawn, line, *ends, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label)
