# SPDX-License-Identifier: LGPL-2.1-or-later
"""The names and the JSON of the Varlink interface, for both ends; standard library only.

khoctl speaks Varlink through `khod.client.handover` and this module only: importing asyncio and a Varlink library would
cost `khoctl status` more time than typer does (`make bench` limits it to 1.5 times).
"""

import dataclasses
import enum
import functools
import types
from collections.abc import Set
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from khod.errors import BY_NAME, KhoError

T = TypeVar("T")
SOCKET = "/run/khod/io.kho.Handover"
INTERFACE = "io.kho.Handover"
PRODUCER = "io.kho.Producer"
SERVICE = "org.varlink.service"
PRODUCER_VERSION = 1


def decode_value(wanted: type[T], value: Any, *, may_lack: Set[str] = frozenset()) -> T:
    """Convert JSON into a dataclass, enum, list, tuple or plain value of the model.

    Enums are given by name. Fields in `may_lack` get their default if they are missing. Raises TypeError or KeyError if
    the JSON has another shape.
    """
    made: T = _decode_value(wanted, value, may_lack)
    return made


def _decode_value(wanted: Any, value: Any, may_lack: Set[str]) -> Any:
    inner = get_args(wanted)
    if get_origin(wanted) in (types.UnionType, Union):
        return None if value is None else _decode_value(inner[0], value, may_lack)
    if get_origin(wanted) in (list, tuple):
        if not isinstance(value, list):
            raise TypeError(f"{value!r} is not a list")
        return get_origin(wanted)(_decode_value(inner[0], item, may_lack) for item in value)
    if dataclasses.is_dataclass(wanted) and isinstance(wanted, type):
        if not isinstance(value, dict):
            raise TypeError(f"{value!r} is not an object")
        absent = may_lack - value.keys()
        hints = ((name, hint) for name, hint in _field_types(wanted) if name not in absent)
        return wanted(**{name: _decode_value(hint, value[name], may_lack) for name, hint in hints})
    if issubclass(wanted, enum.Enum):
        return wanted[value]
    allowed = (float, int) if wanted is float else wanted
    if not isinstance(value, allowed) or (isinstance(value, bool) and wanted is not bool):
        raise TypeError(f"{value!r} is not of type {wanted.__name__}")
    return value


@functools.cache
def _field_types(kind: type) -> tuple[tuple[str, Any], ...]:
    return tuple(get_type_hints(kind).items())


@functools.cache
def _field_names(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))


def encode_value(value: Any) -> Any:
    """Convert a value of the model for json.dumps, as `default=encode_value`."""
    if isinstance(value, enum.Enum):
        return value.name
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: getattr(value, name) for name in _field_names(type(value))}
    raise TypeError(type(value).__name__)


def error_by_name(name: str, parameters: dict[str, Any]) -> KhoError:
    """Return the error with this name on the wire, or a KhoError that quotes the name if it is not one of ours."""
    prefix, _, short = name.rpartition(".")
    if prefix != INTERFACE or short not in BY_NAME:
        return KhoError(f"khod answered {name} {parameters or ''}".strip())
    fields = {key: str(parameters.get(key, "")) for key in ("what", "where", "remedy")}
    error = BY_NAME[short](fields["what"], where=fields["where"], remedy=fields["remedy"])
    error.cause = str(parameters.get("cause") or "")
    return error
