# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every command does: it asks khod at one socket, and ends with a sentence and an exit code."""

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO

import click
import typer
from typer.core import TyperArgument, TyperGroup
from typer.utils import get_params_from_function

from khoctl.layout import show_page, write_text
from khoctl.options import name_options
from khod.errors import Exit, KhoError, UsageError, errno_text
from khod.wire import SOCKET

if TYPE_CHECKING:
    from khod.client.handover import Client
    from khod.model import Phase

Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
SOCKET_KEY, TIMEOUT_KEY = "khoctl.socket", "khoctl.timeout"
INTERRUPTED = 130
"""As a shell has it: 128 and SIGINT."""
WRITTEN = "What was asked for may be done: khoctl status"


TO_SEE = "To see: khoctl status. To stop it: khoctl abort"


class Detached(KeyboardInterrupt):
    """An interrupt while khod goes on with what it was asked for; `phase` is the last that was heard of."""

    def __init__(self, phase: "Phase | None") -> None:
        super().__init__()
        self.phase = phase


def socket_path() -> Path:
    """Give khod's socket, an option of every command."""
    return Path(click.get_current_context().meta.get(SOCKET_KEY) or os.environ.get("KHOD_SOCKET") or SOCKET)


def call_timeout() -> float | None:
    """Give the seconds the operator wants to wait; None where that was not said."""
    seconds: float | None = click.get_current_context().meta.get(TIMEOUT_KEY)
    return seconds


def connect_client() -> "Client":
    """Connect to khod; Unreachable where it does not answer."""
    from khod.client.handover import Client  # noqa: PLC0415 - trees in files need no khod

    return Client(socket_path(), patience=call_timeout(), on_slow=say_slow)


def say_slow(connection: "Client") -> None:
    """Say what is waited for."""
    process = (
        f" (process {connection.listener_pid})" if connection.listener_pid > 1 else ""
    )  # 1 is systemd, which listens for it
    show_page(f"khoctl: Still waiting for khod{process}. To end this: Ctrl-C, or --timeout", err=True)


def on_terminal() -> bool:
    """Whether there is somebody to ask."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def ask_confirmation(question: str) -> bool:
    """Ask somebody at the terminal; the end of the input is a no. Standard output stays the answer's."""
    write_text(f"{question} [y/N] ", err=True, end="")
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def is_colourless() -> bool:
    """Whether the terminal must not be sent colours: no-color.org, and a terminal that says it knows no sequences."""
    return bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"


def can_repaint(stream: TextIO) -> bool:
    """Whether it is a terminal on which a line can be written over."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _keep_option(key: str, context: click.Context, _parameter: click.Parameter, value: Any) -> None:
    if value is not None:
        context.meta[key] = value


def _common_options() -> list[click.Parameter]:
    """The options of every command, before its name or after it; the context's `meta` has their values."""
    return [
        click.Option(
            ["--socket"],
            metavar="PATH",
            help="khod's socket (also by KHOD_SOCKET).",
            expose_value=False,
            callback=partial(_keep_option, SOCKET_KEY),
        ),
        click.Option(
            ["--timeout"],
            type=click.FloatRange(min=0, min_open=True),
            metavar="SECONDS",
            help="Wait no longer for khod. What was asked for goes on.",
            expose_value=False,
            callback=partial(_keep_option, TIMEOUT_KEY),
        ),
    ]


def _explain_arguments(command: click.Command) -> None:
    """Give the arguments the help they were declared with: typer 0.25 loses it with click 8.5.

    Their attribute `help` stays as it is: with one click adds a section of its own beside typer's.
    """
    function = getattr(command.callback, "__wrapped__", None)
    declared = get_params_from_function(function) if function is not None else {}
    for param in command.params:
        if isinstance(param, TyperArgument) and param.name in declared:
            text = getattr(declared[param.name].default, "help", None) or ""
            vars(param)["get_help_record"] = partial(_argument_help, param, text)


def _argument_help(param: TyperArgument, text: str, ctx: click.Context) -> tuple[str, str]:
    return param.make_metavar(ctx=ctx), text


class Group(TyperGroup):
    """Commands that share the options of all commands and the way to say that there is no such command."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.params += _common_options()

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, with the options of every command."""
        command = super().get_command(ctx, cmd_name)
        if command is not None and not any(option.name == "socket" for option in command.params):
            command.params += _common_options()
            _explain_arguments(command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that the words name; UsageError with those that are near."""
        name = args[0]
        if (command := self.get_command(ctx, name)) is not None:
            return name, command, args[1:]
        if name.startswith("-"):  # an option that this group has not
            ctx.fail(f"No such option {name!r}.")
        import difflib  # noqa: PLC0415 - only who mistyped needs it

        near = difflib.get_close_matches(name, self.commands) or list(self.commands)
        remedy = (
            f"Did you mean {' or '.join(near)}?" if len(near) < len(self.commands) else f"One of: {', '.join(near)}."
        )
        raise UsageError(f"No such command: {name!r}", where=ctx.command_path, remedy=remedy)


class Root(Group):
    """khoctl itself: whatever its commands raise ends here in a sentence, JSON where that was asked for, and a code."""

    def main(self, args: Sequence[str] | None = None, *given: Any, **options: Any) -> NoReturn:
        """Run a command to its end, an exit code."""
        words = list(sys.argv[1:] if args is None else args)
        run = partial(super().main, words, *given, **{**options, "standalone_mode": False})
        raise SystemExit(_run_to_exit(run, as_json="--json" in words))

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; click would give an interrupt and a full disk meanings of its own."""
        if is_colourless():
            ctx.color = False
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            if isinstance(interrupt, Detached):
                show_page(f"khoctl: The handover continues in the background. {TO_SEE}", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except OSError as error:  # a command says what it cannot read; this is what it could not say
            if not isinstance(error, BrokenPipeError):
                show_page(f"khoctl: Standard output cannot be written: {errno_text(error)}. {WRITTEN}", err=True)
            raise typer.Exit(Exit.unwritten) from None


def _run_to_exit(run: Callable[[], Any], *, as_json: bool) -> int:
    try:
        code = run()
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return Exit.usage
    except click.UsageError as error:
        what, _, hint = error.format_message().partition(". ")
        see = f"See: {error.ctx.command_path} -h" if error.ctx else ""
        return _print_error(UsageError(what.rstrip("."), remedy=f"{hint} {see}".strip()), as_json=as_json)
    except KhoError as error:
        return _print_error(error, as_json=as_json)
    return code if isinstance(code, int) else Exit.done


def _print_error(error: KhoError, *, as_json: bool) -> int:
    error.what, error.where, error.remedy = map(name_options, (error.what, error.where, error.remedy))
    try:
        if as_json:
            from khoctl import render  # noqa: PLC0415 - an error is not what a command starts with

            typer.echo(render.error_json(error))
        show_page(f"khoctl: {error}", err=True)
    except OSError:
        pass  # the code still says it
    return error.exit
