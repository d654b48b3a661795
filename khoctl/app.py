"""khoctl: the root of its commands, each imported from its module when it is asked for.

To import all of them for one would take a third of the time that `khoctl status` takes.
"""

import importlib
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import click
import typer
from typer.core import TyperGroup

from khod.errors import Exit, errno_text
from khod.wire import SOCKET

MODULES = {
    "status": "handover",
    "check": "handover",
    "plan": "handover",
    "activate": "handover",
    "abort": "handover",
    "kexec": "handover",
    "monitor": "handover",
    "verify": "handover",
    "dt": "dt",
    "producers": "producers",
}
"""Where each command is; a module's name is its group's, or stands for the commands in it."""


class Commands(TyperGroup):
    """The commands by name."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.commands = {name: click.Command(name) for name in MODULES}  # what a typing error is compared with

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's
        if cmd_name not in MODULES:
            return None
        group = typer.main.get_group(importlib.import_module(f"khoctl.{MODULES[cmd_name]}").app)
        return group if cmd_name == MODULES[cmd_name] else group.commands[cmd_name]


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Take this host from one kernel to the next without losing what it holds (Kexec HandOver).",
    epilog="Exit codes: 0 done, 1 failed and rolled back, 2 usage, 3 refused, 4 not supported here, "
    "5 khod not reachable, 6 failed and not fully rolled back, 7 degraded after boot.",
)


@app.callback()
def _main(
    socket: Annotated[
        Path,
        typer.Option(
            envvar="KHOD_SOCKET", show_envvar=False, show_default=False, help="khod's socket (also by KHOD_SOCKET)."
        ),
    ] = Path(SOCKET),
) -> None:
    """Options of all commands; `khoctl.asking` reads them."""


def main() -> NoReturn:
    """Run khoctl, and leave at once: to take the interpreter apart would take a tenth of the time."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # it was closed: the next file that is opened would take its place
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - for as long as the process lives
    code: Any = Exit.done
    try:
        try:
            app(prog_name="khoctl")
        except SystemExit as end:
            code = end.code or Exit.done
        sys.stdout.flush()
    except OSError as error:  # a command says what it cannot read; this is what it could not say
        code = code or Exit.failed
        typer.echo(f"khoctl: Standard output cannot be written: {errno_text(error)}.", err=True)
    os._exit(code if isinstance(code, int) else Exit.failed)
