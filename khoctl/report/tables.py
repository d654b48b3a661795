# SPDX-License-Identifier: LGPL-2.1-or-later
"""The tables and lists of the page."""

from collections.abc import Iterable, Sequence

from khoctl.figures import format_seconds
from khoctl.options import name_options
from khoctl.report.markup import EMPTY, Markup, element, escape_text, join_markup, text_element
from khoctl.report.producers import ProducerAnswers
from khoctl.standstills import describe_seconds
from khod.history.model import BootCost, FileOrigin, ImageFacts, KernelFacts, Timeline, TimelineRow
from khod.history.origins import describe_proofs
from khod.model import Check, CheckResult, Finding, FindingSeverity
from khod.text import format_size

MAX_OPEN = 20
"""The producers that the page shows at once; the others are folded."""

MARKS = {
    CheckResult.passed: ("passed", "good"),
    CheckResult.warn: ("warning", "warn"),
    CheckResult.fail: ("failed", "bad"),
    CheckResult.unsupported: ("unsupported", "bad"),
    CheckResult.skipped: ("skipped", "muted"),
    CheckResult.off: ("failed, off", "warn"),
}
SEVERITIES = {
    FindingSeverity.lost: ("lost", "bad"),
    FindingSeverity.changed: ("changed", "bad"),
    FindingSeverity.unknown: ("not known", "warn"),
}


def fact_list(facts: Iterable[tuple[str, str]], *, name: str = "facts") -> Markup:
    """Return titles with their values; the class `facts` puts a value beside its title, `across` below it."""
    items = (element("div", text_element("dt", title), text_element("dd", value)) for title, value in facts)
    return element("dl", *items, class_=name)


def check_table(checks: Sequence[Check], *, fold_passed: bool = False) -> Markup:
    """Return a row for each check: its result, its name, its evidence, and what to do where it did not pass.

    With `fold_passed` those that passed are folded.
    """
    if not checks:
        return text_element("p", "No checks were recorded.", class_="muted")
    if not fold_passed:
        return _check_rows(checks)
    passed = [check for check in checks if check.result is CheckResult.passed]
    others = [check for check in checks if check.result is not CheckResult.passed]
    return join_markup(
        _check_rows(others) if others else EMPTY,
        _fold(f"{len(passed)} passed", _check_rows(passed)) if passed else EMPTY,
    )


def _check_rows(checks: Iterable[Check]) -> Markup:
    return make_table(["mark", "name", ""], ["Result", "Check", "Evidence"], map(_check_row, checks))


def _check_row(check: Check) -> Markup:
    word, colour = MARKS[check.result]
    remedy = check.remedy if check.result is not CheckResult.passed else ""
    return element(
        "tr",
        text_element("td", word, class_=f"mark {colour}"),
        text_element("td", check.name, class_="name"),
        element(
            "td",
            escape_text(name_options(check.evidence)),
            text_element("span", name_options(remedy), class_="remedy") if remedy else EMPTY,
        ),
    )


def finding_list(findings: Sequence[Finding]) -> Markup:
    """Return a row for each finding: what it means for the state, what it is about, and what was found."""
    if not findings:
        return EMPTY
    return make_table(["mark", "name", ""], ["State", "Of", "Finding"], map(_finding_row, findings))


def _finding_row(finding: Finding) -> Markup:
    word, colour = SEVERITIES[finding.severity]
    names = dict.fromkeys(name for name in (finding.producer, finding.subject) if name)
    return element(
        "tr",
        text_element("td", word, class_=f"mark {colour}"),
        text_element("td", ": ".join(names) or finding.source.value, class_="name"),
        text_element("td", name_options(finding.text)),
    )


def producer_table(producers: Sequence[ProducerAnswers]) -> Markup:
    """Return a row for each producer: the seconds of each answer and of all, and its problems below its name."""
    if not producers:
        return text_element("p", "No producer answered in this attempt.", class_="muted")
    verbs = list(dict.fromkeys(verb for producer in producers for verb in producer.seconds))
    order = "Those with a problem first, then the slowest. The time until each answer, and of all answers."
    shown, others = producers[:MAX_OPEN], producers[MAX_OPEN:]
    return join_markup(
        text_element("p", order, class_="muted"),
        _producer_rows(shown, verbs),
        _fold(f"{len(others)} more", _producer_rows(others, verbs)) if others else EMPTY,
    )


