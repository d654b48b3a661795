# SPDX-License-Identifier: LGPL-2.1-or-later
"""The file of one virtual machine: /etc/kho/vm.d/NAME.toml."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from khod.config import Fragment
from khod.errors import ConfigError, UsageError
from khod.files import read_toml, require_type
from khod.vm.arguments import check_command

DIRECTORY = "etc/kho/vm.d"
KEYS = ("command", "timeout", "stop_timeout", "after", "before", "devices", "up", "agent")
MAX_SECONDS = 3600.0


@dataclass(frozen=True)
class VmSettings:
    """One virtual machine. `size` is the guest's RAM in bytes, as -m in `command` says.

    `up` is a command that runs before each start of QEMU, as to make a tap device; `agent` is the socket of the guest
    agent, which is asked to set the guest's clock after the jump.
    """

    name: str
    command: tuple[str, ...]
    size: int
    timeout: float = 60.0
    stop_timeout: float = 90.0
    after: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    up: tuple[str, ...] = ()
    agent: str = ""


def load_settings(name: str, root: Path = Path("/")) -> VmSettings:
    """Read the file of a virtual machine; ConfigError with file and line for what is wrong with it."""
    path = root / DIRECTORY / f"{name}.toml"
    text, values = read_toml(path, "virtual machine")
    fragment = Fragment(path, text, values)
    if unknown := sorted(values.keys() - {*KEYS}):
        raise ConfigError(
            f"`{unknown[0]}` is an unknown key of a virtual machine",
            where=fragment.locate_key(unknown[0]),
            remedy=f"Known here: {', '.join(KEYS)}.",
        )
    command = _take(fragment, "command", tuple[str, ...], ())
    if not command:
        raise ConfigError(
            "`command` is missing", where=str(path), remedy='Name it: command = ["qemu-system-x86_64", …]'
        )
    try:
        size = check_command(command)
    except UsageError as error:
        raise ConfigError(error.what, where=fragment.locate_key("command"), remedy=error.remedy) from None
    return VmSettings(
        name=name,
        command=command,
        size=size,
        timeout=_take_seconds(fragment, "timeout", VmSettings.timeout),
        stop_timeout=_take_seconds(fragment, "stop_timeout", VmSettings.stop_timeout),
        after=_take(fragment, "after", tuple[str, ...], ()),
        before=_take(fragment, "before", tuple[str, ...], ()),
        devices=_take(fragment, "devices", tuple[str, ...], ()),
        up=_take(fragment, "up", tuple[str, ...], ()),
        agent=_take(fragment, "agent", str, ""),
    )


def _take(fragment: Fragment, key: str, wanted: Any, default: Any) -> Any:
    if key not in fragment.values:
        return default
    return require_type(fragment.values[key], wanted, key, fragment.locate_key(key))


def _take_seconds(fragment: Fragment, key: str, default: float) -> float:
    seconds: float = _take(fragment, key, float, default)
    if not 0 < seconds <= MAX_SECONDS:
        raise ConfigError(
            f"`{key}` is {seconds!r}",
            where=fragment.locate_key(key),
            remedy=f"It must be a positive number of seconds, at most {MAX_SECONDS:g}.",
        )
    return seconds
