# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl logs: what khod and the kernels logged of one handover."""

import time
from collections.abc import Iterator

import typer

from khoctl import layout, render
from khoctl.journal import LogLine, RunLines, read_run
from khoctl.runs import DatabaseFile, Run, load_attempt
from khoctl.session import Json
from khod.history.model import AttemptSummary
from khod.model import Phase
from khod.text import printable

app = typer.Typer(rich_markup_mode=None)


@app.command()
def logs(run: Run = None, db: DatabaseFile = None, as_json: Json = False) -> None:
    """Show khod's and both kernels' log of a handover.

    The lines are in one order, those of the kernel before the jump first. Each has the time, 1 or 2 for the kernel
    before and after the jump, and who wrote it.
    """
    attempt = load_attempt(run, db)
    summary, found = attempt.summary, read_run(attempt)
    if as_json:
        typer.echo(render.as_json(found))
        return
    layout.write_text("\n".join(_render_lines(found, summary)))
    for number in found.missing:
        layout.show_page(f"khoctl: {_describe_missing(number, summary)}", err=True)


def _render_lines(found: RunLines, summary: AttemptSummary) -> Iterator[str]:
    width = max((len(printable(line.source)) for line in found.lines), default=0)
    day, boot = "", 1
    for line in found.lines:
        if line.boot != boot:
            boot, day = line.boot, ""
            how = "cold boot" if summary.outcome is Phase.cold_boot else "jump"
            yield f"--- {how}: {printable(summary.from_release)} -> {printable(summary.to_release)} ---"
        if (today := time.strftime("%F", time.localtime(line.at))) != day:
            day = today
            yield f"--- {day} ---"
        yield from _render_line(line, width)


def _render_line(line: LogLine, width: int) -> Iterator[str]:
    """Yield the lines of a record; further ones have a bar before them, so that no text looks like a record."""
    clock = time.strftime("%T", time.localtime(line.at))
    head = f"{clock}.{int(line.at % 1 * 1e6):06d} {line.boot} {printable(line.source).ljust(width)}"
    for text in line.text.split("\n"):
        yield f"{head}  {printable(text)}".rstrip()
        head = f"{'|':>{len(head)}}"


def _describe_missing(number: int, summary: AttemptSummary) -> str:
    boot_id = (summary.first_boot_id, summary.last_boot_id)[number - 1]
    which = ("before the jump", "that followed")[number - 1] if summary.last_boot_id else "of this handover"
    return (
        f"The journal has no lines of the boot {which} ({printable(boot_id)}). A journal that is kept in memory ends "
        "with its kernel: Storage=persistent in journald.conf(5). Or you may not read it: run it as root."
    )
