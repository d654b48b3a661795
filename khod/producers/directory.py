# SPDX-License-Identifier: LGPL-2.1-or-later
"""/etc/kho/producers.d: one producer a file. What it names decides the kind: commands, a unit, or a QMP socket."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from khod.errors import ConfigError, UsageError
from khod.files import read_toml, require_type
from khod.producers.barrier import Participant, Verb
from khod.producers.commands import CommandRunner
from khod.producers.configured import check_name, require_string, require_strings
from khod.producers.hooks import Hook
from khod.producers.qemu import Qemu
from khod.producers.unit import Unit, check_unit

DIRECTORY = "etc/kho/producers.d"
VERBS = tuple(verb.value for verb in Verb)
Values = dict[str, Any]
MAX_TIMEOUT_SECONDS = 86400
"""For one verb; a hook without an end would hold every rollback."""


def load_directory(root: Path, runner: CommandRunner) -> list[Participant]:
    """Read every producer's file, by name; ConfigError that names the first that is wrong, and has all the others.

    `runner` is for the commands of those that are hooks.
    """
    found: list[Participant] = []
    wrong: ConfigError | None = None
    for path in sorted((root / DIRECTORY).glob("*.toml")):
        try:
            found.append(_read_producer(path, runner))
        except ConfigError as error:
            wrong = wrong or error
    if wrong is not None:
        wrong.readable = found
        raise wrong
    return found


class Directory:
    """The directory below `root`, asked before every step, registration and status: parsed when a file has changed."""

    def __init__(self, root: Path, runner: CommandRunner) -> None:
        self._root = root
        self._runner = runner
        self._seen: list[tuple[str, int, int, int]] | None = None
        self._found: list[Participant] = []

    def load_producers(self) -> list[Participant]:
        """Give every producer with a file, as `load_directory` does."""
        seen = self._directory_state()
        if seen is None or seen != self._seen:
            self._found, self._seen = load_directory(self._root, self._runner), seen
        return list(self._found)

    def _directory_state(self) -> list[tuple[str, int, int, int]] | None:
        """What tells one state of the files from another; None where one goes just now."""
        try:
            stats = [(path.name, path.stat()) for path in sorted((self._root / DIRECTORY).glob("*.toml"))]
        except OSError:
            return None
        return [(name, found.st_ino, found.st_size, found.st_mtime_ns) for name, found in stats]


def _read_producer(path: Path, runner: CommandRunner) -> Participant:
    _, values = read_toml(path, "producer")
    try:
        check_name(path.stem)
        common = _take_common(values, path)
        chosen = [key for key in KINDS if key in values]
        if len(chosen) > 1 or (chosen and any(verb in values for verb in VERBS)):
            raise ConfigError(
                f"`{chosen[0]}` stands beside another kind of producer", where=str(path), remedy="One file is one."
            )
        if chosen:
            made = KINDS[chosen[0]](path, values, common)
        else:
            made = Hook(**common, commands=_take_commands(path, values), runner=runner)
    except UsageError as error:
        raise ConfigError(error.what, where=str(path), remedy=error.remedy) from None
    if values:
        known = (*VERBS, "unit", "how", "qmp", "timeout", "after", "before", "devices")
        raise ConfigError(
            f"`{min(values)}` is an unknown key of a producer",
            where=str(path),
            remedy=f"Known here: {', '.join(known)}.",
        )
    return made


def _take_common(values: Values, path: Path) -> Values:
    """Take the keys that all kinds have."""
    timeout = require_type(values.pop("timeout", 30.0), float, "timeout", str(path))
    if not 0 < timeout <= MAX_TIMEOUT_SECONDS:
        raise ConfigError(
            f"`timeout` is {timeout!r}",
            where=str(path),
            remedy=f"It must be a positive number of seconds, at most {MAX_TIMEOUT_SECONDS}.",
        )
    lists = {key: tuple(require_strings(values.pop(key, []), path, key)) for key in ("after", "before", "devices")}
    return {"name": path.stem, "timeout": timeout, **lists}


def _take_commands(path: Path, values: Values) -> dict[str, list[str]]:
    return {verb: require_strings(values.pop(verb), path, verb, some=True) for verb in VERBS if verb in values}


def _make_unit(path: Path, values: Values, common: Values) -> Participant:
    name, how = require_string(values.pop("unit"), path, "unit"), values.pop("how", "freeze")
    check_unit(name)
    if how not in ("freeze", "stop"):
        raise ConfigError(f"`how` is {how!r}", where=str(path), remedy="It takes one of: freeze, stop.")
    return Unit(**common, unit=name, how=how)


def _make_qemu(path: Path, values: Values, common: Values) -> Participant:
    return Qemu(**common, socket=require_string(values.pop("qmp"), path, "qmp"))


KINDS: dict[str, Callable[[Path, Values, Values], Participant]] = {"unit": _make_unit, "qmp": _make_qemu}
