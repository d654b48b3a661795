# SPDX-License-Identifier: LGPL-2.1-or-later
"""The errors of the Varlink interfaces: each class of khod.errors is one."""

import types
from typing import Any

from asyncvarlink import TypedVarlinkErrorReply

from khod.errors import BY_NAME, KhoError, error_name
from khod.wire import INTERFACE


class _Fields:
    """The fields of every error; see khod.errors."""

    what: str
    where: str
    remedy: str
    cause: str | None


def _error_reply(cls: type[KhoError]) -> type[TypedVarlinkErrorReply]:
    """Make the Varlink error for one of khod's classes; the library requires a class for each."""
    namespace: dict[str, Any] = {"Parameters": _Fields, "__doc__": cls.__doc__, "__annotations__": {}}
    options = {"name": f"{INTERFACE}.{cls.__name__}", "paramprefix": ""}
    return types.new_class(cls.__name__, (TypedVarlinkErrorReply,), options, lambda body: body.update(namespace))


ERRORS = {name: _error_reply(cls) for name, cls in BY_NAME.items()}


def to_wire(error: KhoError) -> TypedVarlinkErrorReply:
    """Return the Varlink error for one of khod's errors."""
    reply = ERRORS[error_name(error)]
    return reply(what=error.what, where=error.where, remedy=error.remedy, cause=error.cause or None)
