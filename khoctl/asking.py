"""What every command does: it asks khod at one socket, and ends with a sentence and an exit code."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer

from khod.errors import KhoError

if TYPE_CHECKING:
    from khod.client import Client

Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


def socket() -> Path:
    """Give khod's socket, an option of khoctl itself."""
    return Path(click.get_current_context().find_root().params["socket"])


def client() -> "Client":
    """Connect to khod; Unreachable where it does not answer."""
    from khod.client import Client  # noqa: PLC0415 - trees in files need no khod

    return Client(socket())


@contextmanager
def ending(*, as_json: bool = False) -> Iterator[None]:
    """Our errors become a sentence and an exit code, an interrupt 130 as in a shell."""
    try:
        yield
    except KhoError as error:
        if as_json:
            from khoctl import render  # noqa: PLC0415 - an error is not what a command starts with

            typer.echo(render.error_json(error))
        typer.echo(f"khoctl: {error}", err=True)
        raise typer.Exit(error.exit) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
