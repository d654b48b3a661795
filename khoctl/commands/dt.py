# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl dt: list, show, export, compare and validate state trees, from khod or from files."""

import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from khoctl import layout
from khoctl.candidates import complete_trees
from khoctl.figures import format_date
from khoctl.output import write_file
from khoctl.session import Group, Json, connect_client
from khod.errors import Exit, KhoError, UsageError
from khod.region import Region
from khod.text import printable
from khod.trees.load import load_blobs

if TYPE_CHECKING:
    from khod.model import Snapshot

SIDES = ("out", "in", "snapshot")
ROOT = "root"
"""The name for the root's blob on the command line; on the wire its name is ""."""
NUMBER = r"(0x[0-9a-fA-F]{1,16}|0|[1-9][0-9]{0,19})"
REGION = re.compile(rf"{NUMBER}\+{NUMBER}([KMGT]?)")
SHIFT = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
COLUMNS = ("ID", "TAKEN (UTC)", "KERNEL", "OUTCOME", "BYTES")  # the other fields are in the JSON only
DIFFERENT = 1  # the exit code of diff(1)
AT_ONCE = 1000  # lines written together

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="The state tree that is handed over. TREE is out (what would leave now), in (what arrived), snapshot (the "
    "last that left), the id of a snapshot that is kept, or a path: a blob, a directory with root and blobs/, - for "
    "standard input. Paths need no khod.",
)
Tree = Annotated[
    str,
    typer.Argument(
        metavar="[TREE]", show_default=False, help="out, in, snapshot, an id, or a path.", autocompletion=complete_trees
    ),
]
Side = Annotated[str | None, typer.Option(hidden=True, help="The same as TREE.")]
Blob = Annotated[str | None, typer.Option(metavar="NAME", help="One blob of the tree; root for the root's.")]


class Form(StrEnum):
    """The format in which a tree is written."""

    dtb = "dtb"
    dts = "dts"
    json = "json"


@app.command("list")
def dt_list(as_json: Json = False) -> None:
    """List the snapshots khod keeps, the newest first.

    Each was taken when its handover was activated; OUTCOME is how that handover ended, - where khod does not know.
    """
    with connect_client() as khod:
        found = khod.snapshots()
    _print_lines([_to_json(found)] if as_json else _snapshot_table(found))


@app.command("show")
def dt_show(
    tree: Tree = "out",
    summary: Annotated[bool, typer.Option("--summary", help="Leave nodes and properties out.")] = False,
    blob: Blob = None,
    scratch: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ADDR+SIZE", help="A scratch region to compare memory with; khod knows those of this host."
        ),
    ] = None,
    side: Side = None,
    as_json: Json = False,
) -> None:
    """Show a tree, and where its memory lies.

    Exits with 1 where a blob is damaged; what can be read is shown all the same.
    """
    given = [_parse_region(text) for text in scratch or ()]
    name = side or tree
    blobs, regions = _find_tree(name, scratch=True)
    blobs = blobs if blob is None else _select_blob(blobs, blob)
    _show_tree(blobs, given or regions, summary=summary, as_json=as_json)
    from khod.trees.blobs import is_damaged

    raise typer.Exit(Exit.failed if is_damaged(blobs, shortened=_may_be_shortened(name)) else Exit.done)


def _show_tree(blobs: Mapping[str, bytes], regions: Sequence[Region], *, summary: bool, as_json: bool) -> None:
    if as_json and not summary:
        from khod.trees.as_json import tree_as_json

        _print_lines([_to_json(tree_as_json(blobs))])
        return
    from khod.trees import draw

    width = shutil.get_terminal_size().columns - 2  # for the borders
    pen = draw.BLOCKS if _can_write("".join(vars(draw.BLOCKS).values())) else draw.ASCII
    if summary:
        from khod.trees.summary import summarise_tree as summed

        found = summed(blobs, regions, width)
        _print_lines([_to_json(found)] if as_json else map(_style_blob, draw.draw_summary(found, blobs, pen)))
        return
    from khod.trees.show import show_blobs

    _print_lines(map(_style_blob, show_blobs(blobs, scratch=regions, width=width, pen=pen)))


@app.command("diff")
def dt_diff(
    left: Annotated[
        str,
        typer.Argument(
            metavar="[A]", show_default=False, help="A tree; the last that left.", autocompletion=complete_trees
        ),
    ] = "snapshot",
    right: Annotated[
        str,
        typer.Argument(
            metavar="[B]",
            show_default=False,
            help="A tree; what arrived.",
            autocompletion=complete_trees,
        ),
    ] = "in",
    as_json: Json = False,
) -> None:
    """Compare two trees.

    By default A is the tree that left last, and B the tree that arrived. Exits with 1 where they differ, as diff does;
    what a kernel does not show is only reported.
    """
    from khod.trees.difference import Change, compare_blobs, format_difference

    kernels = not any(Path(name).is_file() for name in (left, right))
    found = list(compare_blobs(_find_tree(left)[0], _find_tree(right)[0], kernels=kernels))
    if as_json:
        _print_lines([_to_json(found)])
    elif found:
        text = [f"--- {left}", f"+++ {right}", *(line for item in found for line in format_difference(item))]
        _print_lines(map(_style_change, text))
    raise typer.Exit(DIFFERENT if any(item.change is not Change.unknown for item in found) else Exit.done)


