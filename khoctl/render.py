# SPDX-License-Identifier: LGPL-2.1-or-later
"""What khoctl prints: the same dataclasses as a page for people, or as JSON.

Every field that khod passes on from others (producers, other users, files, images) is escaped before it is put on a
page, so that no text moves the cursor or looks like a line of the page. The JSON encoder escapes by itself.
"""

import dataclasses
import enum
import json
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import typer

from khoctl.figures import format_local_time, format_seconds
from khoctl.layout import align_table
from khoctl.options import name_options
from khod.errors import KhoError, error_name
from khod.model import Check, CheckResult, Event, Fate, LuoSession, Phase, Plan, Producer, Status, Word
from khod.text import join_names, printable
from khod.wire import encode_value

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
IN_BLACKOUT = ("freeze", "activate", "load", "restore")
"""The steps of the blackout whose time is known; the rest of the blackout is the jump and the boot."""
SECONDS_SHOWN = 120
"""From this many seconds on, an age is shown in minutes."""
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


def format_since(at: float) -> str:
    """Format a wall-clock time and its age; the age is left out if the clock has been set back since."""
    seconds = round(time.time() - at)
    ago = f"{seconds} s" if seconds < SECONDS_SHOWN else f"{seconds // 60} min"
    clock = format_local_time(at)
    return f"{clock} ({ago} ago)" if seconds >= 0 else clock


def render_status(status: Status, *, verbose: bool = False) -> str:
    """Return the status page: the phase with its summary, the evidence, then what to do next.

    With `verbose` every check of this boot's verification is shown, else those that found something.
    """
    status = prepare_texts(status)
    rows = [
        ("kernel", f"{status.kernel_release or '?'}, {GENERATIONS[status.generation.value]}; {_kernel_text(status)}")
    ]
    rows += _under_way(status)
    if status.outcome not in (Phase.idle, status.phase):
        rows.append(("this boot", f"{phase_name(status.outcome)}: what the handover into it came to"))
    rows += _not_undone(status)
    if status.claims:
        rows.append(("claims", f"{join_names(status.claims, MAX_SHOWN)}: left before the jump and not taken back yet"))
    rows += _waiting_rows(status)
    if status.producers:
        rows.append(("producers", count_producers(status.producers)))
    rows += [("", producer_text(found)) for found in status.producers if is_notable(found)][:MAX_SHOWN]
    rows += _session_rows(status)
    rows += _arrival_rows(status)
    if status.verdict and status.phase in (Phase.verified, Phase.degraded):
        rows += _verified_rows(status.verdict.checks, verbose=verbose)
    rows += _cold_boot_rows(status)
    if status.handovers:
        rows.append(("handovers", str(status.handovers)))
    if status.last_error:
        rows.append(("cause" if status.phase is not Phase.idle else "last time", status.last_error))
    if status.remedy:
        rows.append(("next", status.remedy))
    head = typer.style(phase_name(status.phase), fg=COLOURS.get(status.phase), bold=True)
    stale = " (the kernel is busy: its state is as of before)" if status.stale else ""
    return "\n".join([f"{head}  {status.summary}{stale}", *format_rows(rows)])


def render_outcome(status: Status, *, rolled_back: bool = False) -> str:
    """Return how a handover ended, in one line; after a rollback the status is that of the handover into this boot."""
    status = prepare_texts(status)
    if rolled_back:
        return f"rolled back  {status.last_error or 'The handover was aborted.'}"
    return f"{phase_name(status.phase)}  {status.summary} {status.remedy}".rstrip()


def _under_way(status: Status) -> list[tuple[str, str]]:
    """Return rows for who began the current handover, the steps done, and the step that runs now."""
    rows = []
    if status.begun is not None:
        image = f" to {status.begun.image}" if status.begun.image else ""
        rows.append(("begun", f"{format_since(status.begun.at)} by {status.begun.by or 'somebody unknown'}{image}"))
    if status.done and status.phase is not Phase.failed:
        rows.append(("done", ", ".join(status.done)))
    if status.under_way is not None:
        rows.append(("now", f"{status.under_way.step}, {status.under_way.seconds:.1f} s"))
    return rows


def _waiting_rows(status: Status) -> list[tuple[str, str]]:
    """Return rows for the producers whose answer is awaited."""
    waiting = [f"for {producer_text(found)}" for found in status.producers if found.waiting][:MAX_SHOWN]
    rows = list_rows("waiting", waiting)
    if (more := len(status.waiting_for) - len(waiting)) > 0:
        unconnected = [name for name in status.waiting_for if name not in {found.name for found in status.producers}]
        text = join_names(unconnected, MAX_SHOWN) if unconnected else f"and {more} more: khoctl producers"
        rows.append(("" if waiting else "waiting", text))
    return rows


def _arrival_rows(status: Status) -> list[tuple[str, str]]:
    """Return rows for what arrived in this boot, from which kernel, and how long the blackout was."""
    rows = []
    if status.verdict and status.phase in (Phase.verified, Phase.degraded):
        verdict = status.verdict
        rows.append(("arrived", f"{len(verdict.arrived)}: {', '.join(verdict.arrived) or 'nothing'}"))
        rows += [
            (key, ", ".join(names))
            for key, names in (
                ("missing", verdict.missing),
                ("changed", verdict.changed),
                ("not known", verdict.unknown),
            )
            if names
        ]
    if status.previous_release and status.phase in (Phase.verified, Phase.degraded, Phase.cold_boot):
        rows.append(("from", status.previous_release))
    if status.handovers and status.phase in (Phase.verified, Phase.degraded):
        rows.append(("blackout", _blackout_text(status)))
    return rows


