# SPDX-License-Identifier: LGPL-2.1-or-later
"""The report of an attempt: what the page shows, that it needs nothing else, and that no text of others is markup."""

import base64
import hashlib
import json
import re
import unicodedata
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from khoctl.figures import format_date, format_seconds
from khoctl.report.chrome_trace import write_trace
from khoctl.report.document import write_document
from khoctl.report.page import write_page
from khoctl.report.producers import collect_answers
from khod.history.model import AttemptRecord, RowKind, Standstill
from khod.model import Check, CheckResult, EventKind, Fate, Phase
from khod.values import decode_value
from tests.unit import attempts

ATTEMPTS = {
    "orderly": attempts.orderly_attempt(),
    "200 producers": attempts.orderly_attempt(200),
    "degraded": attempts.degraded_attempt(),
    "cold boot": attempts.cold_boot_attempt(),
    "rolled back": attempts.rolled_back_attempt(),
    "hostile": attempts.hostile_attempt(),
    "empty": attempts.empty_attempt(),
}
every_attempt = pytest.mark.parametrize("attempt", ATTEMPTS.values(), ids=ATTEMPTS.keys())


class Tags(HTMLParser):
    """The elements and attributes that a browser's parser would see in a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += attrs


def parse(page: str) -> ET.Element:
    return ET.fromstring(page)


def text_of(page: str) -> str:
    """The page's texts, without its style sheet."""
    root = parse(page)
    body = root.find("body")
    assert body is not None
    return " ".join(" ".join(body.itertext()).split())


def section(page: str, title: str) -> ET.Element:
    return next(found for found in parse(page).iter("section") if found.findtext("h2") == title)


def cells(found: ET.Element) -> list[list[str]]:
    """The texts of a table's rows."""
    return [
        ["".join(cell.itertext()) for cell in row.iter("td")] for row in found.iter("tr") if row.find("td") is not None
    ]


@every_attempt
def test_a_page_is_well_formed(attempt: AttemptRecord) -> None:
    page = write_page(attempt)
    assert page.startswith("<!DOCTYPE html>\n")
    assert {"script", "link", "iframe", "img", "object", "base", "form"}.isdisjoint(Tags(page).elements)
    assert Tags(page).elements == [element.tag for element in parse(page).iter()]


