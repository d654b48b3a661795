# SPDX-License-Identifier: LGPL-2.1-or-later
"""One attempt as a page (HTML)."""

from collections.abc import Iterable

from khoctl.figures import format_date
from khoctl.render import GENERATIONS, phase_name, terms_rows
from khoctl.report.frame import frame_page, section
from khoctl.report.markup import EMPTY, Markup, element, escape_lines, escape_text, join_markup, text_element
from khoctl.report.picture import NARROW, WIDE, draw_picture
from khoctl.report.producers import collect_answers
from khoctl.report.tables import (
    check_table,
    cost_table,
    fact_list,
    finding_list,
    image_table,
    kernel_table,
    origin_table,
    producer_table,
)
from khoctl.report.verdict import describe_outcome, name_kernels, outcome_class, outcome_title
from khod.history.model import AttemptRecord, ClockSource, ColdBoot
from khod.model import Fate, Verdict, Word
from khod.text import split_words

NOT_SHOWN = "not recorded, or not shown to this user"
CLOCKS = {
    ClockSource.tsc: "the processor's time-stamp counter",
    ClockSource.ptp: "a PTP clock",
    ClockSource.wall: "the wall clock, which the next kernel may set anew",
}
"""What bridges the clocks of the two kernels."""


def write_page(attempt: AttemptRecord) -> str:
    """Return the page of an attempt; the same attempt always gives the same page."""
    title = f"Handover {attempt.summary.run}: {outcome_title(attempt)}"
    return frame_page(title, _write_header(attempt), *_write_sections(attempt))


def _write_sections(attempt: AttemptRecord) -> Iterable[Markup]:
    if attempt.cold_boot is not None:
        yield section(
            "The cold boot",
            _write_cold_boot(attempt.cold_boot, reason_shown=attempt.cold_boot.reason == attempt.summary.reason),
        )
    yield section("Verdict", _write_verdict(attempt))
    if attempt.terms is not None:
        rows = [(key.capitalize(), text) for key, text in terms_rows(attempt.terms)]
        yield section("Profile", fact_list(rows))
    yield section("Timeline", _write_timeline(attempt))
    if attempt.target and attempt.target.costs:
        yield section("What makes the boot slow", cost_table(attempt.target.costs, attempt.timeline))
    yield section("Producers", producer_table(collect_answers(attempt.events, attempt.timeline.standstills)))
    yield section("Checks before the jump", check_table(attempt.checks, fold_passed=True))
    yield section("Command line", _write_cmdline(attempt))
    if attempt.trees:
        yield section("State tree", _write_trees(attempt.trees))
    yield section("Kernels and images", _write_kernels(attempt))


def _write_header(attempt: AttemptRecord) -> Markup:
    summary = attempt.summary
    how = "" if attempt.target is None else "at once" if attempt.target.at_once else "orderly"
    facts = [
        ("Began (UTC)", _format_time(summary.began_at)),
        ("Ended (UTC)", _format_time(summary.ended_at)),
        ("Asked for by", summary.by or NOT_SHOWN),
        ("Jump", how),
        ("Interface", GENERATIONS.get(attempt.generation, attempt.generation)),
    ]
    return element(
        "header",
        element(
            "p", escape_text("Kernel handover "), text_element("span", summary.run, class_="mono"), class_="eyebrow"
        ),
        element(
            "h1",
            text_element("span", outcome_title(attempt), class_=outcome_class(attempt)),
            text_element("span", f" {name_kernels(attempt)}", class_="kernels"),
        ),
        *(text_element("p", sentence, class_="lede") for sentence in describe_outcome(attempt)),
        *(
            _paragraph(f"This report is incomplete: {damage}", "warn")
            for damage in (attempt.damage, summary.damage)
            if damage
        ),
        fact_list([(name, value) for name, value in facts if value], name="across"),
    )


def _format_time(at: float) -> str:
    return format_date(at) if at else "not known"


def _write_verdict(attempt: AttemptRecord) -> Markup:
    verdict = attempt.verdict
    if verdict is None:
        text = "Nothing was verified: no next kernel took over state in this attempt."
        return join_markup(finding_list(attempt.findings), _paragraph(text))
    tolerated = [_paragraph("Tolerated, as the profile says:"), finding_list(verdict.tolerated)]
    return join_markup(
        finding_list(attempt.findings or verdict.findings),
        *(tolerated if verdict.tolerated else ()),
        check_table(verdict.checks),
        _list_blobs(verdict),
    )


