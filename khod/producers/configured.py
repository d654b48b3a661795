"""What every producer has that a file in /etc/kho/producers.d describes."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from khod.errors import ConfigError, UsageError
from khod.record import Holder
from khod.text import one_line

__all__ = ["Configured", "check_name", "one_line", "string", "strings"]

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@-]{0,63}")

RESERVED = ("systemd",)
"""Names no producer may have: LUO's session of that name is the service manager's."""


@dataclass(frozen=True)
class Configured:
    """The keys all kinds share; see `khod.producers.barrier.Producer`. `timeout` is in seconds, for each verb."""

    name: str
    timeout: float = 30.0
    after: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    kind: str = ""

    @property
    def restores(self) -> bool:
        return False

    @property
    def reachable(self) -> bool:
        return True

    async def leave(self, note: str) -> None:
        """Nothing: it does not stand in the way."""

    async def returned(self) -> None:
        """Return at once: it was never here, it is told where it is."""

    def holder(self) -> Holder:
        """What the record says of it; all else stands in its file."""
        return Holder(self.name, self.kind)


def check_name(name: str) -> None:
    """Raise UsageError where no producer can have this name."""
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{name[:80]!r} is no name for a producer",
            where="name",
            remedy="Letters, digits, `.`, `_`, `@` and `-`, at most 64, the first one a letter, a digit or `_`.",
        )
    if name in RESERVED:
        raise UsageError(f"The name {name!r} is taken by the service manager", where="name", remedy="Choose another.")


def strings(value: Any, path: Path, key: str, *, some: bool = False) -> list[str]:
    """Check a list of strings, with `some` at least one; ConfigError names the file."""
    if not isinstance(value, list) or not all(isinstance(word, str) and word for word in value) or (some and not value):
        raise ConfigError(
            f"`{key}` is {value!r}", where=str(path), remedy='It takes a list of strings, ["one", "two"].'
        )
    return value


def string(value: Any, path: Path, key: str) -> str:
    """Check a string that is not empty; ConfigError names the file."""
    if not isinstance(value, str) or not value or "\0" in value:
        raise ConfigError(f"`{key}` is {value!r}", where=str(path), remedy='It takes a string, "like this".')
    return value
