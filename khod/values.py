# SPDX-License-Identifier: LGPL-2.1-or-later
"""The JSON of the model, on the Varlink interface and in files; standard library only.

khoctl speaks Varlink through `khod.client.handover` and this module only: importing asyncio and a Varlink library would
cost `khoctl status` more time than typer does (`make bench` limits it to 1.5 times).
"""

import dataclasses
import enum
import functools
import types
from collections.abc import Set
from typing import Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


class _AnyField(frozenset[str]):
    """Contains every name."""

    def __contains__(self, name: object) -> bool:
        return True


ANY_FIELD: Set[str] = _AnyField()
"""For `may_lack`: every field that has a default may be missing, as in what an earlier khod wrote."""


class DecodeError(ValueError):
    """A value has not the shape that the model has at this key, for example `producers[1].timeout`."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"`{key}` {problem}" if key else f"it {problem}")


class UnknownField(DecodeError):
    """An object has a field with a value that the model does not have: a newer khod wrote it."""

    def __init__(self, key: str) -> None:
        super().__init__(key, "is not known to this version")


class _Tolerance(NamedTuple):
    """The fields that may be missing, and whether those that the model does not have may be there."""

    may_lack: Set[str]
    may_exceed: bool


def decode_value(
    wanted: type[T], value: Any, key: str = "", *, may_lack: Set[str] = frozenset(), may_exceed: bool = True
) -> T:
    """Convert what a JSON or TOML parser returned into a dataclass, enum, list, tuple or plain value of the model.

    Enums are given by name, a float may be given without a point, and a boolean is not a number. Fields in `may_lack`
    get their default if they are missing. Fields that the model does not have are left out; without `may_exceed` only
    where they say nothing (null, 0, false or empty), and else raise UnknownField. Raises DecodeError, which names the
    key below `key`, if the value has another shape.
    """
    made: T = _decode_value(wanted, value, key, _Tolerance(may_lack, may_exceed))
    return made


def _decode_value(wanted: Any, value: Any, key: str, tolerance: _Tolerance) -> Any:
    inner, origin = get_args(wanted), get_origin(wanted)
    if origin in (types.UnionType, Union):
        return None if value is None else _decode_value(inner[0], value, key, tolerance)
    if origin in (list, tuple):
        if not isinstance(value, list):
            raise DecodeError(key, f"is {value!r}, not a list")
        return origin(_decode_value(inner[0], item, f"{key}[{index}]", tolerance) for index, item in enumerate(value))
    if dataclasses.is_dataclass(wanted) and isinstance(wanted, type):
        if not isinstance(value, dict):
            raise DecodeError(key, f"is {value!r}, not an object")
        return wanted(**_decode_fields(wanted, value, f"{key}." if key else "", tolerance))
    if issubclass(wanted, enum.Enum):
        if not isinstance(value, str) or value not in wanted.__members__:
            raise DecodeError(key, f"is {value!r}, which {wanted.__name__} does not have")
        return wanted[value]
    allowed = (float, int) if wanted is float else wanted
    if not isinstance(value, allowed) or (isinstance(value, bool) and wanted is not bool):
        raise DecodeError(key, f"is {value!r}, not of type {wanted.__name__}")
    return value


def _decode_fields(kind: Any, values: dict[str, Any], prefix: str, tolerance: _Tolerance) -> dict[str, Any]:
    fields = {}
    for name, hint in _field_types(kind):
        if name in values:
            fields[name] = _decode_value(hint, values[name], prefix + name, tolerance)
        elif name not in tolerance.may_lack or name in _required_names(kind):
            raise DecodeError(prefix + name, "is missing")
    if not tolerance.may_exceed and (unknown := [name for name in values if name not in fields and values[name]]):
        raise UnknownField(prefix + unknown[0])
    return fields


@functools.cache
def _field_types(kind: type) -> tuple[tuple[str, Any], ...]:
    return tuple(get_type_hints(kind).items())


@functools.cache
def _required_names(kind: Any) -> frozenset[str]:
    """Return the fields without a default, which no message may lack."""
    missing = dataclasses.MISSING
    return frozenset(
        field.name
        for field in dataclasses.fields(kind)
        if field.init and field.default is missing and field.default_factory is missing
    )


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
