# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl history: list past attempts, show one, list the chain of kernels, and let a barred image be tried again."""

from contextlib import closing
from typing import Annotated

import typer

from khoctl import history, layout, render
from khoctl.candidates import complete_runs
from khoctl.runs import DatabaseFile, Run, connect_history, load_attempt, open_database
from khoctl.session import Group, Json
from khod.client.history import History
from khod.text import join_names, printable

DEFAULT_ATTEMPTS = 20

app = typer.Typer(
    cls=Group,
    rich_markup_mode=None,
    help="Past attempts at a handover. Without a command: list the last ones. With --db, FILE is read, and no khod is "
    "needed.",
)
Count = Annotated[int, typer.Option("-n", min=1, metavar="N", help="How many to list, the newest first.")]


@app.callback(invoke_without_command=True)
def list_last(
    context: typer.Context, count: Count = DEFAULT_ATTEMPTS, db: DatabaseFile = None, as_json: Json = False
) -> None:
    """List the last attempts: when, from which kernel to which, the outcome, the blackout, and who asked."""
    if context.invoked_subcommand is None:
        list_(count=count, db=db, as_json=as_json)


@app.command("list")
def list_(count: Count = DEFAULT_ATTEMPTS, db: DatabaseFile = None, as_json: Json = False) -> None:
    """List the last attempts, as without a command."""
    if db is None:
        with connect_history() as khod:
            found = khod.history(count)
    else:
        with closing(open_database(db)) as database:
            attempts = database.list_attempts("", count + 1)
        found = History(attempts[:count], len(attempts) > count)
    if as_json:
        layout.write_text(render.as_json(found))
        return
    _show_note(found.note)
    if not found.attempts:
        layout.show_page(history.NO_ATTEMPTS)
        return
    layout.write_text("\n".join(history.render_history(found.attempts, layout.page_width())))
    if found.more:
        layout.show_page("There are older ones: -n N", err=True)


@app.command()
def show(
    run: Run = None,
    db: DatabaseFile = None,
    as_json: Json = False,
) -> None:
    """Show all that is known of one attempt."""
    found = load_attempt(run, db)
    if as_json:
        layout.write_text(render.as_json(found))
    else:
        layout.show_page(history.render_attempt(found))


@app.command()
def chain(db: DatabaseFile = None, as_json: Json = False) -> None:
    """List the handovers since the last cold boot, newest first.

    These are the handovers that led to this kernel, or with --db to the last kernel that was reached by one.
    """
    if db is None:
        with connect_history() as khod:
            found = khod.chain()
    else:
        with closing(open_database(db)) as database:
            found = database.read_chain()
    if as_json:
        layout.write_text(render.as_json(found))
    elif found:
        layout.write_text("\n".join(history.render_history(found, layout.page_width())))
    else:
        layout.show_page(history.NO_CHAIN)


@app.command()
def ack(
    image: Annotated[
        str,
        typer.Argument(
            metavar="IMAGE|RUN",
            help="A failed attempt, or the beginning of the image's digest (6 digits or more).",
            autocompletion=complete_runs,
        ),
    ],
    as_json: Json = False,
) -> None:
    """Let an image be tried again that failed handovers have barred.

    It is the image that these handovers led to: a kernel with its initrd.
    """
    with connect_history() as khod:
        runs = khod.acknowledge(image)
    if as_json:
        layout.write_text(render.as_json({"acknowledged": runs}))
    else:
        layout.show_page(f"{printable(image)}: can be tried again. No longer counted: {join_names(runs)}")


def _show_note(note: str) -> None:
    if note:
        layout.show_page(f"khoctl: {printable(note)}", err=True)
