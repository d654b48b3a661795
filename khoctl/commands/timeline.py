# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl timeline: where the time of an attempt went, in both kernels."""

import sys

import typer

from khoctl import layout, render
from khoctl.history import outcome_name
from khoctl.runs import DatabaseFile, Run, load_attempt
from khoctl.session import Group, Json
from khoctl.timeline import draw_timeline
from khod.text import printable

app = typer.Typer(cls=Group, rich_markup_mode=None)


@app.callback()
def _be_group() -> None:
    """Where the time of an attempt went."""


@app.command()
def timeline(run: Run = None, db: DatabaseFile = None, as_json: Json = False) -> None:
    """Draw where the time of an attempt went, across both kernels.

    Times are counted from the first `freeze`. With --db, FILE is read, and no khod is needed.
    """
    found = load_attempt(run, db)
    if as_json:
        layout.write_text(render.as_json(found.timeline))
        return
    summary, width = found.summary, layout.page_width()
    releases = " to ".join(printable(one) or "?" for one in (summary.from_release, summary.to_release))
    head = f"{printable(summary.run)}: {releases}, {outcome_name(summary)}"
    lines = [*layout.fit_page(head, width).split("\n"), *draw_timeline(found.timeline, width)]
    layout.write_text(_encodable("\n".join(lines)))


def _encodable(text: str) -> str:
    """Return the text without the sign that an ASCII terminal does not have."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return text.replace("±", "+/-")
    return text
