# SPDX-License-Identifier: LGPL-2.1-or-later
"""The corpus: whole files, which the cases are made from, and damaged ones that are kept for what they are."""

from pathlib import Path

PLACE = Path(__file__).parent.parent / "unit/corpus"
KINDS = ("trees", "images", "entries")


def seeds(kind: str) -> dict[str, bytes]:
    """The whole files of a kind by name. A new one among them gives every number another case."""
    return _files(PLACE / "seeds" / kind)


def kept(kind: str) -> dict[str, bytes]:
    """The damaged files of a kind, named for what is the matter with them."""
    return _files(PLACE / "kept" / kind)


def _files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}
