# SPDX-License-Identifier: LGPL-2.1-or-later
"""What khoctl prints: the same dataclasses as a page for people, or as JSON.

Every field that khod passes on from others (producers, other users, files, images) is escaped before it is put on a
page, so that no text moves the cursor or looks like a line of the page. The JSON encoder escapes by itself.
"""

import dataclasses
import enum
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import typer

from khoctl.figures import format_local_time
from khoctl.layout import align_table
from khoctl.options import name_options
from khod.errors import KhoError, error_name
from khod.model import Check, CheckResult, Event, Fate, Phase, Plan, Producer, Terms, Word
from khod.text import join_names, printable
from khod.values import encode_value

T = TypeVar("T")
EVENT_INDENT = " " * 28
"""The indentation of a line that continues the message of an event."""

COLOURS = {
    Phase.verified: typer.colors.GREEN,
    Phase.degraded: typer.colors.RED,
    Phase.cold_boot: typer.colors.RED,
    Phase.failed: typer.colors.RED,
    Phase.inconsistent: typer.colors.RED,
    Phase.foreign: typer.colors.YELLOW,
    Phase.rolling_back: typer.colors.YELLOW,
}
DONE_WORDS = {
    "prepare": "prepared",
    "freeze": "frozen",
    "thaw": "thawed",
    "cancel": "cancelled",
    "restore": "restored",
    "finish": "finished",
}
DOING_WORDS = {
    "prepare": "preparing",
    "freeze": "freezing",
    "thaw": "thawing",
    "cancel": "cancelling",
    "restore": "restoring",
    "finish": "finishing",
}
OF_A_RUN = re.compile(r"(?<![^ ])khod\.run=[0-9a-f]+(?![^ ])")
EXAMPLE = "khod.run=RUN"
"""Stands in a plan for the run's name, which khod adds to the command line only when a handover begins."""
MAX_SHOWN = 10
"""The number of producers that a page shows by name; `khoctl producers` shows all."""

MARKS = {
    CheckResult.passed: ("pass", typer.colors.GREEN),
    CheckResult.warn: ("warn", typer.colors.YELLOW),
    CheckResult.fail: ("FAIL", typer.colors.RED),
    CheckResult.unsupported: ("FAIL", typer.colors.RED),
    CheckResult.skipped: ("skip", typer.colors.WHITE),
    CheckResult.off: ("off ", typer.colors.YELLOW),
}
GENERATIONS = {
    "none": "no Kexec HandOver",
    "sysfs": "KHO v3, /sys/kernel/kho",
    "finalize": "KHO, debugfs finalize (an abort forgets state)",
    "finalize_no_abort": "KHO, debugfs finalize (cannot be left)",
    "stateless": "stateless KHO",
}


def prepare_texts(value: T) -> T:
    """Return a value of the model with every string escaped for a terminal, and with khoctl's options named in it."""
    made: T = _prepare_texts(value)
    return made


