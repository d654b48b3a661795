# SPDX-License-Identifier: LGPL-2.1-or-later
"""What khoctl prints of others' text: no field of any of the model's moves a cursor or forges a line."""

import dataclasses
import enum
import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import click
import pytest

from khoctl import render
from khoctl.status_page import render_status
from khod.errors import KhoError
from khod.model import (
    Check,
    CheckResult,
    Event,
    Fate,
    Generation,
    LuoSession,
    Phase,
    Plan,
    Planned,
    Producer,
    SessionFate,
    Status,
    StepTiming,
    Verdict,
    Word,
)
from tests.unit.monitored import BARE

HOSTILE = "x\x1b[2J\x1b]0;owned\x07\x1b[8m)\npass  signature  vmlinuz is signed\r\x9b2J\u202e\u2066\u2028\x7f\udc9b"
OURS = re.compile(r"\x1b\[[0-9;]*m")
"""The colours and weights that khoctl itself puts in; of what is hostile no sequence is one of these after escaping."""


def hostile(value: Any) -> Any:
    """The same with something hostile behind every string that says something of its own."""
    if isinstance(value, enum.Enum) or value in ("", "ready"):
        return value
    if isinstance(value, str):
        return value + HOSTILE
    if isinstance(value, list):
        return [hostile(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{name: hostile(field) for name, field in vars(value).items()})
    return value


def producer(name: str, phase: str, answer: str, *, waiting: bool = False) -> Producer:
    return Producer(name, "hook", 0, phase, answer, 0.5, waiting, 0.5 if waiting else None)


PRODUCERS = [
    producer("a", "freeze", "ready"),
    producer("b", "freeze", "no: busy"),
    producer("c", "prepare", "", waiting=True),
    producer("d", "", ""),
]
CHECKS = [Check("inhibitors", CheckResult.warn, "A shutdown is blocked: mallory (why)", "End that first.")]
VERDICT = Verdict(["memblock"], ["db"], ["LUO"], "producer db: no answer", unknown=["session vmm"], checks=CHECKS)
SESSIONS = [LuoSession("vmm", "vmm (process 7, vmm.service)", fate, "because") for fate in SessionFate]
WORDS = [Word("quiet", Fate.removed, "the log"), Word("kho=on", Fate.kept), Word("single", Fate.added)]
EVENT = Event(1.0, Phase.freezing, "db: no", "run", PRODUCERS[1], WORDS)
PLAN = Plan([Planned("prepare", "tell db to prepare", "tell it cancel")], CHECKS, "kho=on single", WORDS)


def status(phase: Phase) -> Status:
    return replace(
        BARE,
        phase=phase,
        summary="It stands.",
        remedy="Do this.",
        generation=Generation.stateless,
        kernel_loaded=True,
        kernel_release="7.3.4",
        boot_id="boot",
        run="run",
        done=["prepare"],
        left=["load"],
        waiting_for=["c"],
        producers=PRODUCERS,
        verdict=VERDICT,
        previous_release="6.19.11",
        handovers=1,
        blackout_seconds=1.5,
        timings=[StepTiming("prepare", 1.0, 0.5)],
        last_error="db said no",
        sessions=SESSIONS,
        sessions_unseen="khod may not look",
    )


PAGES: dict[str, tuple[Callable[[Any], str], Any]] = {
    **{f"status, {phase.value}": (render_status, status(phase)) for phase in Phase},
    "verify": (lambda found: render_status(found, verbose=True), status(Phase.degraded)),
    "producers": (render.render_producers, PRODUCERS),
    "counted": (render.count_producers, PRODUCERS),
    **{f"producer {found.name}": (render.producer_text, found) for found in PRODUCERS},
    "checks": (render.render_checks, CHECKS),
    "words": (lambda words: "\n".join(render.render_words(words)), WORDS),
    "plan": (render.render_plan, PLAN),
    "short plan": (render.short_plan, PLAN),
    "event": (render.render_event, EVENT),
}


def test_a_plan_is_in_columns_and_of_no_run() -> None:
    steps = [Planned("prepare", "tell db", "tell it cancel"), Planned("activate", "write 1", "write 0")]
    page = click.unstyle(render.render_plan(Plan(steps, CHECKS, "quiet khod.run=908fcf1705b3 -- x", [])))
    assert page.split("\n")[:7] == [
        "1. prepare   tell db",
        "   undo      tell it cancel",
        "2. activate  write 1",
        "   undo      write 0",
        "",
        "command line: quiet khod.run=RUN -- x",
        "  the running kernel's, with khod.run=RUN",
    ]


def test_verify_shows_every_check_and_status_those_that_found_something() -> None:
    checks = [
        Check("kho", CheckResult.passed, "this kernel was given a state tree", ""),
        Check("contents db", CheckResult.passed, "table: 64 of 262144 pages compared", ""),
        Check("log", CheckResult.skipped, "its first 7 records were overwritten", ""),
    ]
    found = replace(status(Phase.verified), verdict=Verdict(checks=checks))
    brief = click.unstyle(render_status(found))
    assert "2 passed, 1 not known" in brief
    assert "skip  log: its first 7 records were overwritten" in brief
    assert "64 of 262144 pages compared" not in brief
    assert "pass  contents db: table: 64 of 262144 pages compared" in click.unstyle(render_status(found, verbose=True))


def test_an_event_has_the_time_of_day() -> None:
    for ago in (0.0, 7200.0):
        shown = render.render_event(replace(EVENT, at=time.time() - ago)).split()[0]
        clock = (time.strftime("%H:%M:%S", time.localtime(time.time() - ago - late)) for late in range(30))
        assert shown[:8] in {*clock}
        assert re.fullmatch(r"\.[0-9]{3}", shown[8:])


@pytest.mark.parametrize("name", PAGES)
def test_a_page_has_the_lines_that_are_ours_and_nothing_a_terminal_acts_on(name: str) -> None:
    make, harmless = PAGES[name]
    page, plain = make(hostile(harmless)), make(harmless)
    assert page.count("\n") == plain.count("\n")
    assert len(OURS.findall(page)) == len(OURS.findall(plain))
    assert OURS.sub("", page).replace("\n", "").isprintable()
    assert OURS.sub("", plain).split() != [], "there is something to print"


@pytest.mark.parametrize("name", PAGES)
def test_what_is_harmless_is_printed_as_it_is(name: str) -> None:
    make, harmless = PAGES[name]
    assert "\\" not in make(harmless)


def test_json_is_ascii_and_whole() -> None:
    line = render.as_json(hostile(status(Phase.idle)))
    assert line.isascii()
    assert line.isprintable()
    assert json.loads(line)["summary"] == f"It stands.{HOSTILE}"
    assert render.error_json(KhoError(HOSTILE, where=HOSTILE)).isprintable()


@pytest.mark.parametrize("result", CheckResult)
def test_every_result_of_a_check_is_a_line_with_its_evidence(result: CheckResult) -> None:
    page = render.render_checks([Check("formats", result, "what was found", "")])
    assert page.splitlines()[0].endswith("formats  what was found")


def test_a_plan_shows_what_is_off() -> None:
    """It was found, and the operator goes on all the same."""
    off = Check("formats", CheckResult.off, "would panic at boot", "")
    assert "would panic at boot" in render.render_plan(Plan([], [off], "", []))
