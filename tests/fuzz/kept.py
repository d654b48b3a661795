# SPDX-License-Identifier: LGPL-2.1-or-later
"""The damaged files of the corpus, each of which must end as endings.toml beside them says."""

import importlib
import tomllib

from tests.fuzz import corpus
from tests.fuzz.run import QUOTED

ENDINGS: dict[str, dict[str, str]] = tomllib.loads((corpus.PLACE / "kept/endings.toml").read_text())
Case = tuple[str, str]


def made(number: int) -> Case:
    """The kind and the name of the file of this number."""
    return [(kind, name) for kind, names in ENDINGS.items() for name in names][number]


def held(case: Case) -> str:
    """Look at it; AssertionError where it ends otherwise."""
    kind, name = case
    target = importlib.import_module(f"tests.fuzz.{kind}")
    said, wanted = target.held(target.alone(name, corpus.kept(kind)[name])), ENDINGS[kind][name]
    assert QUOTED.sub("N", said) == QUOTED.sub("N", wanted), f"{kind}/{name}: {said!r}, not {wanted!r}"
    return str(said)
