# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl report: one attempt at a handover as a page, a picture, a trace or JSON."""

from typing import Annotated

import typer

from khoctl.output import STANDARD_OUTPUT, write_file
from khoctl.runs import DatabaseFile, Run, load_attempt
from khoctl.session import Group, Json
from khod.errors import UsageError
from khod.history.model import AttemptRecord

FORMS = "--html FILE, --svg FILE, --chrome-trace FILE or --json"

app = typer.Typer(cls=Group, rich_markup_mode=None)


@app.command()
def report(
    run: Run = None,
    html: Annotated[
        str | None, typer.Option("--html", metavar="FILE", help="Write a page, for a browser or for paper.")
    ] = None,
    svg: Annotated[str | None, typer.Option("--svg", metavar="FILE", help="Write the timeline as a picture.")] = None,
    chrome_trace: Annotated[
        str | None, typer.Option("--chrome-trace", metavar="FILE", help="Write a trace that Perfetto opens.")
    ] = None,
    as_json: Json = False,
    db: DatabaseFile = None,
) -> None:
    """Write a report of one attempt at a handover.

    It has the verdict, the timeline, the producers and the checks. FILE is replaced when all of it is written; - is
    standard output.
    """
    chosen = [
        (writer, file)
        for writer, file in (
            (_write_html, html),
            (_write_svg, svg),
            (_write_chrome_trace, chrome_trace),
            (_write_json, STANDARD_OUTPUT if as_json else None),
        )
        if file is not None
    ]
    if len(chosen) != 1:
        raise UsageError("Give exactly one form of the report", where="report", remedy=f"One of: {FORMS}.")
    writer, file = chosen[0]
    write_file(file, writer(load_attempt(run, db)).encode())


def _write_html(attempt: AttemptRecord) -> str:
    from khoctl.report.page import write_page

    return write_page(attempt)


def _write_svg(attempt: AttemptRecord) -> str:
    from khoctl.report.picture import draw_file

    return draw_file(attempt.timeline)


def _write_chrome_trace(attempt: AttemptRecord) -> str:
    from khoctl.report.chrome_trace import write_trace

    return write_trace(attempt)


def _write_json(attempt: AttemptRecord) -> str:
    from khoctl.report.document import write_document

    return write_document(attempt)