def _list_blobs(verdict: Verdict) -> Markup:
    """List the state tree's blobs by what became of them."""
    named = [
        ("Arrived", verdict.arrived),
        ("Missing", verdict.missing),
        ("Changed", verdict.changed),
        ("Not known", verdict.unknown),
    ]
    facts = [(title, ", ".join(names)) for title, names in named if names]
    return join_markup(text_element("h3", "Blobs of the state tree"), fact_list(facts)) if facts else EMPTY


def _write_timeline(attempt: AttemptRecord) -> Markup:
    timeline = attempt.timeline
    if not timeline.rows:
        return join_markup(*map(_paragraph, timeline.unknown or ["No timeline was recorded."]))
    pictures = (
        element("figure", draw_picture(timeline, width), class_=name)
        for width, name in ((WIDE, "wide"), (NARROW, "narrow"))
    )
    clocks = f"The clocks of the two kernels were bridged by {CLOCKS[timeline.source]}." if timeline.source else ""
    return join_markup(
        *pictures,
        _paragraph(clocks, "muted") if clocks else EMPTY,
        *(_paragraph(sentence, "muted") for sentence in timeline.unknown),
        join_markup(text_element("h3", "systemd-analyze time"), _preformatted(timeline.analyze))
        if timeline.analyze
        else EMPTY,
    )


def _write_cold_boot(found: ColdBoot, *, reason_shown: bool) -> Markup:
    watchdog = {True: "reset the host", False: "did not reset the host", None: "not known"}[found.watchdog]
    parts = [
        EMPTY if reason_shown else _paragraph(found.reason),
        fact_list([("Last phase", phase_name(found.last_phase)), ("Watchdog", watchdog)]),
    ]
    if found.journal_end:
        parts += [text_element("h3", "The journal of the kernel before ends"), _preformatted(found.journal_end)]
    if found.last_words:
        parts += [text_element("h3", "Last words, from pstore"), _preformatted("\n".join(found.last_words))]
    return join_markup(*parts)


def _write_cmdline(attempt: AttemptRecord) -> Markup:
    target = attempt.target.kernel.cmdline if attempt.target else ""
    words = next((event.words for event in reversed(attempt.events) if event.words), None)
    if words is None and target and attempt.origin.cmdline:
        words = _compare_words(attempt.origin.cmdline, target)
    changed = [word for word in words or () if word.fate is not Fate.kept]
    parts = [element("ul", *map(_write_word, changed), class_="plain")] if changed else []
    if words is not None and not changed:
        parts.append(_paragraph("Both kernels have the same command line."))
    for title, cmdline in (("Kernel before", attempt.origin.cmdline), ("Next kernel", target)):
        shown = _preformatted(cmdline) if cmdline else _paragraph(NOT_SHOWN, "muted")
        parts += [text_element("h3", title), shown]
    return join_markup(*parts)


def _compare_words(before: str, after: str) -> list[Word]:
    """Return the words that only one of two command lines has."""
    left, right = split_words(before), split_words(after)
    removed = [Word(word, Fate.removed) for word in left if word not in right]
    return removed + [Word(word, Fate.added) for word in right if word not in left]


def _write_word(word: Word) -> Markup:
    sign, name = ("+", "added") if word.fate is Fate.added else ("-", "removed")
    lost = text_element("span", word.lost, class_="problem") if word.lost else EMPTY
    return element("li", text_element("code", f"{sign} {word.text}", class_=name), lost)


def _write_trees(lines: list[str]) -> Markup:
    classes = {"-": "removed", "+": "added"}
    shown = (text_element("code", line, class_=classes.get(line[:1], "muted")) for line in lines)
    return element("ul", *(element("li", line) for line in shown), class_="plain")


def _write_kernels(attempt: AttemptRecord) -> Markup:
    kernels = [("Before", attempt.origin)]
    kernels += [("Loaded", attempt.target.kernel)] if attempt.target else []
    kernels += [("Arrived", attempt.arrived)] if attempt.arrived else []
    if attempt.target is None:
        return kernel_table(kernels)
    return join_markup(kernel_table(kernels), image_table(attempt.target.images), origin_table(attempt.target.origins))


def _paragraph(text: str, name: str = "") -> Markup:
    return text_element("p", text, **({"class_": name} if name else {}))


def _preformatted(text: str) -> Markup:
    return element("pre", escape_lines(text))
