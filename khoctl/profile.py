# SPDX-License-Identifier: LGPL-2.1-or-later
"""Handover profiles: /etc/kho/handover.d/NAME.toml holds what `khoctl kexec` would be given."""

import re
from pathlib import Path
from typing import Any

from khod.errors import ConfigError
from khod.files import read_toml, require_type

DIRECTORY = Path("/etc/kho/handover.d")
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
KEYS: dict[str, type] = {
    "image": str,
    "initrd": list,
    "entry": str,
    "default": bool,
    "kernel": str,
    "cmdline": str,
    "reuse_cmdline": bool,
    "append": str,
    "remove": list,
    "now": bool,
    "load_only": bool,
    "hold": bool,
}
"""What a profile may say, and of which type; a list of strings may be one string, too."""
ONE_OF = (("image", "entry", "default", "kernel"), ("cmdline", "reuse_cmdline"))
"""Keys that contradict each other."""


def load_profile(name: str, directory: Path = DIRECTORY) -> dict[str, Any]:
    """Read a profile: every key, None where it is not given; ConfigError names the file and the key."""
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
    return {key: values.get(key) for key in KEYS}
