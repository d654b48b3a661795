# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl fleet: many hosts as one table, and as one page."""

import math
from dataclasses import dataclass
from typing import Annotated

import typer

from khoctl import layout, render
from khoctl.fleet import assess, collect, inventory
from khoctl.fleet.model import FleetView
from khoctl.option_sets import spread_options
from khoctl.output import write_file
from khoctl.session import Group, Json, call_timeout
from khod.errors import UsageError

DEFAULT_ATTEMPTS = 20
DEFAULT_PARALLEL, MAX_PARALLEL = 16, 256
HOST_SECONDS = 30.0
"""How long one host may take, unless --timeout says."""
SCHEMA, SCHEMA_VERSION = "io.kho.Fleet", 1
"""The version is raised when a field goes or changes its meaning; a new field does not raise it."""

app = typer.Typer(
    cls=Group, rich_markup_mode=None, no_args_is_help=True, help="Many hosts: where they stand, and which stand out."
)


@dataclass(frozen=True, kw_only=True)
class FleetOptions:
    """The hosts, and how they are asked and judged: the options of both commands."""

    hosts: Annotated[
        list[str] | None, typer.Argument(metavar="[USER@HOST]...", help="Hosts to ask, in addition to an inventory.")
    ] = None
    inventory_file: Annotated[
        str | None,
        typer.Option(
            "--inventory", "-i", metavar="FILE", help="The hosts: one a line, or Ansible's; - is standard input."
        ),
    ] = None
    exports: Annotated[
        list[str] | None,
        typer.Option(
            "--from", metavar="FILE", help="Read what `khoctl history --json` wrote; a directory, or a pattern."
        ),
    ] = None
    budget: Annotated[
        float | None,
        typer.Option("--budget", min=0, metavar="SECONDS", help="A host whose last blackout was longer stands out."),
    ] = None
    count: Annotated[
        int,
        typer.Option("-n", min=1, max=collect.MAX_ATTEMPTS, metavar="N", help="How many attempts to read of each."),
    ] = DEFAULT_ATTEMPTS
    parallel: Annotated[
        int, typer.Option("--parallel", min=1, max=MAX_PARALLEL, metavar="N", help="How many hosts to ask at a time.")
    ] = DEFAULT_PARALLEL


@app.command()
@spread_options
def status(options: FleetOptions, as_json: Json = False) -> None:
    """Show where the hosts stand, in one table.

    Those come first that a person should look at. Exits with 6, 7, 5 or 3 where a host is not rolled back, degraded,
    not reached, or stands out; with 4 where one has no KHO.
    """
    found = _view_fleet(options)
    if as_json:
        document = {"schema": SCHEMA, "version": SCHEMA_VERSION, "fleet": found}
        layout.write_text(render.as_json(document))
    else:
        from khoctl.fleet.table import render_fleet  # noqa: PLC0415 - only for people

        layout.write_text(render_fleet(found, layout.page_width()))
    raise typer.Exit(found.exit_code)


@app.command()
@spread_options
def report(
    options: FleetOptions,
    html: Annotated[str, typer.Option("--html", metavar="FILE", help="Where to write the page; - is standard output.")],
) -> None:
    """Write where the hosts stand as one page.

    It needs nothing else and runs nothing. Exits as status.
    """
    from khoctl.report.fleet import write_fleet_page  # noqa: PLC0415 - only for the page

    found = _view_fleet(options)
    write_file(html, write_fleet_page(found).encode())
    raise typer.Exit(found.exit_code)


def _view_fleet(options: FleetOptions) -> FleetView:
    """Ask the hosts and read the files that were named; raise UsageError where there is none."""
    if options.budget is not None and not math.isfinite(options.budget):
        raise UsageError(f"{options.budget:g} is not a budget", where="--budget", remedy="Give a number of seconds.")
    members = inventory.read_inventory(options.inventory_file) if options.inventory_file is not None else []
    members = inventory.join_members([*members, *map(inventory.name_member, options.hosts or ())])
    if not members and not options.exports:
        raise UsageError("No host is named", where="fleet", remedy="Give USER@HOST, --inventory FILE, or --from FILE.")
    limit = call_timeout() or HOST_SECONDS
    found = (
        collect.ask_hosts(members, attempts=options.count, parallel=options.parallel, limit=limit) if members else []
    )
    return assess.assess_fleet([*found, *collect.read_exports(options.exports or ())], options.budget)