def _producer_rows(producers: Iterable[ProducerAnswers], verbs: Sequence[str]) -> Markup:
    classes = ["", *("number verb" for _ in verbs), "number verb"]
    return make_table(classes, ["Producer", *verbs, "all"], (_producer_row(producer, verbs) for producer in producers))


def _producer_row(producer: ProducerAnswers, verbs: Sequence[str]) -> Markup:
    times = [(verb, producer.seconds.get(verb)) for verb in verbs]
    cells = (
        text_element("td", "" if seconds is None else format_seconds(seconds), class_="number verb", data_label=verb)
        for verb, seconds in [*times, ("all", producer.total_seconds)]
    )
    name = element(
        "td",
        escape_text(producer.name),
        text_element("span", f" {producer.kind}", class_="muted"),
        *(text_element("span", text, class_="problem bad") for text in producer.problems),
        text_element("span", f"stopped for {describe_seconds(producer.standstill)}", class_="remedy")
        if producer.standstill
        else EMPTY,
    )
    return element("tr", name, *cells)


def kernel_table(kernels: Iterable[tuple[str, KernelFacts]]) -> Markup:
    """Return a row for each kernel of the handover: its part, its release, and its banner with its boot id."""
    rows = (
        element(
            "tr",
            text_element("td", part, class_="mark"),
            text_element("td", facts.release or "not known", class_="name"),
            element(
                "td",
                escape_text(facts.banner),
                text_element("span", f"boot {facts.boot_id}", class_="remedy mono") if facts.boot_id else EMPTY,
            ),
        )
        for part, facts in kernels
    )
    return make_table(["mark", "name", ""], ["Kernel", "Release", "Build"], rows)


def cost_table(costs: Iterable[BootCost], timeline: Timeline) -> Markup:
    """Return a row for each thing that makes the boot slow: the time of the parts it belongs to, and what to do."""
    rows = (
        element(
            "tr",
            element("td", *map(_part_time, timeline.select_parts(cost)), class_="name"),
            element(
                "td",
                escape_text(name_options(cost.found)),
                text_element("span", name_options(cost.remedy), class_="remedy"),
            ),
        )
        for cost in costs
    )
    return make_table(["name", ""], ["Parts of the boot", "Finding"], rows)


def _part_time(row: TimelineRow) -> Markup:
    return text_element("div", f"{row.name} {format_seconds(row.seconds, row.error_seconds)}")


def image_table(images: Sequence[ImageFacts]) -> Markup:
    """Return a row for each file of the next kernel: its role, its size, its name and its SHA-256."""
    if not images:
        return EMPTY
    rows = (
        element(
            "tr",
            text_element("td", image.role, class_="mark"),
            text_element("td", format_size(image.bytes), class_="name"),
            element("td", escape_text(image.name), text_element("span", image.digest, class_="remedy mono")),
        )
        for image in images
    )
    return join_markup(
        text_element("h3", "Files that were loaded"),
        make_table(["mark", "name", ""], ["Role", "Size", "SHA-256"], rows),
    )


def origin_table(origins: Sequence[FileOrigin]) -> Markup:
    """Return a row for each file as it was given: its role, its name, who vouches for it, and its SHA-256."""
    if not origins:
        return EMPTY
    rows = (
        element(
            "tr",
            text_element("td", origin.role, class_="mark"),
            text_element("td", origin.name, class_="name"),
            element(
                "td",
                escape_text(describe_proofs(origin)),
                text_element("span", origin.digest, class_="remedy mono"),
            ),
        )
        for origin in origins
    )
    return join_markup(
        text_element("h3", "Files that were given"),
        make_table(["mark", "name", ""], ["Role", "File", "Origin"], rows),
    )


def make_table(classes: Sequence[str], titles: Sequence[str], rows: Iterable[Markup]) -> Markup:
    """Return a table; each column has a class of the style sheet, which may be empty, and a title."""
    heads = (text_element("th", title, class_=name) for name, title in zip(classes, titles, strict=True))
    return element("table", element("thead", element("tr", *heads)), element("tbody", *rows))


def _fold(title: str, content: Markup) -> Markup:
    return element("details", text_element("summary", title), content)
