# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl producers: list the holders of state outside the kernel, test them, retry them, or forget their state."""

from typing import Annotated

import typer

from khoctl import layout, progress, render
from khoctl.candidates import complete_producers
from khoctl.session import Group, Json, connect_client
from khod.client.handover import Client
from khod.model import Producer
from khod.text import printable

app = typer.Typer(
    cls=Group, rich_markup_mode=None, help="The holders of state outside the kernel. Without a command: list them."
)


Name = Annotated[
    str,
    typer.Argument(
        help="The producer, as khoctl producers lists it.",
        autocompletion=complete_producers,
    ),
]
Waiting = Annotated[bool, typer.Option("--waiting", help="Only those whose answer is waited for.")]
Slow = Annotated[bool, typer.Option("--slow", help="The slowest first.")]


@app.callback(invoke_without_command=True)
def list_all(context: typer.Context, waiting: Waiting = False, slow: Slow = False, as_json: Json = False) -> None:
    """List every producer with its kind, rank, last verb, answer and the time that took."""
    if context.invoked_subcommand is None:
        list_(waiting=waiting, slow=slow, as_json=as_json)


@app.command("list")
def list_(waiting: Waiting = False, slow: Slow = False, as_json: Json = False) -> None:
    """List every producer, as without a command."""
    with connect_client() as khod:
        found = khod.producers()
    if waiting:
        found = [one for one in found if one.waiting]
    if slow:
        found = sorted(found, key=lambda one: -one.seconds)
    if waiting and not found and not as_json:
        layout.write_text("No producer is waited for.")
        return
    _show_producers(found, as_json=as_json)


@app.command()
def test(name: Name, as_json: Json = False) -> None:
    """Try one producer: prepare, freeze, thaw and cancel.

    Kernel and other producers notice nothing.
    """
    found = progress.run_with_progress(
        lambda khod: khod.call_method("Rehearse", {"name": name}), Client.receive_rehearsal, quiet=as_json
    )
    _show_producers(found or [], as_json=as_json)


@app.command()
def retry(name: Name, as_json: Json = False) -> None:
    """Tell a producer to take its state back again.

    Use it when the cause of its failure after the last jump is repaired.
    """
    with connect_client() as khod:
        khod.retry(name)
    layout.write_text(render.as_json({"restored": name}) if as_json else f"{printable(name)}: has taken its state back")


@app.command()
def forget(name: Name, as_json: Json = False) -> None:
    """Free what a producer will not take back.

    The producer left this state before the last jump, and a new handover would lose it.
    """
    with connect_client() as khod:
        khod.forget(name)
    layout.write_text(render.as_json({"forgotten": name}) if as_json else f"{printable(name)}: forgotten")


def _show_producers(found: list[Producer], *, as_json: bool) -> None:
    layout.write_text(render.as_json(found) if as_json else render.render_producers(found, layout.page_width()))
