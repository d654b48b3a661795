# SPDX-License-Identifier: LGPL-2.1-or-later
"""The file of the FleetLock client, /etc/kho/fleetlock.toml, and the name under which the server knows this host."""

import hashlib
import hmac
import re
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from khod.dataclass import dataclass
from khod.errors import ConfigError, errno_text
from khod.files import Fragment, read_toml, require_type, unknown_key_error
from khod.fleetlock import FILE

MACHINE_ID = "etc/machine-id"
ZINCATI_APP_ID = "de35106b6ec24688b63afddaa156679b"
KEEP_AFTER = ("degraded", "cold_boot")
"""Outcomes of a handover after which the lock may be kept."""
GROUP = re.compile(r"[A-Za-z0-9.-]+")
"""As Zincati has it."""
ID128 = re.compile(r"[0-9a-fA-F]{32}")
MAX_SECONDS = 86400.0
MAX_ID = 256
"""Characters of a node's name."""


@dataclass(frozen=True)
class FleetLockSettings:
    """The server, and how it is asked; etc/kho/fleetlock.toml.sample describes each key. Times are in seconds."""

    url: str
    group: str = "default"
    id: str = ""
    app_id: str = ZINCATI_APP_ID
    ca: str = ""
    certificate: str = ""
    key: str = ""
    timeout: float = 5.0
    deadline: float = 30.0
    backoff: float = 1.0
    backoff_max: float = 30.0
    keep_after: tuple[str, ...] = ()


def load_settings(root: Path = Path("/")) -> FleetLockSettings:
    """Read the file; ConfigError with file and line for what is wrong with it."""
    return read_settings(root / FILE)


def read_settings(path: Path) -> FleetLockSettings:
    """Read it at any other place; raises as above."""
    fragment = Fragment(path, *read_toml(path, "FleetLock client's file"))
    types: dict[str, Any] = FleetLockSettings.__annotations__
    if unknown := sorted(fragment.values.keys() - types.keys()):
        raise unknown_key_error(fragment.locate_key(unknown[0]), unknown[0], [*types], "the FleetLock client")
    if "url" not in fragment.values:
        raise ConfigError("`url` is missing", where=str(path), remedy='Name the server: url = "https://lock.example"')
    found = {
        key: require_type(value, types[key], key, fragment.locate_key(key)) for key, value in fragment.values.items()
    }
    settings = FleetLockSettings(**found)
    _check_url(settings, fragment)
    _check_identity(settings, fragment)
    for key in ("timeout", "deadline", "backoff", "backoff_max"):
        if not 0 < getattr(settings, key) <= MAX_SECONDS:
            remedy = f"It must be a positive number of seconds, at most {MAX_SECONDS:g}."
            raise _wrong_value(settings, fragment, key, remedy)
    if not set(settings.keep_after) <= set(KEEP_AFTER):
        raise _wrong_value(settings, fragment, "keep_after", f"It must be a list of these: {', '.join(KEEP_AFTER)}.")
    return settings


def node_id(settings: FleetLockSettings, root: Path = Path("/")) -> str:
    """Return the name under which the server knows this host: `id`, or else the machine id as Zincati makes it.

    It is what sd_id128_get_machine_app_specific(3) returns: HMAC-SHA256 of the app's id, with the machine id as the
    key, cut to 128 bits and marked as a UUID of version 4.
    """
    if settings.id:
        return settings.id
    path = root / MACHINE_ID
    try:
        machine = path.read_text().strip()
    except (OSError, ValueError) as error:
        why = errno_text(error) if isinstance(error, OSError) else "it is not a text"
        raise _no_machine_id(path, why) from None
    if not ID128.fullmatch(machine):
        raise _no_machine_id(path, "it has no machine id yet" if len(machine) < MAX_ID else "it is too long")
    made = hmac.digest(bytes.fromhex(machine), bytes.fromhex(settings.app_id), hashlib.sha256)
    return uuid.UUID(bytes=made[:16], version=4).hex


def _no_machine_id(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"The machine id cannot be read: {why}",
        where=str(path),
        remedy=f"Make it with systemd-machine-id-setup, or set `id` in /{FILE}.",
    )


def _check_url(settings: FleetLockSettings, fragment: Fragment) -> None:
    """Raise ConfigError unless `url` is one of a server, and the files for TLS go with it."""
    try:
        parts = urlsplit(settings.url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is none
        usable = False
    plain = settings.url.isascii() and settings.url.isprintable() and " " not in settings.url
    if not usable or not plain or parts.username is not None or parts.query or parts.fragment:
        remedy = "It must be https://HOST, with a port and a path if the server has them, and without a password."
        raise _wrong_value(settings, fragment, "url", remedy)
    for key in ("ca", "certificate", "key"):
        value = getattr(settings, key)
        if value and parts.scheme == "http":
            raise _wrong_value(settings, fragment, key, "A server without TLS has none: use https, or remove the key.")
        if value and not value.startswith("/"):
            raise _wrong_value(settings, fragment, key, "It must be an absolute path.")
    if settings.key and not settings.certificate:
        raise _wrong_value(settings, fragment, "key", "A key has a `certificate`, which is missing.")


def _check_identity(settings: FleetLockSettings, fragment: Fragment) -> None:
    if not GROUP.fullmatch(settings.group):
        raise _wrong_value(settings, fragment, "group", "Letters, digits, `.` and `-`, one or more.")
    if not ID128.fullmatch(settings.app_id):
        raise _wrong_value(settings, fragment, "app_id", "It must have 32 hexadecimal digits.")
    if "id" in fragment.values and not (settings.id.isprintable() and 0 < len(settings.id) <= MAX_ID):
        raise _wrong_value(settings, fragment, "id", f"A text of 1 to {MAX_ID} characters that can be printed.")


def _wrong_value(settings: FleetLockSettings, fragment: Fragment, key: str, remedy: str) -> ConfigError:
    return ConfigError(f"`{key}` is {getattr(settings, key)!r}", where=fragment.locate_key(key), remedy=remedy)
