# SPDX-License-Identifier: LGPL-2.1-or-later
"""Handover profiles: /etc/kho/handover.d/NAME.toml holds options of `khoctl kexec`."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from khoctl.next_kernel import WAYS, NextKernelOptions
from khod.errors import ConfigError
from khod.files import read_toml, require_type

DIRECTORY = Path("/etc/kho/handover.d")
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
FLAGS = ("now", "load_only", "hold")
"""The keys of a profile that do not describe the next kernel."""


def _key_type(hint: Any) -> type:
    """Return the type of an option that may be left out: str for `str | None`, list for `list[str] | None`."""
    first = next(iter(get_args(hint)), hint)
    found: type = get_origin(first) or first
    return found


KEYS = {name: _key_type(hint) for name, hint in get_type_hints(NextKernelOptions).items()} | dict.fromkeys(FLAGS, bool)
"""The keys of a profile and their types; a list of strings may also be one string."""
ONE_OF = (WAYS, ("cmdline", "reuse_cmdline"))
"""Keys that contradict each other."""


@dataclass(frozen=True)
class Profile:
    """The contents of a profile: the next kernel, and the members of FLAGS that are on."""

    options: NextKernelOptions
    flags: frozenset[str]


def load_profile(name: str, directory: Path = DIRECTORY) -> Profile:
    """Read a profile; raise ConfigError, with the file and the key, if it is not valid."""
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} is not a valid name of a profile",
            where=str(directory),
            remedy="Letters, digits, `.`, `_` and `-`.",
        )
    path = directory / f"{name}.toml"
    if not path.exists():
        known = sorted(file.stem for file in directory.glob("*.toml"))
        remedy = f"There are: {', '.join(known)}." if known else f"None is in {directory}."
        raise ConfigError(f"There is no profile {name!r}", where=str(path), remedy=remedy)
    _, values = read_toml(path, "profile")
    for key, value in values.items():
        if key not in KEYS:
            raise ConfigError(
                f"`{key}` is an unknown key of a profile", where=str(path), remedy=f"Known here: {', '.join(KEYS)}."
            )
        several = KEYS[key] is not list or not isinstance(value, str)
        wanted = tuple[str, ...] if KEYS[key] is list else KEYS[key]
        found = require_type(value if several else [value], wanted, key, str(path))
        values[key] = list(found) if KEYS[key] is list else found
    for group in ONE_OF:
        given = [f"`{key}`" for key in group if values.get(key) not in (None, False)]
        if len(given) > 1:
            raise ConfigError(
                f"{' and '.join(given)} contradict each other", where=str(path), remedy="Keep one of them."
            )
    flags = frozenset(name for name in FLAGS if values.pop(name, False))
    return Profile(NextKernelOptions(**values), flags)
