# SPDX-License-Identifier: LGPL-2.1-or-later
"""The file of one virtual machine: /etc/kho/vm.d/NAME.toml, or producers.d/NAME.toml of one that others start."""

from pathlib import Path
from typing import Any

from khod.dataclass import dataclass
from khod.errors import ConfigError, UsageError
from khod.files import Fragment, read_toml, require_type, unknown_key_error
from khod.vm.arguments import check_command

DIRECTORY = "etc/kho/vm.d"
KEPT_DIRECTORY = "etc/kho/producers.d"
KEPT_KEYS = ("qmp", "keep", "restart", "timeout", "after", "before", "devices", "agent")
KEYS = ("command", "timeout", "stop_timeout", "after", "before", "devices", "up", "down", "agent")
MAX_SECONDS = 3600.0


@dataclass(frozen=True)
class VmSettings:
    """One virtual machine. `size` is the guest's RAM in bytes, as -m in `command` says.

    With `qmp`, the socket of its monitor, others start it, and `restart` is what starts it again: the name of a unit
    alone, or a command.

    `up` is a command that runs before each start of QEMU, as to make a tap device, and `down` one that runs when QEMU
    has ended and khod-vm is about to. `agent` is the socket of the guest agent, which is asked to set the guest's clock
    after the jump.
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
    down: tuple[str, ...] = ()
    agent: str = ""
    qmp: str = ""
    restart: tuple[str, ...] = ()

    @property
    def given(self) -> tuple[str, ...]:
        """What the file says of how QEMU is started."""
        return self.command or self.restart


def load_settings(name: str, root: Path = Path("/")) -> VmSettings:
    """Read the file of a virtual machine; ConfigError with file and line for what is wrong with it."""
    kept = root / KEPT_DIRECTORY / f"{name}.toml"
    if kept.exists():
        return parse_kept(Fragment(kept, *read_toml(kept, "virtual machine")))
    return read_own(root / DIRECTORY / kept.name)


def read_own(path: Path) -> VmSettings:
    """Return the settings of a virtual machine that khod-vm starts, from its file in vm.d; raises as above."""
    fragment = Fragment(path, *read_toml(path, "virtual machine"))
    _refuse_unknown(fragment, KEYS)
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
        name=path.stem,
        command=command,
        size=size,
        stop_timeout=_take_seconds(fragment, "stop_timeout", VmSettings.stop_timeout),
        up=_take(fragment, "up", tuple[str, ...], ()),
        down=_take(fragment, "down", tuple[str, ...], ()),
        **_take_common(fragment),
    )


def parse_kept(fragment: Fragment) -> VmSettings:
    """Return the settings of a virtual machine that others start, from its file in producers.d; raises as above."""
    path, values = fragment.path, fragment.values
    own = path.parents[1] / Path(DIRECTORY).name / path.name
    if own.exists():
        raise ConfigError("Two files describe one machine", where=str(path), remedy=f"Remove it, or {own}.")
    if values.get("keep") is not True:
        raise ConfigError(
            "`keep` is not true", where=str(path), remedy="khod pauses this machine, and does not keep it."
        )
    _refuse_unknown(fragment, KEPT_KEYS)
    restart = values.get("restart")
    words = (restart,) if isinstance(restart, str) else _take(fragment, "restart", tuple[str, ...], ())
    if not words or not words[0]:
        raise ConfigError("`restart` is missing", where=str(path), remedy='Name a unit: restart = "NAME.service"')
    if isinstance(restart, str) and not restart.endswith(".service"):
        raise ConfigError(
            f"`restart` is {restart!r}",
            where=fragment.locate_key("restart"),
            remedy='A unit: "NAME.service", or a list.',
        )
    qmp = _take(fragment, "qmp", str, "")
    if not qmp.startswith("/"):
        raise ConfigError(f"`qmp` is {qmp!r}", where=str(path), remedy="Name the path of QEMU's QMP socket.")
    return VmSettings(name=path.stem, command=(), size=0, qmp=qmp, restart=words, **_take_common(fragment))


def _refuse_unknown(fragment: Fragment, known: tuple[str, ...]) -> None:
    if unknown := sorted(fragment.values.keys() - {*known}):
        raise unknown_key_error(fragment.locate_key(unknown[0]), unknown[0], known, "a virtual machine")


def _take_common(fragment: Fragment) -> dict[str, Any]:
    lists = {key: _take(fragment, key, tuple[str, ...], ()) for key in ("after", "before", "devices")}
    timeout = _take_seconds(fragment, "timeout", VmSettings.timeout)
    return {**lists, "timeout": timeout, "agent": _take(fragment, "agent", str, "")}


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
