# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl: the root of its commands; the module of a command is imported when the command is used.

Importing all of them would take a third of the time of `khoctl status`.
"""

import importlib
import io
import os
import sys
from typing import Annotated, Any, NoReturn

import click
import typer

from khoctl.session import Root
from khod import __version__
from khod.errors import Exit, UsageError

MODULES = {
    "status": "handover",
    "check": "handover",
    "plan": "handover",
    "activate": "handover",
    "abort": "handover",
    "kexec": "handover",
    "handover": "profiles",
    "run-profile": "profiles",
    "finish-profile": "profiles",
    "monitor": "watching",
    "verify": "watching",
    "wait": "watching",
    "logs": "journal",
    "dt": "dt",
    "history": "history",
    "producers": "producers",
    "report": "report",
    "timeline": "timeline",
    "config": "config",
    "fleet": "fleet",
    "bridge": "bridge",
}
"""The module of each command; a command that the module's group does not have is the group itself."""

ELSEWHERE = {
    "prepare": "It is the first step of: khoctl activate",
    "load": "It is: khoctl kexec --load-only",
    "exec": "It is: khoctl kexec",
    "execute": "It is: khoctl kexec",
    "log": "It is: khoctl logs",
}
"""What to use instead of commands that do not exist, but that operators look for."""


COMPLETION_VARIABLE = "_KHOCTL_COMPLETE"
"""Set by the completions of the shells."""


class Commands(Root):
    """The commands of khoctl; each is imported on first use."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.commands = dict.fromkeys(MODULES, click.Command(None))  # the names a typing error is compared with

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in MODULES and self.commands[cmd_name].name is None:
            group = typer.main.get_group(importlib.import_module(f"khoctl.commands.{MODULES[cmd_name]}").app)
            self.commands[cmd_name] = group.commands.get(cmd_name, group)
        return super().get_command(ctx, cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; `khoctl help COMMAND` is `khoctl COMMAND --help`."""
        if args[0] == "help":
            args = [*args[1:], "--help"]
        if args == ["--help"]:
            typer.echo(ctx.get_help())
            raise typer.Exit
        if args[0] in ELSEWHERE:
            raise UsageError(f"No such command: {args[0]!r}", where=ctx.command_path, remedy=ELSEWHERE[args[0]])
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,  # the package has scripts of its own, see khoctl.completion
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Take this host from one kernel to the next without losing what it holds (Kexec HandOver).",
    epilog="Exit codes: 0 done, 1 failed and rolled back, 2 usage, 3 refused, 4 not supported here, "
    "5 khod not reachable, 6 failed and not fully rolled back, 7 degraded after boot, 8 output not written.",
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"khoctl {__version__}")
        raise typer.Exit


@app.callback()
def _set_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of khoctl itself; those of every command are in `khoctl.session`."""


def _character_locale() -> str:
    """Return the locale of characters, as setlocale(3) finds it, or "" if none is set."""
    return next((found for name in ("LC_ALL", "LC_CTYPE", "LANG") if (found := os.environ.get(name))), "")


def main() -> NoReturn:
    """Run khoctl and exit at once: shutting down the interpreter would take a tenth of the time."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # it was closed: the next opened file would get its number
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - open until the process ends
    if _character_locale() in ("C", "POSIX"):  # Python would write UTF-8, which a serial console shows as garbage
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(encoding="ascii", errors="backslashreplace")
    if COMPLETION_VARIABLE in os.environ:
        from khoctl.completion import complete  # noqa: PLC0415 - only for a shell

        complete(typer.main.get_command(app), os.environ[COMPLETION_VARIABLE], sys.argv[1:])
    code: Any = Exit.done
    try:
        app(prog_name="khoctl")
    except SystemExit as end:
        code = end.code or Exit.done
    try:
        sys.stdout.flush()
    except OSError:
        code = code or Exit.unwritten
    os._exit(code if isinstance(code, int) else Exit.failed)
