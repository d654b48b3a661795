# SPDX-License-Identifier: LGPL-2.1-or-later
"""Handover profiles: /etc/kho/handover.d/NAME.toml says what a handover by this name is, and what must hold for it."""

import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from khoctl.next_kernel import WAYS, NextKernelOptions
from khod.errors import ConfigError
from khod.files import Fragment, list_toml, read_toml, require_type, unknown_key_error
from khod.model import MAX_TERMS_SECONDS, TOLERABLE, VERIFICATION_CHECKS, names_check
from khod.text import SHA256_REMEDY, normalize_sha256, shorten

if TYPE_CHECKING:
    from khoctl.window import Window

DIRECTORY = Path("/etc/kho/handover.d")
ENVIRONMENT = "KHO_PROFILES"
"""The variable that names another directory of profiles."""
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")
"""A name of a file and of an instance of a unit; both have less than 256 characters."""
FLAGS = ("now", "load_only", "hold")
"""The keys of a profile that do not describe the next kernel, and are options of kexec."""
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where the commands of hooks are looked for."""
HOOK_SECONDS = 300.0
"""Seconds that a command of a hook has, unless the profile says another number."""
MAX_SHOWN = 60


def _key_type(hint: Any) -> type:
    """Return the type of an option that may be left out: str for `str | None`, list for `list[str] | None`."""
    first = next(iter(get_args(hint)), hint)
    found: type = get_origin(first) or first
    return found


KEYS = (
    {name: _key_type(hint) for name, hint in get_type_hints(NextKernelOptions).items()}
    | dict.fromkeys(FLAGS, bool)
    | {"require": list, "blackout_budget": float}
)
"""The keys of a profile and their types; a list of strings may also be one string."""
TABLES: dict[str, dict[str, type]] = {
    "deadlines": dict.fromkeys(("prepare", "freeze", "activate", "load", "restore"), float),
    "verify": dict.fromkeys(("must_pass", "tolerate"), list),
    "window": {"days": list, "from": str, "to": str, "timezone": str},
    "hooks": {"before": tuple, "after": tuple, "before_timeout": float, "after_timeout": float},
}
"""The tables of a profile with their keys and types; a tuple has the commands of a hook."""
ONE_OF = (WAYS, ("cmdline", "reuse_cmdline"))
"""Keys that contradict each other."""
COMMAND = 'It must be a command as a list of words, for example ["/usr/bin/drain", "--wait"], or a list of such lists.'
Command = tuple[str, ...]


@dataclass(frozen=True)
class HookCommands:
    """The commands before the handover, or after it, in their order; each may run for `seconds`."""

    commands: tuple[Command, ...] = ()
    seconds: float = HOOK_SECONDS


@dataclass(frozen=True)
class Profile:
    """The contents of a profile.

    `options` is the next kernel, `flags` are the members of FLAGS that are on, `terms` what khod holds the run to, as
    on the wire. `where` has FILE:LINE of each key.
    """

    name: str
    path: Path
    options: NextKernelOptions
    flags: frozenset[str] = frozenset()
    terms: dict[str, Any] = field(default_factory=dict)
    window: "Window | None" = None
    before: HookCommands = field(default_factory=HookCommands)
    after: HookCommands = field(default_factory=HookCommands)
    where: dict[str, str] = field(default_factory=dict)

    @property
    def has_hooks(self) -> bool:
        """Whether it has commands of its own."""
        return bool(self.before.commands or self.after.commands)

    def check_files(self, options: NextKernelOptions) -> None:
        """Raise ConfigError if a file that the profile names is gone, unless `options` have another one."""
        for key in ("image", "initrd", "signature", "initrd_signature"):
            kept = getattr(self.options, key)
            for path in [kept] if isinstance(kept, str) else kept or ():
                if getattr(options, key) == kept and not Path(path).exists():
                    raise self._missing_error(key, path)
        for key, hook in (("before", self.before), ("after", self.after)):
            for command in hook.commands:
                if shutil.which(command[0], path=PATH) is None:
                    raise self._missing_error(f"hooks.{key}", command[0])

    def _missing_error(self, key: str, path: str) -> ConfigError:
        what = "no program that can be started" if key.startswith("hooks") else "not there"
        return ConfigError(
            f"`{key}` of profile {self.name} names {path}, which is {what}",
            where=self.where.get(key, str(self.path)),
            remedy="Correct the profile, or install what it names.",
        )

    def make_terms(self, *, enforce: bool, ignore_window: bool = False, asked_by: str = "") -> dict[str, Any]:
        """Return the parameter `terms` for khod.

        With `enforce` a handover is to begin now: Refused if the window is closed and not ignored.
        """
        terms: dict[str, Any] = {"profile": self.name, **self.terms}
        if asked_by:
            terms["asked_by"] = asked_by
        if self.window is not None:
            terms["window"] = self.window.describe()
            now = datetime.now(UTC)
            if ignore_window:
                terms["window_ignored"] = True
            elif enforce:
                self.window.require_open(self.name, now)
                if closing := self.window.find_closing(now):
                    terms["begin_before"] = closing.timestamp()
        return terms


def profile_directory() -> Path:
    """Return the directory of profiles."""
    return Path(os.environ.get(ENVIRONMENT) or DIRECTORY)


def list_profiles() -> list[str]:
    """Return the names of all profiles, in order."""
    return [path.stem for path in list_toml(profile_directory(), "handover profile")]


def load_profile(name: str) -> Profile:
    """Read a profile by its name; raise ConfigError, with the file, the line and the key, if it is not valid."""
    directory = profile_directory()
    path = directory / f"{name}.toml"
    if NAME.fullmatch(name) and not os.path.lexists(path):  # a link that leads nowhere is one of those there are
        known = list_profiles()
        remedy = f"There are: {', '.join(known)}." if known else f"None is in {directory}."
        raise ConfigError(f"There is no profile {name!r}", where=str(path), remedy=remedy)
    return _read_profile(name, path)


def read_profile(path: Path) -> Profile:
    """Read the profile in a file; raises as above."""
    return _read_profile(path.name.partition(".toml")[0], path)


def _read_profile(name: str, path: Path) -> Profile:
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"{shorten(name, MAX_SHOWN)!r} is not a valid name of a profile",
            where=str(path.parent),
            remedy="Letters, digits, `.`, `_` and `-`, 200 at most.",
        )
    return _parse_profile(name, Fragment(path, *read_toml(path, "profile")))


def _parse_profile(name: str, fragment: Fragment) -> Profile:
    values, tables = _take_values(fragment), _take_tables(fragment)
    for group in ONE_OF:
        given = [f"`{key}`" for key in group if values.get(key) not in (None, False)]
        if len(given) > 1:
            raise ConfigError(
                f"{' and '.join(given)} contradict each other", where=str(fragment.path), remedy="Keep one of them."
            )
    flags = frozenset(key for key in FLAGS if values.pop(key, False))
    terms: dict[str, Any] = {key: values.pop(key) for key in ("require", "blackout_budget") if key in values}
    terms |= tables.get("verify", {})
    if tables.get("deadlines"):
        terms["deadlines"] = tables["deadlines"]
    known = [source.value for source in TOLERABLE]
    _check_names(terms, "tolerate", known, known.__contains__, fragment)
    _check_names(terms, "must_pass", VERIFICATION_CHECKS, names_check, fragment)
    for digest in values.get("sha256", ()):
        if normalize_sha256(digest) is None:
            raise ConfigError(f"`sha256` has {digest!r}", where=fragment.locate_key("sha256"), remedy=SHA256_REMEDY)
    window = None
    if "window" in tables:
        from khoctl.window import parse_window  # noqa: PLC0415 - most profiles have none

        window = parse_window(tables["window"], fragment)
    hooks = tables.get("hooks", {})
    before, after = (
        HookCommands(tuple(hooks.get(key, ())), hooks.get(f"{key}_timeout", HOOK_SECONDS))
        for key in ("before", "after")
    )
    keys = [*fragment.values, *(f"hooks.{key}" for key in hooks)]
    where = {key: fragment.locate_key(key) for key in keys}
    return Profile(name, fragment.path, NextKernelOptions(**values), flags, terms, window, before, after, where)


def _take_values(fragment: Fragment) -> dict[str, Any]:
    """Return the keys that stand in no table, in their types."""
    found = {}
    for key, value in fragment.values.items():
        if key in TABLES:
            continue
        if key not in KEYS:
            raise unknown_key_error(fragment.locate_key(key), key, [*KEYS, *TABLES], "a profile")
        found[key] = _take_value(value, KEYS[key], key, fragment)
    return found


def _take_tables(fragment: Fragment) -> dict[str, dict[str, Any]]:
    """Return the tables that the profile has, with their keys in their types."""
    found: dict[str, dict[str, Any]] = {}
    for table, keys in TABLES.items():
        if table not in fragment.values:
            continue
        values = fragment.values[table]
        if not isinstance(values, dict):
            raise ConfigError(
                f"`{table}` is a table",
                where=fragment.locate_key(table),
                remedy=f"Write [{table}] on a line of its own.",
            )
        found[table] = {}
        for key, value in values.items():
            dotted = f"{table}.{key}"
            if key not in keys:
                raise unknown_key_error(fragment.locate_key(dotted), dotted, list(keys), "a profile")
            found[table][key] = _take_value(value, keys[key], dotted, fragment)
    return found


def _take_value(value: Any, kind: type, key: str, fragment: Fragment) -> Any:
    """Return a value in the type of its key; a number is one of seconds."""
    if kind is tuple:
        return _take_commands(value, key, fragment)
    where = fragment.locate_key(key)
    if kind is list:
        return list(require_type([value] if isinstance(value, str) else value, tuple[str, ...], key, where))
    found = require_type(value, kind, key, where)
    if kind is float and not 0 < found <= MAX_TERMS_SECONDS:
        remedy = f"It must be a number of seconds, {MAX_TERMS_SECONDS:g} at most."
        raise ConfigError(f"`{key}` is {found:g}", where=where, remedy=remedy)
    return found


def _take_commands(value: Any, key: str, fragment: Fragment) -> tuple[Command, ...]:
    """Return the commands of a hook: a list of words is one command, a list of lists several."""
    several = isinstance(value, list) and bool(value) and all(isinstance(item, list) for item in value)
    try:
        commands = [require_type(words, tuple[str, ...], key, "") for words in (value if several else [value])]
    except ConfigError:
        commands = [()]
    if not all(commands):
        raise ConfigError(f"`{key}` is {value!r}", where=fragment.locate_key(key), remedy=COMMAND)
    return tuple(commands)


def _check_names(
    terms: dict[str, Any], key: str, known: Sequence[str], is_known: Callable[[str], bool], fragment: Fragment
) -> None:
    """Raise ConfigError at the first name of a key of [verify] that is not known."""
    for name in terms.get(key, ()):
        if not is_known(name):
            raise ConfigError(
                f"`verify.{key}` has {name!r}",
                where=fragment.locate_key(f"verify.{key}"),
                remedy=f"Known here: {', '.join(known)}.",
            )
