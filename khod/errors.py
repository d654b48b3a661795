# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod's errors, as types with fields; only `error_sentence` puts them in words.

Each class has an exit code of khoctl. An error that crosses the wire keeps its fields, its exit code, its `cause`
(which says which class it was), and the name of the nearest class in BY_NAME.
"""

import enum
import errno as errno_names
import os
from collections.abc import Sequence
from typing import Any, ClassVar

from khod.text import printable


class Exit(enum.IntEnum):
    """khoctl's exit codes, which do not change: scripts rely on them."""

    done = 0
    failed = 1
    usage = 2
    refused = 3
    unsupported = 4
    unreachable = 5
    not_rolled_back = 6
    degraded = 7
    unwritten = 8


class KhoError(Exception):
    """An error that ends a request.

    `what` is a clause in plain words; `where` is the path, call or key it concerns ("" if there is none); `remedy` is
    what to do next ("" if nothing can be done).
    """

    exit: ClassVar[Exit] = Exit.failed
    cause: str = ""
    """The cause, for programs; "" for a class without one of its own."""

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        super().__init__(what, where, remedy)
        self.what = what
        self.where = where
        self.remedy = remedy

    def __str__(self) -> str:
        return error_sentence(self)


class Failed(KhoError):
    """A step failed, and everything before it was rolled back."""


class UsageError(KhoError):
    """The request itself is wrong: for example an unusable file, or a command line that no kernel accepts."""

    exit = Exit.usage


class ConfigError(KhoError):
    """A configuration file cannot be used; `where` is FILE:LINE.

    `readable` is what the other files of the same directory describe; an undo continues with those.
    """

    exit = Exit.usage
    readable: Sequence[Any] = ()


class Refused(KhoError):
    """A check, a veto or a missing permission stopped the request; nothing is left changed."""

    exit = Exit.refused


class Unsupported(KhoError):
    """This kernel, as it was booted, does not support the request."""

    exit = Exit.unsupported


class Unreachable(KhoError):
    """khod did not answer on its socket."""

    exit = Exit.unreachable


class NotRolledBack(KhoError):
    """A step failed, and something was not rolled back or was held on request."""

    exit = Exit.not_rolled_back


class Degraded(KhoError):
    """The new kernel runs and some state did not arrive."""

    exit = Exit.degraded


class MalformedTree(KhoError):
    """A state tree is not a flattened device tree, or does not follow the KHO layout."""


class RecordError(KhoError):
    """The durable record cannot be read or written."""


class Aborted(Failed):
    """The handover was aborted."""

    cause = "aborted"


class Busy(Refused):
    """Another operation is under way."""

    cause = "busy"


class Denied(Refused):
    """The caller does not have the permission."""

    cause = "denied"


class NoKernelGiven(UsageError):
    """A jump was requested without an image: none is loaded and none was given."""

    cause = "no_kernel"


class AlreadyLoaded(Refused):
    """An image was given, although one is loaded already."""

    cause = "already_loaded"


class CheckFailed(Refused):
    """The check `check` found something that refuses the handover."""

    cause = "check"

    def __init__(self, what: str, *, check: str, remedy: str = "") -> None:
        super().__init__(what, where=f"check {check}", remedy=remedy)
        self.check = check


class ProducerRefused(Refused):
    """A producer refused a verb; `kind` is the one in its file."""

    cause = "veto"

    def __init__(self, what: str, *, kind: str, producer: str, verb: str, remedy: str = "") -> None:
        super().__init__(what, where=f"{kind} {producer}", remedy=remedy)
        self.producer, self.verb = producer, verb


class ProducerTimedOut(ProducerRefused):
    """A producer did not answer a verb within its deadline."""

    cause = "no_answer"


class ProducerGone(ProducerRefused):
    """A producer disconnected or ended after it was sent a verb."""

    cause = "producer_gone"


class DeviceChanged(Refused):
    """A device that the handover depends on was added or removed."""

    cause = "device"


BY_NAME: dict[str, type[KhoError]] = {
    cls.__name__: cls
    for cls in (
        Failed,
        UsageError,
        ConfigError,
        Refused,
        Unsupported,
        Unreachable,
        NotRolledBack,
        Degraded,
        MalformedTree,
        RecordError,
    )
}


def error_name(error: KhoError) -> str:
    """Return the name of an error on the wire: that of its class, or of the nearest base class with a name there."""
    return next((cls.__name__ for cls in type(error).__mro__ if cls.__name__ in BY_NAME), Failed.__name__)


def error_sentence(error: KhoError) -> str:
    """Return a sentence, safe for a terminal: what failed, on which path, and what to do next."""
    where = f" ({error.where})" if error.where else ""
    remedy = f" {error.remedy}" if error.remedy else ""
    return printable(f"{error.what}{where}.{remedy}")


def errno_text(error: OSError) -> str:
    """Return an errno with its uapi name and its meaning: `EINVAL (Invalid argument)`."""
    number = error.errno or 0
    return f"{errno_names.errorcode.get(number, number)} ({os.strerror(number)})"
