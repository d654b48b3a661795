# SPDX-License-Identifier: LGPL-2.1-or-later
"""Values that an operator may mean, for completions in a shell: each with a few words on it, the likeliest first.

What cannot be found out, or not at once, is left out: each function returns nothing then, or raises. A function takes
the context of the command line so far, and imports what it needs: a command that is run needs none of this.
"""
# ruff: noqa: PLC0415 - see above

from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from khoctl.session import HOST_KEY, find_socket
from khod.errors import KhoError

if TYPE_CHECKING:
    from khod.client.history import HistoryClient
    from khod.history.model import AttemptSummary

ROOT = Path("/")
"""Where kernels and boot entries are looked for."""
ANSWER_SECONDS = 0.5
"""A khod that has not answered within this time is not waited for: an operator has pressed a key."""
MAX_RUNS = 50
SIDES = {"out": "what would be handed over now", "in": "what arrived", "snapshot": "the last one that was handed over"}
Candidates = Iterator[tuple[str, str]]


def complete_producers(ctx: typer.Context) -> Candidates:
    """Return the producers that khod knows, and their kinds."""
    with _connect_client(ctx) as khod:
        found = khod.producers()
    yield from ((one.name, one.kind) for one in found)


def complete_profiles(ctx: typer.Context) -> Candidates:
    """Return the profiles of this host."""
    from khoctl.profile import list_profiles

    _require_local(ctx)
    yield from ((name, "profile") for name in list_profiles())


def complete_kernels(ctx: typer.Context) -> Candidates:
    """Return the versions of installed kernels, the newest first."""
    from khoctl.boot.sources import list_versions

    _require_local(ctx)
    yield from ((version, "installed kernel") for version in list_versions(ROOT))


def complete_entries(ctx: typer.Context) -> Candidates:
    """Return the entries of the boot loader, and their titles."""
    from khoctl.boot.entries import list_entries

    _require_local(ctx)
    yield from ((one.id, one.field_text("title") or "boot entry") for one in list_entries(ROOT))


def complete_images(ctx: typer.Context, incomplete: str) -> Candidates:
    """Return the kernels in /boot, until something is typed: after that the shell completes files."""
    _require_local(ctx)
    yield from (() if incomplete else list_boot("vmlinuz", "vmlinux", "Image", "kernel"))


def complete_initrds(ctx: typer.Context, incomplete: str) -> Candidates:
    """Return the initrds in /boot, until something is typed."""
    _require_local(ctx)
    yield from (() if incomplete else list_boot("initrd", "initramfs"))


def complete_runs(ctx: typer.Context) -> Candidates:
    """Return the last attempts at a handover, from khod or from the database of --db; when they began and ended how."""
    from khoctl.figures import format_date
    from khoctl.history import outcome_name

    for one in _list_attempts(ctx):
        yield one.run, f"{format_date(one.began_at)}, {outcome_name(one)}"


def complete_trees(ctx: typer.Context) -> Candidates:
    """Return the trees by their names, and the snapshots that khod keeps."""
    from khoctl.figures import format_date

    yield from SIDES.items()
    with suppress(KhoError, LookupError), _connect_client(ctx) as khod:  # those above need no khod
        for one in khod.snapshots():
            if one.run:
                yield one.id, f"{format_date(one.taken_at)}, {one.release}"


def complete_phases() -> Candidates:
    """Return the phases of a handover."""
    from khod.model import Phase

    yield from ((phase.value, "phase") for phase in Phase)


def complete_keys() -> Candidates:
    """Return the tables of khod.toml, and its keys."""
    from khod.config import Config, list_settings

    keys = list_settings(Config())
    yield from ((table, "table") for table in dict.fromkeys(key.partition(".")[0] for key in keys))
    yield from ((key, "key") for key in keys)


def list_boot(*names: str) -> Candidates:
    """Return the files in /boot whose names begin so, the last ones first."""
    found = (path for name in names for path in sorted((ROOT / "boot").glob(f"{name}*"), reverse=True))
    yield from ((str(path), "file") for path in found if path.is_file())


def _list_attempts(ctx: typer.Context) -> "list[AttemptSummary]":
    if db := ctx.params.get("db"):
        from khod.history.opening import open_for_reading

        with closing(open_for_reading(Path(db))[0]) as database:
            return list(database.list_attempts("", MAX_RUNS))
    with _connect_client(ctx) as khod:
        return khod.history(MAX_RUNS).attempts


def _connect_client(ctx: typer.Context) -> "HistoryClient":
    _require_local(ctx)
    from khod.client.history import HistoryClient

    return HistoryClient(find_socket(ctx), patience=ANSWER_SECONDS)


def _require_local(ctx: typer.Context) -> None:
    """Raise LookupError where the command runs on another host: nobody logs in there for a key."""
    if HOST_KEY in ctx.meta:
        raise LookupError
