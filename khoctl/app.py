"""khoctl's commands. Each asks khod over its socket; exit codes are `khod.errors.Exit`."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer

from khoctl import dt, progress, render, target
from khod.client import Client
from khod.errors import Exit, KhoError
from khod.model import Check, CheckResult, Phase, Producer, Status
from khod.wire import SOCKET

T = TypeVar("T")
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Take this host from one kernel to the next without losing what it holds (Kexec HandOver).",
    epilog="Exit codes: 0 done, 1 failed and rolled back, 2 usage, 3 refused, 4 not supported here, "
    "5 khod not reachable, 6 failed and not fully rolled back, 7 degraded after boot.",
)
app.add_typer(dt.app, name="dt")
producers = typer.Typer(help="The holders of state outside the kernel. Without a command: list them.")
app.add_typer(producers, name="producers")

CLEAR = "\x1b[2J\x1b[H"  # the screen emptied, the cursor at its top
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


Image = Annotated[str | None, typer.Option(help="The next kernel; a unified kernel image brings its initrd along.")]
Initrds = Annotated[list[str] | None, typer.Option(help="Its initrd; several follow one another in this order.")]
Entry = Annotated[str | None, typer.Option(metavar="ID", help="Boot what this boot loader entry says.")]
Default = Annotated[bool, typer.Option("--default", help="Boot the boot loader's default entry.")]
Installed = Annotated[str | None, typer.Option(metavar="VERSION", help="Boot an installed kernel, by its version.")]
Cmdline = Annotated[
    str | None,
    typer.Option(
        help="Its command line. Without it the entry's or the unified image's own counts, then the running kernel's, "
        "less BOOT_IMAGE=, initrd= and what else must not travel."
    ),
]
Reuse = Annotated[bool, typer.Option("--reuse-cmdline", help="Use the running kernel's command line in any case.")]
Append = Annotated[str | None, typer.Option(help="Words to add to the command line.")]
Remove = Annotated[
    list[str] | None,
    typer.Option(metavar="WORD", help="Take a parameter (console), or one word (console=ttyS0), away."),
]
LoadOnly = Annotated[bool, typer.Option("--load-only", help="Stop when the image is loaded.")]
Now = Annotated[bool, typer.Option("--now", help="Sync and jump at once, instead of systemctl kexec.")]
Profile = Annotated[str | None, typer.Option("--profile", help="Take all of this from /etc/kho/handover.d/NAME.toml.")]


class _Socket:
    path = Path(SOCKET)


@app.callback()
def _main(
    socket: Annotated[
        Path,
        typer.Option(
            envvar="KHOD_SOCKET", show_envvar=False, show_default=False, help="khod's socket (also by KHOD_SOCKET)."
        ),
    ] = Path(SOCKET),
) -> None:
    _Socket.path = socket


@app.command()
def status(
    as_json: Json = False, watch: Annotated[bool, typer.Option(help="Stay, and show every change.")] = False
) -> None:
    """Say how it stands. Exits with 7 after a degraded or cold boot, with 6 where the kernel was not put back."""

    def page(found: Status) -> str:
        return render.as_json(found) if as_json else render.status(found)

    def follow() -> None:
        with Client(_Socket.path) as client, Client(_Socket.path) as asking:
            for _event in client.monitor():
                if sys.stdout.isatty() and not as_json:
                    typer.echo(CLEAR, nl=False)
                typer.echo(page(asking.status()))
                sys.stdout.flush()

    def ask() -> Status:
        with Client(_Socket.path) as client:
            return client.status()

    if watch:
        _run(follow, as_json=as_json)
    found = _run(ask, as_json=as_json)
    typer.echo(page(found))
    raise typer.Exit(found.exit_code)


@app.command()
def check(
    image: Image = None,
    initrd: Initrds = None,
    entry: Entry = None,
    default: Default = False,
    kernel: Installed = None,
    cmdline: Cmdline = None,
    reuse_cmdline: Reuse = False,
    append: Append = None,
    remove: Remove = None,
    from_profile: Profile = None,
    as_json: Json = False,
) -> None:
    """Run every preflight check, with an image those of the next kernel too, and touch nothing.

    Exits with 3 where one fails, with 4 where KHO is not there.
    """
    with _asked(locals()) as (request, fds):
        found = _run(lambda: _once(lambda client: client.check(request, fds)), as_json=as_json)
    typer.echo(render.as_json(found) if as_json else render.checks(found))
    raise typer.Exit(_judged(found))


@app.command()
def plan(
    image: Image = None,
    initrd: Initrds = None,
    entry: Entry = None,
    default: Default = False,
    kernel: Installed = None,
    cmdline: Cmdline = None,
    reuse_cmdline: Reuse = False,
    append: Append = None,
    remove: Remove = None,
    load_only: LoadOnly = False,
    now: Now = False,
    from_profile: Profile = None,
    as_json: Json = False,
) -> None:
    """Print what a handover would do, step by step, with the undo beside it, and touch nothing. Exits as check."""
    with _asked(locals()) as (request, fds):
        found = _run(lambda: _once(lambda client: client.plan(request, fds)), as_json=as_json)
    typer.echo(render.as_json(found) if as_json else render.plan(found))
    raise typer.Exit(_judged(found.checks))


def _judged(found: list[Check]) -> Exit:
    results = {item.result for item in found}
    if CheckResult.unsupported in results:
        return Exit.unsupported
    return Exit.refused if CheckResult.fail in results else Exit.done


@app.command()
def activate(as_json: Json = False) -> None:
    """Freeze the producers and serialize the kernel's state; what is left is `khoctl kexec`, or `khoctl abort`."""
    _operate(lambda client: client.ask("Activate"), as_json=as_json)


