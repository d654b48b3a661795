# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl config: check the files below /etc/kho with khod's own parsers, and show what holds. Neither needs khod."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from khoctl import layout, profile, render
from khoctl.candidates import complete_keys
from khoctl.session import Group, Json
from khod import config
from khod.errors import ConfigError, Exit, UsageError
from khod.files import list_toml
from khod.model import CheckResult
from khod.producers.configuration import CheckedFiles, check_file, check_files
from khod.text import printable

BUILT_IN = "built in"

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Check the configuration, or show what holds and where it is set. Reads the files and needs no khod.",
)
Below = Annotated[Path, typer.Option("--root", metavar="DIR", help="Where etc/ is, as for khod --root.")]


@dataclass(frozen=True)
class ShownSetting:
    """One key of khod.toml with its value; `where` is FILE:LINE, or BUILT_IN."""

    key: str
    value: Any
    default: Any
    where: str


@app.command()
def check(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", show_default=False, help="Only this file; all below /etc/kho.")
    ] = None,
    root: Below = Path("/"),
    as_json: Json = False,
) -> None:
    """List what khod would refuse, with file and line.

    These are unknown keys, wrong values, and files that contradict each other. Reads khod.toml with its fragments,
    producers, virtual machines, health checks, profiles and keys. Of one FILE the directory says what it is. Exits
    with 2 where something is wrong; a warning changes no exit code.
    """
    found = _check_all(root) if file is None else _check_one(file)
    if as_json:
        layout.write_text(render.as_json(_to_json(found)))
    else:
        for result, problems in ((CheckResult.fail, found.errors), (CheckResult.warn, found.warnings)):
            for one in problems:
                layout.show_page(f"{render.style_result(result)}  {one}")
        layout.show_page(_conclude(found))
    raise typer.Exit(ConfigError.exit if found.errors else Exit.done)


@app.command()
def show(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[KEY]",
            show_default=False,
            help="Only this table, or this TABLE.KEY.",
            autocompletion=complete_keys,
        ),
    ] = None,
    root: Below = Path("/"),
    as_json: Json = False,
) -> None:
    """Show the value of each key, and which file and line set it.

    These are the keys of khod.toml. What no file sets is built in. The output is TOML that khod reads. A khod that
    runs has read the files at its start or its last reload.
    """
    read = config.read_config(root)
    if read.errors:
        raise read.errors[0]
    defaults = config.list_settings(config.Config())
    settings = [
        ShownSetting(key, value, defaults[key], read.locate_key(key) or BUILT_IN)
        for key, value in config.list_settings(read.config).items()
        if name is None or name in (key, key.partition(".")[0])
    ]
    if not settings:
        raise UsageError(f"There is no key or table {name!r}", where="khod.toml", remedy="All: khoctl config show")
    if as_json:
        layout.write_text(render.as_json(settings))
    else:
        layout.write_text("\n".join(_draw_settings(settings)))


def _check_all(root: Path) -> CheckedFiles:
    found = check_files(root)
    directory = profile.profile_directory() if root == Path("/") else root / profile.DIRECTORY.relative_to("/")
    try:
        paths = list_toml(directory, "handover profile")
    except ConfigError as error:
        found.errors.append(error)
        return found
    for path in paths:
        _check_profile(found, path)
    return found


def _check_one(path: Path) -> CheckedFiles:
    if path.absolute().parent.name != profile.DIRECTORY.name:
        return check_file(path)
    found = CheckedFiles()
    _check_profile(found, path)
    return found


def _check_profile(found: CheckedFiles, path: Path) -> None:
    """Read a profile; a file that it names and that is not there is a warning: it may be installed later."""
    found.paths.append(path)
    try:
        read = profile.read_profile(path)
    except ConfigError as error:
        found.errors.append(error)
        return
    try:
        read.check_files(read.options)
    except ConfigError as error:
        found.warnings.append(error)


def _to_json(found: CheckedFiles) -> dict[str, Any]:
    problems = [("error", one) for one in found.errors] + [("warning", one) for one in found.warnings]
    return {
        "valid": not found.errors,
        "files": [str(path) for path in found.paths],
        "problems": [
            {"severity": severity, "what": one.what, "where": one.where, "remedy": one.remedy}
            for severity, one in problems
        ],
    }


def _conclude(found: CheckedFiles) -> str:
    """Return the last line of the page."""
    files = _count_things(len(found.paths), "file")
    warned = f", {_count_things(len(found.warnings), 'warning')}" if found.warnings else ""
    if found.errors:
        return f"{_count_things(len(found.errors), 'error')}{warned} in {files}: khod would refuse what is marked FAIL."
    if not found.paths:
        return "There are no files: khod uses what is built in. To see it: khoctl config show"
    return f"Valid: {files}{warned}."


def _count_things(count: int, name: str) -> str:
    return f"{count} {name}{'' if count == 1 else 's'}"


def _draw_settings(settings: Sequence[ShownSetting]) -> Iterator[str]:
    """Return TOML, a table after the other, with the place of each value behind it."""
    lines = {one.key: f"{one.key.partition('.')[2]} = {_to_toml(one.value)}" for one in settings}
    width = min(max(map(len, lines.values())), 40)
    table = ""
    for one in settings:
        section = one.key.partition(".")[0]
        if section != table:
            yield from ([""] if table else [])
            yield f"[{section}]"
            table = section
        yield f"{lines[one.key]:<{width}}  # {printable(one.where)}"


def _to_toml(value: Any) -> str:
    """Return a value as TOML; JSON writes texts, numbers, lists and booleans in the same way."""
    return render.as_json(value)