def _verified_rows(checks: Sequence[Check], *, verbose: bool) -> list[tuple[str, str]]:
    """Return a row for how many checks of the verification had which result, and one for each that is shown."""
    counts = Counter(check.result for check in checks)
    words = ((CheckResult.passed, "passed"), (CheckResult.fail, "failed"), (CheckResult.warn, "with a warning"))
    said = [
        f"{counts[result]} {word}" for result, word in (*words, (CheckResult.skipped, "not known")) if counts[result]
    ]
    rows = [("checks", ", ".join(said))] if said else []
    for check in checks:
        if verbose or check.result is not CheckResult.passed:
            mark, colour = MARKS[check.result]
            rows.append(("", f"{typer.style(mark, fg=colour)}  {check.name}: {check.evidence}"))
    return rows


def _cold_boot_rows(status: Status) -> list[tuple[str, str]]:
    """Return rows for what is known of the handover that ended as this cold boot."""
    found = status.cold_boot
    if found is None or status.phase is not Phase.cold_boot:
        return []
    watchdog = {None: "the kernel does not tell", True: "a watchdog reset the host", False: "none says that it did"}
    rows = [
        ("why", found.reason if found.reason != status.last_error else ""),
        ("image", status.image),
        ("last phase", phase_name(found.last_phase)),
        ("journal", found.journal_end or "it is being read"),
        ("watchdog", watchdog[found.watchdog]),
        *list_rows("last words", found.last_words),
    ]
    return [(key, text) for key, text in rows if text]


def _session_rows(status: Status) -> list[tuple[str, str]]:
    """Return rows for the LUO sessions that no producer registered."""
    rows = [_session_text(found) for found in status.sessions[:MAX_SHOWN]]
    if (more := len(status.sessions) - MAX_SHOWN) > 0:
        rows.append(f"and {more} more: khoctl status --json")
    if status.sessions_unseen:
        rows.append(f"there may be more: {status.sessions_unseen}")
    return list_rows("sessions", rows)


def _session_text(found: LuoSession) -> str:
    """Describe a LUO session that no producer registered, and what an orderly jump does to it."""
    fate = {"kept": "an orderly jump keeps it", "lost": "an orderly jump ends it, --now keeps it"}
    does = fate.get(found.fate.value, "an orderly jump may end it, --now keeps it")
    if found.incoming:
        does = "no jump keeps it"
    return f"{found.name or 'one without a name'}, held by {found.holder}: {does}: {found.why}"


def _blackout_text(status: Status) -> str:
    """Format how long the producers were stopped, and how precise that is."""
    seconds = status.blackout_seconds
    if seconds is None:
        return "unknown: nobody has taken its state back, or the wall clock was set back"
    over = ", and not over for those who have not taken back what they left" if status.claims else ""
    length = f"{format_seconds(seconds, status.blackout_error_seconds)}, from the first freeze to the last finish"
    return f"{length}{over}{_blackout_parts(status)}"


def _blackout_parts(status: Status) -> str:
    """Format the parts of the blackout; "" if the timings are those of a handover begun since."""
    took = {timing.step: timing.seconds for timing in status.timings if timing.step in IN_BLACKOUT}
    if "restore" not in took or status.blackout_seconds is None:
        return ""
    others = max(0.0, status.blackout_seconds - sum(took.values()))
    named = [f"{step} {took[step]:.1f} s" for step in IN_BLACKOUT if step in took]
    return f": {', '.join([*named[:-1], f'jump and boot {others:.1f} s', named[-1]])} and finish"


def _not_undone(status: Status) -> list[tuple[str, str]]:
    """Return rows for each step that was not rolled back: its producer, why, and what to do."""
    rows = [
        f"{item.step}{f' of {item.producer}' if item.producer else ''}: {item.why}. {item.remedy}".rstrip()
        for item in status.not_undone[:MAX_SHOWN]
    ]
    if not rows and status.left:
        rows = [", ".join(status.left)]
    if (more := len(status.not_undone) - MAX_SHOWN) > 0:
        rows.append(f"and {more} more: khoctl status --json")
    return list_rows("not undone", rows)


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


def _kernel_text(status: Status) -> str:
    phase = {True: "active, ", False: "inactive, ", None: ""}[status.kernel_active]
    image = {True: "an image is loaded", False: "no image is loaded", None: "not asked yet"}[status.kernel_loaded]
    return phase + image


FAILED_RESULTS = (CheckResult.fail, CheckResult.unsupported)
NOTED_RESULTS = (*FAILED_RESULTS, CheckResult.warn, CheckResult.off)
"""The results of checks that found something."""


def render_checks(found: list[Check], *, quiet: bool = False) -> str:
    """Return a line for each check, its remedy below it, and a conclusion.

    With `quiet` only the checks that found something are listed.
    """
    found = prepare_texts(found)
    shown = [check for check in found if not quiet or check.result in NOTED_RESULTS]
    width = max((len(check.name) for check in shown), default=0)
    lines = []
    for check in shown:
        text, colour = MARKS[check.result]
        lines.append(f"{typer.style(text, fg=colour)}  {check.name:<{width}}  {check.evidence}")
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


def render_plan(found: Plan) -> str:
    """Return the page of a plan: steps with their undo, changes of the command line, checks that found something."""
    found = prepare_texts(found)
    lines = []
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
