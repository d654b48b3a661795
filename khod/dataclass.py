# SPDX-License-Identifier: LGPL-2.1-or-later
"""`@dataclass` as the standard library has it, in a tenth of the time.

The standard library compiles six methods for each class, half a millisecond natively: for khod's classes together that
was a third of its start, and khod starts while producers wait for their state. Here one method is compiled for a class,
`__init__`, and not before the third object is made: most classes have fewer while khod starts. The others are the same
functions for all classes. A class that inherits from one of these is made here too.
"""

import dataclasses
import threading
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

__all__ = ["dataclass"]

T = TypeVar("T", bound=type[Any])
FIELDS = "__dataclass_fields__"
_LOCK = threading.RLock()
FEW_OBJECTS = 2
"""The objects of a class that are filled field by field: that takes a tenth of the time of compiling `__init__`."""


def _make_init(cls: type[Any]) -> Callable[..., None]:
    """Return the `__init__` that the standard library would make for the fields of this class."""
    names: dict[str, Any] = {"_set": object.__setattr__, "_MISSING": dataclasses.MISSING}
    parameters = ["self"]
    keywords: list[str] = []
    body: list[str] = []
    for field in dataclasses.fields(cls):
        parameter = value = field.name
        if field.default_factory is not dataclasses.MISSING:
            names[f"_new_{field.name}"] = field.default_factory
            parameter = f"{field.name}=_MISSING"
            value = f"_new_{field.name}() if {field.name} is _MISSING else {field.name}"
        elif field.default is not dataclasses.MISSING:
            names[f"_default_{field.name}"] = field.default
            parameter = f"{field.name}=_default_{field.name}"
        (keywords if field.kw_only else parameters).append(parameter)
        body.append(f"_set(self, {field.name!r}, {value})")
    if hasattr(cls, "__post_init__"):
        body.append("self.__post_init__()")
    if keywords:
        parameters += ["*", *keywords]
    exec(f"def __init__({', '.join(parameters)}):\n {'; '.join(body) or 'pass'}", names)  # noqa: S102 - of names of fields
    made: Callable[..., None] = names["__init__"]
    return made


def _make_init_later(cls: type[Any]) -> Callable[..., None]:
    """Return an `__init__` that makes the one of this class when more than FEW_OBJECTS are made, or a wrong one is."""
    count = 0

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - it is one
        nonlocal count
        count += 1
        if count <= FEW_OBJECTS and _fill_fields(self, cls, args, kwargs):
            return
        cls.__init__ = made = _make_init(cls)
        made(self, *args, **kwargs)  # raises TypeError, in Python's words, where the arguments do not fit

    return __init__


def _fill_fields(made: Any, cls: type[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Set the fields of an object; return False where the arguments do not fit."""
    fields = dataclasses.fields(cls)
    names = [field.name for field in fields if not field.kw_only]
    given = dict(zip(names, args, strict=False))
    if len(args) > len(names) or given.keys() & kwargs.keys():
        return False
    given |= kwargs
    for field in fields:
        if field.name in given:
            value = given.pop(field.name)
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        elif (value := field.default) is dataclasses.MISSING:
            return False
        object.__setattr__(made, field.name, value)
    if given:
        return False
    if hasattr(cls, "__post_init__"):
        made.__post_init__()
    return True


@cache
def _compared_names(cls: type[Any]) -> tuple[str, ...]:
    return tuple([field.name for field in dataclasses.fields(cls) if field.compare])


class _Shared:
    """The methods that are the same for all."""

    def __eq__(self, other: object) -> bool:
        return _values(self) == _values(other) if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash(_values(self))

    def __repr__(self) -> str:
        shown = [f"{one.name}={getattr(self, one.name)!r}" for one in dataclasses.fields(cast("Any", self)) if one.repr]
        return f"{type(self).__qualname__}({', '.join(shown)})"

    def __setattr__(self, name: str, value: object) -> None:
        raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")

    def __delattr__(self, name: str) -> None:
        raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")


def _values(one: Any) -> tuple[Any, ...]:
    cls: Any = type(one)
    return tuple([getattr(one, name) for name in _compared_names(cls)])


class _LaterFields:
    """The fields of a class, which the standard library finds when they are first asked for."""

    def __init__(self, cls: type[Any], *, kw_only: bool) -> None:
        self._cls = cls
        self._make = dataclasses.dataclass(init=False, repr=False, eq=False, kw_only=kw_only)

    def __get__(self, _instance: object, _owner: type[Any]) -> dict[str, dataclasses.Field[Any]]:
        with _LOCK:  # twice would lose what it takes off the class: the factories of defaults
            if vars(self._cls)[FIELDS] is self:
                self._make(self._cls)
        found: dict[str, dataclasses.Field[Any]] = vars(self._cls)[FIELDS]
        return found


def _make(cls: T, *, frozen: bool = False, eq: bool = True, kw_only: bool = False) -> T:
    methods: dict[str, Any] = {"__init__": _make_init_later(cls), "__repr__": _Shared.__repr__}
    if eq:
        methods |= {"__eq__": _Shared.__eq__, "__hash__": _Shared.__hash__ if frozen else None}
    if frozen:
        methods |= {"__setattr__": _Shared.__setattr__, "__delattr__": _Shared.__delattr__}
    for name, method in methods.items():
        setattr(cls, name, method)
    setattr(cls, FIELDS, _LaterFields(cls, kw_only=kw_only))
    return cls


if TYPE_CHECKING:
    from dataclasses import dataclass
else:

    def dataclass(cls: T | None = None, /, **options: bool) -> T | Callable[[T], T]:
        """Make a dataclass; `dataclasses.fields`, `replace` and `asdict` work with it."""
        return partial(_make, **options) if cls is None else _make(cls, **options)
