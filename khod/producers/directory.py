# SPDX-License-Identifier: LGPL-2.1-or-later
"""/etc/kho/producers.d: one producer a file. What it names decides the kind: commands, a unit, or a QMP socket.

/etc/kho/fleetlock.toml is one more: the lock of the host's fleet.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from khod.deferred import defer_module
from khod.errors import ConfigError, UsageError
from khod.files import Fragment, list_toml, read_toml, require_type, unknown_key_error
from khod.fleetlock import FILE as FLEETLOCK_FILE
from khod.producers.barrier import Participant, Verb
from khod.producers.commands import TABLE, CommandRunner
from khod.producers.configured import check_name, require_string, require_strings
from khod.wire import SOCKET, VERB_SECONDS

if TYPE_CHECKING:
    from khod.producers import fleetlock, hooks, kept, qemu, service_settings, unit
    from khod.systemd.setting_values import Property
    from khod.vm import settings as vm_settings
else:
    fleetlock = defer_module("khod.producers.fleetlock")
    hooks = defer_module("khod.producers.hooks")
    kept = defer_module("khod.producers.kept")
    qemu = defer_module("khod.producers.qemu")
    service_settings = defer_module("khod.producers.service_settings")
    unit = defer_module("khod.producers.unit")
    vm_settings = defer_module("khod.vm.settings")

DIRECTORY = "etc/kho/producers.d"
VERBS = tuple(verb.value for verb in Verb)
KEYS = (*VERBS, "unit", "how", "qmp", "keep", "restart", "agent", "timeout", "after", "before", "devices", TABLE)
Values = dict[str, Any]
MAX_TIMEOUT_SECONDS = 86400
"""For one verb; a hook without an end would hold every rollback."""


def load_directory(root: Path, runner: CommandRunner, socket: Path = Path(SOCKET)) -> list[Participant]:
    """Read every producer's file, by name; ConfigError that names the first that is wrong, and has all the others.

    `runner` is for the commands of those that are hooks, `socket` is khod's own.
    """
    found, errors = read_directory(root, runner, socket)
    if errors:
        errors[0].readable = found
        raise errors[0]
    return found


def read_directory(
    root: Path, runner: CommandRunner, socket: Path = Path(SOCKET)
) -> tuple[list[Participant], list[ConfigError]]:
    """Read every producer's file, by name, as above; return what can be read, and what is wrong with the others."""
    found: list[Participant] = []
    errors: list[ConfigError] = []
    sockets: dict[str, Path] = {}
    for path in list_toml(root / DIRECTORY, "producer"):
        try:
            made = read_producer(path, runner)
            qmp = getattr(made, "socket", None)  # a class would have to be imported
            if qmp is not None and (other := sockets.setdefault(qmp, path)) != path:
                raise ConfigError(
                    f"Two files have one QMP socket, {qmp}", where=str(path), remedy=f"Remove it, or {other}."
                )
            found.append(made)
        except ConfigError as error:
            errors.append(error)
    try:
        if os.path.lexists(root / FLEETLOCK_FILE):
            found.append(fleetlock.read_fleetlock(root, runner, socket))
    except ConfigError as error:
        errors.append(error)
    return found, errors


class Directory:
    """The directory below `root`, asked before every step, registration and status: parsed when a file has changed."""

    def __init__(self, root: Path, runner: CommandRunner, socket: Path = Path(SOCKET)) -> None:
        self._root = root
        self._runner = runner
        self._socket = socket
        self._seen: list[tuple[str, int, int, int]] | None = None
        self._found: list[Participant] = []

    def load_producers(self) -> list[Participant]:
        """Give every producer with a file, as `load_directory` does."""
        seen = self._directory_state()
        if seen is None or seen != self._seen:
            self._found, self._seen = load_directory(self._root, self._runner, self._socket), seen
        return list(self._found)

    def _directory_state(self) -> list[tuple[str, int, int, int]] | None:
        """What tells one state of the files from another; None where one goes just now."""
        lock = self._root / FLEETLOCK_FILE
        try:
            paths = [*list_toml(self._root / DIRECTORY, "producer"), *([lock] if os.path.lexists(lock) else [])]
            stats = [(str(path), path.stat()) for path in paths]
        except (OSError, ConfigError):
            return None
        return [(name, found.st_ino, found.st_size, found.st_mtime_ns) for name, found in stats]


