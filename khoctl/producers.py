"""khoctl producers: the holders of state outside the kernel, listed, tried out, given up."""

import typer

from khoctl import layout, progress, render
from khoctl.asking import Group, Json, client
from khod.client import Client
from khod.model import Producer
from khod.text import printable

app = typer.Typer(
    cls=Group, rich_markup_mode=None, help="The holders of state outside the kernel. Without a command: list them."
)


@app.callback(invoke_without_command=True)
def list_all(context: typer.Context, as_json: Json = False) -> None:
    """List every producer with its kind, rank, last verb, answer and the time that took."""
    if context.invoked_subcommand is not None:
        return
    with client() as khod:
        found = khod.producers()
    _show(found, as_json=as_json)


@app.command()
def test(name: str, as_json: Json = False) -> None:
    """Try one producer: prepare, freeze, thaw and cancel.

    Kernel and other producers notice nothing.
    """
    found = progress.watched(lambda khod: khod.ask("Rehearse", {"name": name}), Client.rehearsed, quiet=as_json)
    _show(found or [], as_json=as_json)


@app.command()
def retry(name: str, as_json: Json = False) -> None:
    """Tell a producer to take its state back again.

    Once what kept it from that after the last jump is mended.
    """
    with client() as khod:
        khod.retry(name)
    layout.write(render.as_json({"restored": name}) if as_json else f"{printable(name)}: has taken back what it left")


@app.command()
def forget(name: str, as_json: Json = False) -> None:
    """Free what a producer will not take back.

    It left it before the last jump, and a new handover would lose it.
    """
    with client() as khod:
        khod.forget(name)
    layout.write(render.as_json({"forgotten": name}) if as_json else f"{printable(name)}: forgotten")


def _show(found: list[Producer], *, as_json: bool) -> None:
    layout.write(render.as_json(found) if as_json else render.producers(found, layout.columns()))