@every_attempt
def test_a_page_needs_nothing_else(attempt: AttemptRecord) -> None:
    """No attribute names an address, no style sheet loads, no handler runs; the policy would refuse it, too."""
    page = write_page(attempt)
    for name, value in Tags(page).attributes:
        assert name not in ("src", "href", "style", "xlink:href", "srcset", "action")
        assert not name.startswith("on")
        assert re.fullmatch(r"url\(#[a-z0-9-]+\)", value or "") or "url(" not in (value or "")
    style = parse(page).findtext("head/style")
    assert style is not None
    assert not re.search(r"@import|url\(|://", style)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = next(
        meta.get("content") for meta in parse(page).iter("meta") if meta.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def test_a_text_of_others_is_no_markup_and_no_control_character() -> None:
    page = write_page(ATTEMPTS["hostile"])
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&quot;&#x27;&amp;\\n\\r\\x1b[2J\\u202e" in page
    assert {char for char in page if unicodedata.category(char) in ("Cc", "Cf", "Zl", "Zp", "Cs")} == {"\n"}
    assert Tags(page).elements.count("svg") == 2


def test_a_newline_of_others_begins_no_line_but_in_a_log() -> None:
    """In the journal's end a newline is one; in a reason it is shown."""
    made = ATTEMPTS["cold boot"]
    summary = replace(made.summary, reason="first\nsecond")
    page = write_page(replace(made, summary=summary))
    assert "first\\nsecond" in page
    assert "block devices.\nsystemd-shutdown[1]" in page


def test_the_page_says_how_it_ended_and_for_how_long() -> None:
    page = write_page(ATTEMPTS["orderly"])
    said = text_of(page)
    assert "Verified" in said
    assert "7.3.4 → 7.3.4" in said
    assert "The blackout was 15.000 s ± 0.004 s" in said
    assert "alice (uid 1000) through sudo" in said
    assert "2026-11-25 21:00:00" in said


@pytest.mark.parametrize(
    ("name", "title"),
    [("degraded", "Degraded"), ("cold boot", "Cold boot"), ("rolled back", "Rolled back"), ("empty", "Preparing")],
)
def test_the_title_is_the_outcome(name: str, title: str) -> None:
    page = write_page(ATTEMPTS[name])
    assert "".join(parse(page).findall("body/main/header/h1/span")[0].itertext()) == title


def test_without_a_recovery_there_is_no_figure() -> None:
    for name in ("cold boot", "rolled back", "empty"):
        assert "blackout" not in text_of(write_page(ATTEMPTS[name])).lower()


def test_the_verdict_stands_with_its_evidence_and_findings() -> None:
    rows = cells(section(write_page(ATTEMPTS["degraded"]), "Verdict"))
    assert rows == [
        ["changed", "database: buffer-pool", "page 17 of 16384 differs"],
        ["lost", "kv-store", "the snapshot's checksum is wrong"],
        ["passed", "kho", "the kernel was reached by kexec and took over KHO's state"],
        ["failed", "content", "database: buffer-pool differsRestore it from a backup."],
    ]


def test_each_producer_has_its_times_the_slowest_first() -> None:
    attempt = ATTEMPTS["200 producers"]
    rows = cells(section(write_page(attempt), "Producers"))
    expected: dict[str, list[float]] = {}
    for event in attempt.events:
        if event.kind is EventKind.producer_answered:
            assert event.producer is not None
            assert event.duration is not None
            expected.setdefault(event.producer.name, []).append(event.duration)
    assert len(rows) == 200
    for name, *times in rows:
        took = expected[name.split()[0]]
        assert times == [f"{seconds:.3f} s" for seconds in (*took, sum(took))]
    totals = [sum(expected[row[0].split()[0]]) for row in rows]
    assert totals == sorted(totals, reverse=True)


def test_producers_beyond_a_screen_are_folded() -> None:
    producers = section(write_page(ATTEMPTS["200 producers"]), "Producers")
    folded = producers.find("details")
    assert folded is not None
    assert folded.findtext("summary") == "180 more"
    assert len(cells(folded)) == 180
    assert section(write_page(ATTEMPTS["orderly"]), "Producers").find("details") is None


def test_a_producer_with_a_problem_stands_first_and_says_it() -> None:
    answers = collect_answers(ATTEMPTS["degraded"].events)
    assert [(item.name, item.problems) for item in answers] == [
        ("kv-store", ["restore: the snapshot's checksum is wrong"]),
        ("database", []),
    ]


def test_a_producer_that_was_stopped_says_for_how_long() -> None:
    made = ATTEMPTS["orderly"]
    standstill = Standstill("database", "vm", 2.5, 0.25, 2.25)
    page = write_page(replace(made, timeline=replace(made.timeline, standstills=[standstill])))
    shown = "".join(section(page, "Producers").itertext())
    assert "stopped for 2.5 s ± 0.3 s, by its own clock 2.250 s" in shown


def test_a_producer_that_never_answered_says_so() -> None:
    asked = replace(attempts.producer_event("slow", "freeze", "", 0.0, 1.0), kind=EventKind.producer_called)
    assert [item.problems for item in collect_answers([asked])] == [["freeze: no answer"]]


def test_each_cause_of_a_slow_boot_has_the_time_of_its_parts_in_this_run() -> None:
    attempt = ATTEMPTS["orderly"]
    times = [
        "".join(
            f"{row.name} {format_seconds(row.seconds, row.error_seconds)}"
            for row in attempt.timeline.rows
            if row.kind in kinds
        )
        for kinds in ((RowKind.kernel,), (RowKind.initrd, RowKind.userspace))
    ]
    found = cells(section(write_page(attempt), "What makes the boot slow"))
    assert [row[0] for row in found] == times
    assert "--append quiet" in found[0][1]
    assert "What makes the boot slow" not in write_page(ATTEMPTS["empty"])


def test_checks_that_passed_are_folded() -> None:
    found = section(write_page(ATTEMPTS["orderly"]), "Checks before the jump")
    assert [row[:2] for row in cells(found)] == [
        ["warning", "watchdog"],
        ["skipped", "signature"],
        ["passed", "kho"],
        ["passed", "memory"],
    ]
    assert found.findtext("details/summary") == "2 passed"


def test_a_remedy_names_khoctl_s_options() -> None:
    check = Check("formats", CheckResult.fail, "not in the command line", "Add it: `kernel.append=kho=on`")
    assert "Add it: --append kho=on" in text_of(write_page(replace(ATTEMPTS["orderly"], checks=[check])))


def test_the_command_line_s_changes_are_shown() -> None:
    found = section(write_page(ATTEMPTS["orderly"]), "Command line")
    assert [item.text for item in found.findall("ul/li/code")] == ["- quiet", f"+ khod.run={attempts.RUN}"]


def test_without_an_event_the_command_lines_are_compared() -> None:
    made = replace(ATTEMPTS["orderly"], events=[])
    found = section(write_page(made), "Command line")
    assert [item.text for item in found.findall("ul/li/code")] == ["- quiet", f"+ khod.run={attempts.RUN}"]


def test_who_may_not_know_is_told_so() -> None:
    made = ATTEMPTS["orderly"]
    made = replace(made, summary=replace(made.summary, by=""), origin=replace(made.origin, cmdline=""))
    assert text_of(write_page(made)).count("not recorded, or not shown to this user") == 2


def test_the_cold_boot_is_explained() -> None:
    said = " ".join("".join(section(write_page(ATTEMPTS["cold boot"]), "The cold boot").itertext()).split())
    assert "Last phaseexecuting" in said
    assert "Watchdogdid not reset the host" in said
    assert "Rebooting with kexec." in said
    assert "Kernel panic - not syncing: KHO: cannot restore" in said


def test_kernels_and_digests_are_named() -> None:
    attempt = ATTEMPTS["orderly"]
    said = text_of(write_page(attempt))
    assert attempt.target is not None
    for image in attempt.target.images:
        assert image.digest in said
        assert image.name in said
    assert attempt.origin.boot_id in said
    assert said.count(attempts.BANNER) == 3


def test_differences_of_the_state_tree_are_listed() -> None:
    found = section(write_page(ATTEMPTS["degraded"]), "State tree")
    assert [item.text for item in found.iter("code")] == ATTEMPTS["degraded"].trees


def test_damage_is_named() -> None:
    assert "This report is incomplete: 3 lines of the log were damaged" in text_of(write_page(ATTEMPTS["empty"]))


@every_attempt
def test_a_document_is_the_attempt(attempt: AttemptRecord) -> None:
    document = json.loads(write_document(attempt))
    assert (document["schema"], document["version"]) == ("io.kho.Report", 1)
    assert decode_value(AttemptRecord, document["attempt"]) == attempt


@every_attempt
def test_a_trace_has_each_row_at_its_time(attempt: AttemptRecord) -> None:
    trace = json.loads(write_trace(attempt))
    drawn = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    rows = attempt.timeline.rows
    first = min((row.begin for row in rows), default=0.0)
    assert len(drawn) == len(rows)
    for event, row in zip(drawn, rows, strict=True):
        assert event["ts"] >= 0
        assert event["ts"] == pytest.approx((row.begin - first) * 1e6, abs=1)
        assert event["dur"] == pytest.approx(row.seconds * 1e6, abs=1)
        assert event["cat"] == row.kind.name


@every_attempt
def test_the_events_of_a_track_nest(attempt: AttemptRecord) -> None:
    """On one track an event lies behind another or in it, never across its end: a viewer would drop it."""
    if attempt is ATTEMPTS["hostile"]:  # all its units have one name, and so one track
        return
    tracks: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for event in json.loads(write_trace(attempt))["traceEvents"]:
        if event["ph"] == "X":
            tracks.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    for spans in tracks.values():
        open_until: list[int] = []
        for begin, end in sorted(spans, key=lambda span: (span[0], -span[1])):
            while open_until and open_until[-1] <= begin:
                open_until.pop()
            assert not open_until or end <= open_until[-1]
            open_until.append(end)


def test_producers_and_units_have_tracks_of_their_own() -> None:
    events = json.loads(write_trace(ATTEMPTS["orderly"]))["traceEvents"]
    groups = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    tracks = {(event["pid"], event["tid"]): event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert groups == {1: f"handover {attempts.RUN}", 2: "producers", 3: "units"}
    named = [(groups[process], name) for (process, _thread), name in tracks.items()]
    assert sorted(named) == sorted(
        [(f"handover {attempts.RUN}", "timeline")]
        + [("producers", name) for name in attempts.NAMES]
        + [("units", name) for name, _begin, _seconds in attempts.UNITS]
    )
    assert {(event["pid"], event["tid"]) for event in events if event["ph"] == "X"} == tracks.keys()


@pytest.mark.parametrize(
    ("seconds", "error", "text"),
    [
        (15.0, 0.0, "15.000 s"),
        (15.0, 0.004, "15.000 s ± 0.004 s"),
        (15.0, 0.0041, "15.000 s ± 0.005 s"),
        (15.0, 0.00001, "15.000 s ± 0.001 s"),
        (15.04, 1.0, "15.0 s ± 1.0 s"),
        (0.0004, 0.0, "0.000 s"),
    ],
)
def test_an_error_is_never_rounded_down(seconds: float, error: float, text: str) -> None:
    assert format_seconds(seconds, error) == text


def test_a_date_that_no_calendar_has_is_a_question_mark() -> None:
    assert format_date(1e300) == "?"
    assert format_date(0.0) == "1970-01-01 00:00:00"


def test_the_attempts_of_these_tests_are_what_khod_makes() -> None:
    """The rows from 0 on follow one another and add up to the blackout, as the model says."""
    timeline = ATTEMPTS["orderly"].timeline
    rows = [row for row in timeline.rows if not row.parent and row.begin >= 0]
    assert sum(row.seconds for row in rows) == pytest.approx(timeline.blackout_seconds)
    assert {row.kind for row in timeline.rows} == set(RowKind)
    assert ATTEMPTS["rolled back"].summary.outcome is Phase.idle
    assert any(word.fate is Fate.added for event in ATTEMPTS["orderly"].events for word in event.words or ())