def _prepare_texts(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value
    if isinstance(value, str):
        return printable(name_options(value))
    if isinstance(value, list | tuple):
        return type(value)(_prepare_texts(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _prepare_texts(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def as_json(value: Any) -> str:
    """Return a value as one line of JSON; enums by name, as on the wire."""
    return json.dumps(value, default=encode_value)


def error_json(error: KhoError) -> str:
    """An error as JSON."""
    return as_json(
        {
            "error": error_name(error),
            "exit_code": int(error.exit),
            "what": error.what,
            "where": error.where,
            "remedy": error.remedy,
            "cause": error.cause,
        }
    )


def phase_name(phase: Phase) -> str:
    """Return the name of a phase for people."""
    return phase.value.replace("_", " ")


def list_rows(key: str, texts: Sequence[str]) -> list[tuple[str, str]]:
    """Return a row for each text; only the first one has the key."""
    return [("" if number else key, text) for number, text in enumerate(texts)]


def format_rows(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Yield a line for each row below the head of a page, the texts in one column."""
    return (f"  {key:<10}  {text}" for key, text in rows)


def producer_text(found: Producer) -> str:
    """Describe the verb that was last sent to a producer, and its answer."""
    found = prepare_texts(found)
    if not found.phase:
        return f"{found.name} ({found.kind}): {found.answer or 'idle'}"
    done = f", {found.progress:.0%} done" if found.progress is not None and found.waiting else ""
    limit = f" of {found.limit:g} s" if found.waiting and found.limit else ""
    return f"{found.name} ({found.kind}): {_progress_text(found)}{done}, {found.seconds:.2f} s{limit}"


def _progress_text(found: Producer) -> str:
    """Describe what a producer is doing, or has done, for the verb that was last sent to it."""
    verb = printable(found.phase)
    if found.waiting:
        return f"{DOING_WORDS.get(verb, verb)}{f', {found.answer}' if found.answer else ''}"
    match found.answer:
        case "ready":
            return _done_word(found)
        case "" | "no answer":
            return f"{verb} interrupted"
        case "gone, and not told":
            return f"{found.answer} to {verb}"
        case answer:
            return f"{verb} failed: {answer}"


def is_notable(found: Producer) -> bool:
    """Whether the operator should read a producer's last answer."""
    return not found.waiting and found.answer not in ("", "ready")


def has_refused(found: Producer) -> bool:
    """Whether a producer refused what it was asked; one that was interrupted, or is gone, did not refuse."""
    return is_notable(found) and found.answer != "no answer" and found.phase not in ("thaw", "cancel")


def count_producers(found: list[Producer]) -> str:
    """Return the number of producers, in total and by how far they have come."""
    told = Counter(_reached_verb(item) for item in found)
    return f"{len(found)}: {', '.join(f'{count} {what}' for what, count in told.items())}"


def _reached_verb(found: Producer) -> str:
    if not found.phase:
        return "idle"
    if found.waiting:
        return f"not {_done_word(found)} yet"
    return ("not " if is_notable(found) else "") + _done_word(found)


def _done_word(found: Producer) -> str:
    """Return the verb that was last sent, as done ("frozen"), or the verb itself if this khoctl does not know it."""
    return DONE_WORDS.get(found.phase, printable(found.phase))


def render_producers(found: list[Producer], width: int | None = None) -> str:
    """Return a table with one row for each producer, in the order of `found`."""
    found = prepare_texts(found)
    if not found:
        return "No producers: none is configured in /etc/kho/producers.d, and none has registered."
    rows = [("RANK", "NAME", "KIND", "PHASE", "SECONDS", "ANSWER")]
    for item in found:
        done = f" ({item.progress:.0%})" if item.progress is not None and item.waiting else ""
        answer = item.answer or ("..." if item.waiting else "")
        seconds = f"{item.seconds:.3f}" if item.phase else "-"
        rows.append((str(item.rank), item.name, item.kind, item.phase or "-", seconds, f"{answer}{done}" or "-"))
    return "\n".join(align_table(rows, width))


FAILED_RESULTS = (CheckResult.fail, CheckResult.unsupported)
NOTED_RESULTS = (*FAILED_RESULTS, CheckResult.warn, CheckResult.off)
"""The results of checks that found something."""


def style_result(result: CheckResult) -> str:
    """Return the word of a result, in its colour."""
    text, colour = MARKS[result]
    return typer.style(text, fg=colour)


def render_checks(found: list[Check], *, quiet: bool = False) -> str:
    """Return a line for each check, its remedy below it, and a conclusion.

    With `quiet` only the checks that found something are listed.
    """
    found = prepare_texts(found)
    shown = [check for check in found if not quiet or check.result in NOTED_RESULTS]
    width = max((len(check.name) for check in shown), default=0)
    lines = []
    for check in shown:
        lines.append(f"{style_result(check.result)}  {check.name:<{width}}  {check.evidence}")
        if check.remedy and check.result is not CheckResult.passed:
            lines.append(f"      {'':<{width}}  -> {check.remedy}")
    return "\n".join([*lines, *([""] if lines else []), checks_conclusion(found)])


def checks_conclusion(found: list[Check]) -> str:
    """Return one line: how many checks failed or warned, which ones, and whether a handover can begin."""
    failed = [check.name for check in found if check.result in FAILED_RESULTS]
    warned = [check.name for check in found if check.result is CheckResult.warn]
    counts = Counter(check.result for check in found)
    said = [f"{len(failed)} failed ({', '.join(failed)})"] if failed else []
    said += [f"{counts[CheckResult.passed]} passed"] if not failed else []
    said += [f"{len(warned)} {'warning' if len(warned) == 1 else 'warnings'} ({', '.join(warned)})"] if warned else []
    off = [check.name for check in found if check.result is CheckResult.off]
    said += [f"{len(off)} off that would fail ({', '.join(off)})"] if off else []
    said += [f"{skipped} skipped"] if (skipped := counts[CheckResult.skipped]) else []
    if failed:
        return f"{typer.style('Refused', fg=typer.colors.RED, bold=True)}: {', '.join(said)}. No handover can begin."
    after = "" if any(check.name == "image" for check in found) else " The next kernel was not named, nor checked."
    return f"{typer.style('Ready', fg=typer.colors.GREEN, bold=True)}: {', '.join(said)}.{after}"


FATE_WORDS = {Fate.kept: (" ", None), Fate.added: ("+", typer.colors.GREEN), Fate.removed: ("-", typer.colors.RED)}


def render_words(found: Sequence[Word]) -> list[str]:
    """Return a line for each word of the command line that changes, and a line for what is lost with it."""
    changed = [prepare_texts(word) for word in found if word.fate is not Fate.kept]
    lines = []
    for word in changed:
        sign, colour = FATE_WORDS[word.fate]
        lines.append(typer.style(f"{sign} {word.text}", fg=colour))
        if word.lost:
            lines.append(typer.style(f"  -> {word.lost}", fg=typer.colors.YELLOW))
    return lines


def render_plan(found: Plan, profile_rows: Iterable[tuple[str, str]] = ()) -> str:
    """Return the page of a plan: steps with their undo, changes of the command line, checks that found something.

    Above them stand the rows of the profile, which are fit for a terminal.
    """
    found = prepare_texts(found)
    lines = list(format_rows(profile_rows))
    lines += [""] if lines else []
    width = max((len(step.step) for step in found.steps), default=0)
    for number, step in enumerate(found.steps, 1):
        lines.append(f"{number}. {typer.style(step.step.ljust(width), bold=True)}  {step.does}")
        lines.append(typer.style(f"   {'undo'.ljust(width)}  {step.undo}", dim=True))
    if found.cmdline:
        lines += ["", f"command line: {OF_A_RUN.sub(EXAMPLE, found.cmdline)}"]
        lines += [f"  {line}" for line in render_words(found.words)] or [f"  the running kernel's, with {EXAMPLE}"]
    if found.rollback_seconds:
        lines += ["", f"Until the jump is asked for, `khoctl abort` puts it back within {found.rollback_seconds:g} s."]
    lines += ["", render_checks(found.checks, quiet=True), "Nothing was touched."]
    return "\n".join(lines)


def terms_rows(terms: Terms | None) -> list[tuple[str, str]]:
    """Return rows for the terms of a handover, which are its profile's; none without any."""
    if terms is None:
        return []
    rows = [("profile", terms.profile or "")]
    if terms.window:
        rows.append(("window", f"{terms.window}{', ignored as asked' if terms.window_ignored else ''}"))
    rows.append(("requires", join_names(terms.require or ())))
    deadlines = dataclasses.asdict(terms.deadlines) if terms.deadlines else {}
    given = [f"{name} {seconds:g} s" for name, seconds in deadlines.items() if seconds is not None]
    rows.append(("deadlines", ", ".join(given)))
    if terms.blackout_budget is not None:
        rows.append(("budget", f"{terms.blackout_budget:g} s: a longer blackout makes the handover degraded"))
    rows += [("must pass", join_names(terms.must_pass or ())), ("tolerates", join_names(terms.tolerate or ()))]
    return [(key, text) for key, text in rows if text]


def short_plan(found: Plan) -> str:
    """Return what an operator must confirm: who is called, what is booted and how, and what the checks found."""
    found = prepare_texts(found)
    brief = [step for step in found.steps if step.step not in ("freeze", "activate", "verify")]
    lines = [f"  {step.step:<8}  {step.does}" for step in brief]
    lines += [f"  {line}" for line in render_words(found.words)]
    return "\n".join([*lines, render_checks(found.checks, quiet=True)])


def render_event(event: Event) -> str:
    """Return an event as a line (time of day, phase, message), and a line for each changed word of the command line."""
    about = event.producer
    said = event.message if about is None or not about.phase else f"{about.name}: {_progress_text(about)}"
    line = f"{_time_of_day(event.at)}  {phase_name(event.phase):<12}  {printable(name_options(said))}".rstrip()
    return "\n".join([line, *(f"{EVENT_INDENT}{change}" for change in render_words(event.words or ()))])


def _time_of_day(at: float) -> str:
    """Format a wall-clock time to the millisecond."""
    return f"{format_local_time(at, '%H:%M:%S')}.{int(at * 1000) % 1000:03}"