def read_producer(path: Path, runner: CommandRunner) -> Participant:
    """Read one producer's file; raise ConfigError for what is wrong with it."""
    text, values = read_toml(path, "producer")
    fragment = Fragment(path, text, dict(values))
    try:
        check_name(path.stem)
        common = _take_common(values, fragment)
        chosen = [key for key in KINDS if key in values]
        if len(chosen) > 1 or (chosen and any(verb in values for verb in VERBS)):
            raise ConfigError(
                f"`{chosen[0]}` stands beside another kind of producer",
                where=fragment.locate_key(chosen[0]),
                remedy="One file is one.",
            )
        if chosen and TABLE in values:
            raise ConfigError(
                f"`{TABLE}` stands beside `{chosen[0]}`",
                where=fragment.locate_key(TABLE),
                remedy="Only a hook has a unit of khod's own. Remove the table.",
            )
        if chosen:
            made = KINDS[chosen[0]](fragment, values, common, runner)
        else:
            commands, settings = _take_commands(fragment, values), _take_settings(fragment, values, runner)
            made = hooks.Hook(**common, commands=commands, settings=settings, runner=runner)
    except UsageError as error:
        raise ConfigError(error.what, where=str(path), remedy=error.remedy) from None
    if values:
        key = min(values)
        raise unknown_key_error(fragment.locate_key(key), key, KEYS, "a producer")
    return made


def _take_common(values: Values, fragment: Fragment) -> Values:
    """Take the keys that all kinds have."""
    timeout, where = VERB_SECONDS, ""
    if "timeout" in values:
        where = fragment.locate_key("timeout")
        timeout = require_type(values.pop("timeout"), float, "timeout", where)
    if not 0 < timeout <= MAX_TIMEOUT_SECONDS:
        raise ConfigError(
            f"`timeout` is {timeout!r}",
            where=where,
            remedy=f"It must be a positive number of seconds, at most {MAX_TIMEOUT_SECONDS}.",
        )
    lists: Values = {
        key: tuple(require_strings(values.pop(key), fragment, key))
        for key in ("after", "before", "devices")
        if key in values
    }
    if isinstance(values.get("keep"), list):  # of a virtual machine it may be true
        lists["units"] = tuple(require_strings(values.pop("keep"), fragment, "keep"))
    return {"name": fragment.path.stem, "timeout": timeout, **lists}


def _take_commands(fragment: Fragment, values: Values) -> dict[str, list[str]]:
    return {verb: require_strings(values.pop(verb), fragment, verb, some=True) for verb in VERBS if verb in values}


def _take_settings(fragment: Fragment, values: Values, runner: CommandRunner) -> dict[str, Property]:
    """Take the settings of a hook's unit; ConfigError where the runner has no units."""
    if TABLE not in values:
        return {}
    table = values.pop(TABLE)
    misplaced = [key for key in KEYS if key in table] if isinstance(table, dict) else []
    if misplaced:
        raise ConfigError(
            f"`{misplaced[0]}` stands in the table [{TABLE}]",
            where=fragment.locate_key(f"{TABLE}.{misplaced[0]}"),
            remedy=f"It is a key of the producer: write it above the line [{TABLE}].",
        )
    settings = service_settings.read_settings(table, fragment)
    if settings and not runner.has_units:
        raise ConfigError(
            f"`{TABLE}` requires systemd, and this khod runs hooks without it",
            where=fragment.locate_key(TABLE),
            remedy="Remove the table, or run khod on a host that systemd booted.",
        )
    return settings


def _make_unit(fragment: Fragment, values: Values, common: Values, _runner: CommandRunner) -> Participant:
    name, how = require_string(values.pop("unit"), fragment, "unit"), values.pop("how", "freeze")
    unit.check_unit(name)
    if how not in ("freeze", "stop"):
        where = fragment.locate_key("how")
        raise ConfigError(f"`how` is {how!r}", where=where, remedy="It takes one of: freeze, stop.")
    units = (*common.pop("units", ()), name)
    return unit.Unit(**common, units=units, unit=name, how=how)


def _make_qemu(fragment: Fragment, values: Values, common: Values, runner: CommandRunner) -> Participant:
    socket = require_string(values.pop("qmp"), fragment, "qmp")
    if not require_type(values.pop("keep", False), bool, "keep", fragment.locate_key("keep")):
        return qemu.Qemu(**common, socket=socket)
    vm_settings.parse_kept(fragment)
    values.pop("restart", None)
    values.pop("agent", None)
    return kept.KeptVm(**common, socket=socket, runner=runner)


KINDS: dict[str, Callable[[Fragment, Values, Values, CommandRunner], Participant]] = {
    "unit": _make_unit,
    "qmp": _make_qemu,
}