@app.command()
def abort(
    force: Annotated[bool, typer.Option("--force", help="Also put back what khod did not do.")] = False,
    as_json: Json = False,
) -> None:
    """Put everything back: image unloaded, active phase left, producers thawed and cancelled."""
    _operate(lambda client: client.ask("Abort", {"force": force}), as_json=as_json)


@app.command()
def kexec(
    image: Image = None,
    initrd: Initrds = None,
    entry: Entry = None,
    default: Default = False,
    kernel: Installed = None,
    cmdline: Cmdline = None,
    reuse_cmdline: Reuse = False,
    append: Append = None,
    remove: Remove = None,
    load_only: LoadOnly = False,
    now: Now = False,
    hold: Annotated[bool, typer.Option("--hold", help="Stay where a failure happens instead of rolling back.")] = False,
    from_profile: Profile = None,
    as_json: Json = False,
) -> None:
    """Do what is left of the handover, from wherever it stands, and jump into the next kernel."""
    with _asked(locals()) as (request, fds):
        _operate(lambda client: client.ask("Kexec", request, fds=fds), as_json=as_json)


@contextmanager
def _asked(given: dict[str, Any]) -> Iterator[tuple[dict[str, Any], tuple[int, ...]]]:
    """The parameters of a call that names a kernel, with its files open for as long as the call takes."""
    try:
        with ExitStack() as files:
            yield target.asked(given, files)
    except KhoError as error:
        _end(error, as_json=given["as_json"])


@app.command()
def monitor(as_json: Json = False) -> None:
    """Print every change, one line each, until interrupted."""

    def follow() -> None:
        with Client(_Socket.path) as client:
            for event in client.monitor():
                typer.echo(render.as_json(event) if as_json else render.event(event))
                sys.stdout.flush()

    _run(follow, as_json=as_json)


@app.command()
def verify(as_json: Json = False) -> None:
    """Wait until this boot's verification is over. Exits with 7 where state did not arrive whole."""

    def wait() -> Status:
        with Client(_Socket.path) as client, Client(_Socket.path) as asking:
            for event in client.monitor():
                if event.phase is not Phase.verifying:
                    break
            return asking.status()

    found = _run(wait, as_json=as_json)
    typer.echo(render.as_json(found) if as_json else render.status(found))
    raise typer.Exit(found.exit_code)


@producers.callback(invoke_without_command=True)
def producers_list(context: typer.Context, as_json: Json = False) -> None:
    """List every producer with its kind, rank, last verb, answer and the time that took."""
    if context.invoked_subcommand is not None:
        return

    def ask() -> list[Producer]:
        with Client(_Socket.path) as client:
            return client.producers()

    found = _run(ask, as_json=as_json)
    typer.echo(render.as_json(found) if as_json else render.producers(found))


@producers.command("test")
def producers_test(name: str, as_json: Json = False) -> None:
    """Drive one producer through prepare, freeze, thaw and cancel. Kernel and other producers notice nothing."""

    def watch() -> list[Producer] | None:
        return progress.watched(
            _Socket.path, lambda client: client.ask("Rehearse", {"name": name}), Client.rehearsed, quiet=as_json
        )

    found = _run(watch, as_json=as_json) or []
    typer.echo(render.as_json(found) if as_json else render.producers(found))


@producers.command("forget")
def producers_forget(name: str, as_json: Json = False) -> None:
    """Free what a producer left before the last jump and will not take back: a new handover would lose it."""

    def ask() -> None:
        with Client(_Socket.path) as client:
            client.forget(name)

    _run(ask, as_json=as_json)


def _operate(begin: Callable[[Client], None], *, as_json: bool) -> None:
    def watch() -> Status | None:
        try:
            return progress.watched(_Socket.path, begin, Client.answer, quiet=as_json)
        except KeyboardInterrupt:
            typer.echo("khod goes on with it. To see: khoctl status. To stop it: khoctl abort", err=True)
            raise

    found = _run(watch, as_json=as_json)
    if found is None:
        typer.echo("The host jumped. After the boot: khoctl status", err=True)
        raise typer.Exit(Exit.done)
    typer.echo(render.as_json(found) if as_json else render.status(found))


def _once(asked: Callable[[Client], T]) -> T:
    """Ask one thing of khod."""
    with Client(_Socket.path) as client:
        return asked(client)


def _run(asked: Callable[[], T], *, as_json: bool) -> T:
    """Run to the end; our errors become a sentence and an exit code, an interrupt 130 as in a shell."""
    try:
        return asked()
    except KhoError as error:
        _end(error, as_json=as_json)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _end(error: KhoError, *, as_json: bool) -> NoReturn:
    if as_json:
        typer.echo(render.error_json(error))
    typer.echo(f"khoctl: {error}", err=True)
    raise typer.Exit(error.exit)


def main() -> None:
    """Run khoctl."""
    app(prog_name="khoctl")
