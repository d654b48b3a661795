# SPDX-License-Identifier: LGPL-2.1-or-later
"""What all commands share: the connection to khod's socket, and the end with a sentence and an exit code."""

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
HOST_KEY, SOCKET_KEY, TIMEOUT_KEY = "khoctl.host", "khoctl.socket", "khoctl.timeout"
INTERRUPTED = 130
"""The exit code of a shell for SIGINT: 128 plus its number."""
WRITTEN = "What was asked for may be done: khoctl status"


TO_SEE = "To see: khoctl status. To stop it: khoctl abort"


class Detached(KeyboardInterrupt):
    """An interrupt of khoctl while khod continues the operation; `phase` is the last one that was received."""

    def __init__(self, phase: "Phase | None") -> None:
        super().__init__()
        self.phase = phase


def socket_path() -> Path:
    """Return the path of khod's socket; every command has an option for it."""
    return find_socket(click.get_current_context())


def find_socket(context: click.Context) -> Path:
    """Return the path of khod's socket for a command line."""
    return Path(context.meta.get(SOCKET_KEY) or os.environ.get("KHOD_SOCKET") or SOCKET)


def remote_host() -> str:
    """Return the host of --host, or "" for this one."""
    host: str = click.get_current_context().meta.get(HOST_KEY, "")
    return host


def khod_place() -> str:
    """Return where khod is looked for: a host, or the path of a socket on this one."""
    return remote_host() or str(socket_path())


def call_timeout() -> float | None:
    """Return how many seconds the operator wants to wait, or None without a limit."""
    seconds: float | None = click.get_current_context().meta.get(TIMEOUT_KEY)
    return seconds


def connect_client() -> "Client":
    """Connect to khod; raise Unreachable if it does not answer."""
    return open_client(call_timeout(), on_slow=say_slow)


def open_client(
    patience: float | None, *, on_slow: "Callable[[Client], None]" = lambda _: None, fresh: bool = False
) -> "Client":
    """Connect to khod of this host or of --host; `patience` is as in `Client`, `fresh` as in `RemoteClient`."""
    if host := remote_host():
        from khoctl.remote_client import RemoteClient  # noqa: PLC0415 - only for another host

        socket: str | None = click.get_current_context().meta.get(SOCKET_KEY)
        return RemoteClient(host, socket, patience=patience, on_slow=on_slow, fresh=fresh)
    from khod.client.handover import Client  # noqa: PLC0415 - trees in files need no khod

    return Client(socket_path(), patience=patience, on_slow=on_slow)


def say_slow(connection: "Client") -> None:
    """Print that khoctl is still waiting for khod."""
    process = (
        f" (process {connection.listener_pid})" if connection.listener_pid > 1 else ""
    )  # 1 is systemd, which listens for khod
    show_page(f"khoctl: Still waiting for khod{process}. To end this: Ctrl-C, or --timeout", err=True)


def show_answer(found: object, page: Callable[[], str], *, as_json: bool) -> None:
    """Print an answer: one line of JSON, or a page fitted to the terminal."""
    if as_json:
        from khoctl import render  # noqa: PLC0415 - whoever has a page to show has imported it

        typer.echo(render.as_json(found))
    else:
        show_page(page())


def on_terminal() -> bool:
    """Whether a person at a terminal can be asked."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def ask_confirmation(question: str) -> bool:
    """Ask a question on standard error and read the answer from standard input; end of file means no."""
    write_text(f"{question} [y/N] ", err=True, end="")
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def is_colourless() -> bool:
    """Whether no colours may be sent: NO_COLOR (no-color.org), or a terminal without escape sequences."""
    return bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"


def can_repaint(stream: TextIO) -> bool:
    """Whether `stream` is a terminal on which lines can be overwritten."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _keep_option(key: str, context: click.Context, _parameter: click.Parameter, value: Any) -> None:
    if value is not None:
        context.meta[key] = value


def _common_options() -> list[click.Parameter]:
    """Return the options of every command, valid before or after its name; `meta` of the context has their values."""
    return [
        click.Option(
            ["--host"],
            metavar="USER@HOST",
            help="Run khoctl on that host, over ssh; files are that host's.",
            expose_value=False,
            callback=partial(_keep_option, HOST_KEY),
        ),
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
    """Restore the help of a command's arguments, which typer 0.25 loses with click 8.5.

    Their attribute `help` stays unset: if it is set, click adds a section of its own beside typer's.
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
    """Commands with the options of every command, and with an error of our own for an unknown command."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.params += _common_options()

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command, with the options of every command added."""
        command = super().get_command(ctx, cmd_name)
        if command is not None and not any(option.name == "socket" for option in command.params):
            command.params += _common_options()
            _explain_arguments(command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that `args` names; raise UsageError with similar names if there is none."""
        name = args[0]
        if (command := self.get_command(ctx, name)) is not None:
            return name, command, args[1:]
        if name.startswith("-"):  # an option that this group does not have
            ctx.fail(f"No such option {name!r}.")
        import difflib  # noqa: PLC0415 - needed only after a typing error

        near = difflib.get_close_matches(name, self.commands) or list(self.commands)
        remedy = (
            f"Did you mean {' or '.join(near)}?" if len(near) < len(self.commands) else f"One of: {', '.join(near)}."
        )
        raise UsageError(f"No such command: {name!r}", where=ctx.command_path, remedy=remedy)


class Root(Group):
    """khoctl itself: every error of its commands becomes a sentence, or JSON if requested, and an exit code."""

    def main(self, args: Sequence[str] | None = None, *given: Any, **options: Any) -> NoReturn:
        """Run a command and exit with its code."""
        words = list(sys.argv[1:] if args is None else args)
        run: Callable[[], Any] = partial(super().main, words, *given, **{**options, "standalone_mode": False})
        if any(word.startswith("--host") for word in words):
            from khoctl.remote import run_on_host  # noqa: PLC0415 - only for another host

            run = partial(run_on_host, words, run)
        raise SystemExit(_run_to_exit(run, as_json="--json" in words))

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command, with our own exit codes for an interrupt and a full disk instead of click's."""
        if is_colourless():
            ctx.color = False
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            if isinstance(interrupt, Detached):
                show_page(f"khoctl: The handover continues in the background. {TO_SEE}", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except OSError as error:  # a command reports what it cannot read itself; here standard output failed
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
            from khoctl import render  # noqa: PLC0415 - needed only for an error

            typer.echo(render.error_json(error))
        show_page(f"khoctl: {error}", err=True)
    except OSError:
        pass  # the exit code still reports the error
    return error.exit
