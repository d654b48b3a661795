"""khoctl producers: the holders of state outside the kernel, listed, tried out, given up."""

import typer

from khoctl import progress, render
from khoctl.asking import Json, client, ending, socket
from khod.client import Client

app = typer.Typer(rich_markup_mode=None, help="The holders of state outside the kernel. Without a command: list them.")


@app.callback(invoke_without_command=True)
def list_all(context: typer.Context, as_json: Json = False) -> None:
    """List every producer with its kind, rank, last verb, answer and the time that took."""
    if context.invoked_subcommand is not None:
        return
    with ending(as_json=as_json), client() as khod:
        found = khod.producers()
    typer.echo(render.as_json(found) if as_json else render.producers(found))


@app.command()
def test(name: str, as_json: Json = False) -> None:
    """Drive one producer through prepare, freeze, thaw and cancel. Kernel and other producers notice nothing."""
    with ending(as_json=as_json):
        found = progress.watched(
            socket(), lambda khod: khod.ask("Rehearse", {"name": name}), Client.rehearsed, quiet=as_json
        )
    typer.echo(render.as_json(found or []) if as_json else render.producers(found or []))


@app.command()
def retry(name: str, as_json: Json = False) -> None:
    """Tell a producer again to take back what it left before the last jump, once its trouble is mended."""
    with ending(as_json=as_json), client() as khod:
        khod.retry(name)


@app.command()
def forget(name: str, as_json: Json = False) -> None:
    """Free what a producer left before the last jump and will not take back: a new handover would lose it."""
    with ending(as_json=as_json), client() as khod:
        khod.forget(name)