@app.command("export")
def dt_export(
    tree: Tree = "out",
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="The file to write; - is standard output.")
    ] = "-",
    blob: Blob = ROOT,
    form: Annotated[
        Form,
        typer.Option("--format", help="dtb: the bytes as they are. dts: source for dtc. json: with values decoded."),
    ] = Form.dtb,
    side: Side = None,
) -> None:
    """Write one blob of a tree to a file, or to standard output."""
    if output == "-" and form is Form.dtb and sys.stdout.isatty():
        raise UsageError("A blob is not written to a terminal", remedy="Give -o FILE, or --format dts or json.")
    blobs = _select_blob(_find_tree(side or tree)[0], blob or ROOT)
    for name, data in blobs.items():
        write_file(output, _export_bytes(name, data, form))


@app.command("validate")
def dt_validate(
    tree: Tree = "out",
    schemas: Annotated[
        Path | None, typer.Option(metavar="DIR", help="More schemas, COMPATIBLE.json; they win over all others.")
    ] = None,
    side: Side = None,
    as_json: Json = False,
) -> None:
    """Validate a tree against the schemas.

    Each node is compared with the schema of its compatible. Exits with 3 where something does not fit.
    """
    from khod.trees import validate as checking

    if schemas is not None and not schemas.is_dir():
        raise UsageError("There is no such directory", where=str(schemas))
    known = checking.load_schemas((checking.OPERATOR_SCHEMAS, *((schemas,) if schemas else ())))
    name = side or tree
    blobs = _find_tree(name)[0]
    found = list(checking.validate_blobs(blobs, known, shortened=_may_be_shortened(name)))
    valid = all(finding.fits for finding in found)
    if as_json:
        _print_lines([_to_json({"valid": valid, "findings": found})])
    else:
        lines = [f"{finding} (not judged)" if finding.fits else str(finding) for finding in found]
        if valid:
            lines.append(f"valid: {', '.join(printable(blob) or ROOT for blob in blobs)}")
        _print_lines(layout.fit_page(line, layout.page_width()) for line in lines)
    raise typer.Exit(Exit.done if valid else Exit.refused)


def _export_bytes(name: str, data: bytes, form: Form) -> bytes:
    if form is Form.dtb:
        return data
    if form is Form.json:
        from khod.trees.as_json import tree_as_json

        return f"{_to_json(tree_as_json({name: data}))}\n".encode()
    from khod.trees.source import write_dts

    text, note = write_dts(data, name)
    if note:
        layout.show_page(f"khoctl: {printable(note)}", err=True)
    return text.encode()


def _find_tree(name: str, *, scratch: bool = False) -> tuple[Mapping[str, bytes], Sequence[Region]]:
    """Find a tree by its name on the command line; with `scratch` also this host's regions, if khod has any."""
    if name not in SIDES and (name == "-" or "/" in name or os.path.lexists(name)):
        return load_blobs(name), ()
    with connect_client() as khod:
        blobs = khod.tree(name)
        if not scratch:
            return blobs, ()
        try:
            return blobs, khod.scratch()
        except KhoError:
            return blobs, ()  # a tree can be shown without them


def _may_be_shortened(name: str) -> bool:
    """Whether a tree may come from debugfs of a running kernel, which does not show all of it."""
    return not Path(name).is_file() and name != "-"


def _select_blob(blobs: Mapping[str, bytes], name: str) -> dict[str, bytes]:
    key = "" if name == ROOT else name
    if key not in blobs:
        names = ", ".join(found or ROOT for found in blobs)
        raise UsageError(f"There is no blob {name!r}", where="--blob", remedy=f"One of: {names}.")
    return {key: blobs[key]}


def _parse_region(text: str) -> Region:
    if found := REGION.fullmatch(text):
        region = Region(int(found[1], 0), int(found[2], 0) << SHIFT[found[3]])
        if region.addr + region.size <= 1 << 64:
            return region
    raise UsageError(f"{text!r} is not a region", where="--scratch", remedy="Give one as 0x100000000+512M.")


def _to_json(value: Any) -> str:
    from khoctl import render

    return render.as_json(value)


def _snapshot_table(found: "Sequence[Snapshot]") -> Iterator[str]:
    taken = [item for item in found if item.run]
    if not taken:
        yield layout.fit_page("No snapshots: no handover has come as far as activate yet.", layout.page_width())
    else:
        yield from layout.align_table([COLUMNS, *map(_snapshot_row, taken)], layout.page_width())
    for item in found:
        if item.wrong:
            yield _style_blob(
                layout.fit_page(f"{printable(item.id)}: {printable(item.wrong)} (!)", layout.page_width())
            )


def _snapshot_row(item: "Snapshot") -> tuple[str, ...]:
    outcome = item.outcome.replace("_", " ") or "-"
    words = item.id, format_date(item.taken_at), item.release, outcome, str(item.bytes)
    return tuple(map(printable, words))


def _style_blob(line: str) -> str:
    """Make the line of a blob bold, and a line marked as wrong red."""
    if line.endswith("(!)") or " (!) " in line:
        return typer.style(line, fg=typer.colors.RED)
    return line if line.startswith((" ", "|", "0x")) else typer.style(line, bold=True)


def _style_change(line: str) -> str:
    if line.startswith(("---", "+++")):
        return typer.style(line, bold=True)
    return typer.style(line, fg={"-": typer.colors.RED, "+": typer.colors.GREEN}.get(line[0], typer.colors.YELLOW))


def _can_write(characters: str) -> bool:
    try:
        characters.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def _print_lines(lines: Iterable[str]) -> None:
    """Write lines, AT_ONCE together."""
    held: list[str] = []
    for line in lines:
        held.append(line)
        if len(held) == AT_ONCE:
            layout.write_text("\n".join(held))
            held.clear()
    if held:
        layout.write_text("\n".join(held))
