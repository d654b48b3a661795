# SPDX-License-Identifier: LGPL-2.1-or-later
"""What can go wrong, as types that carry fields; `error_sentence` is the one place that words them.

Each class has the exit code of khoctl it ends in. An error that crosses the wire keeps the name of the nearest class in
BY_NAME, its fields, its exit code, and its cause: which of the classes below that it was.
"""

import enum
import errno as errno_names
import os
from collections.abc import Sequence
from typing import Any, ClassVar

from khod.text import printable


class Exit(enum.IntEnum):
    """khoctl's exit codes, a promise to scripts."""

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
    """Something that ends a request.

    `what` is a clause in plain words, `where` the path, call or key it is about ("" where there is
    none), `remedy` what to do next ("" where nothing can be done).
    """

    exit: ClassVar[Exit] = Exit.failed
    cause: str = ""
    """What a program may look at; "" where there is no class of its own for it."""

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        super().__init__(what, where, remedy)
        self.what = what
        self.where = where
        self.remedy = remedy

    def __str__(self) -> str:
        return error_sentence(self)


class Failed(KhoError):
    """A step failed and everything before it was put back."""


class UsageError(KhoError):
    """The request itself is wrong: an unusable file, a command line no kernel takes."""

    exit = Exit.usage


class ConfigError(KhoError):
    """A configuration file cannot be used; `where` is FILE:LINE.

    `readable` is what the other files of the same directory describe: an undo goes on with those.
    """

    exit = Exit.usage
    readable: Sequence[Any] = ()


class Refused(KhoError):
    """A check, a veto or a missing permission; nothing is left changed."""

    exit = Exit.refused


class Unsupported(KhoError):
    """This kernel, as it was booted, cannot do it."""

    exit = Exit.unsupported


class Unreachable(KhoError):
    """khod did not answer on its socket."""

    exit = Exit.unreachable


class NotRolledBack(KhoError):
    """A step failed and something could not be put back, or was held on request."""

    exit = Exit.not_rolled_back


class Degraded(KhoError):
    """The new kernel runs and some state did not arrive."""

    exit = Exit.degraded


class MalformedTree(KhoError):
    """A state tree that is no flattened device tree, or breaks the KHO layout."""


class RecordError(KhoError):
    """The durable record cannot be read or written."""


class Aborted(Failed):
    """Somebody ended the handover."""

    cause = "aborted"


class Busy(Refused):
    """Another operation is under way."""

    cause = "busy"


class Denied(Refused):
    """The caller has not the right to do that."""

    cause = "denied"


class NoKernelGiven(UsageError):
    """A jump without an image: none is loaded and none was given."""

    cause = "no_kernel"


class AlreadyLoaded(Refused):
    """An image was given, and one is loaded."""

    cause = "already_loaded"


class CheckFailed(Refused):
    """The check `check` found something that refuses the handover."""

    cause = "check"

    def __init__(self, what: str, *, check: str, remedy: str = "") -> None:
        super().__init__(what, where=f"check {check}", remedy=remedy)
        self.check = check


class ProducerRefused(Refused):
    """A producer said no to a verb; `kind` as in its file."""

    cause = "veto"

    def __init__(self, what: str, *, kind: str, producer: str, verb: str, remedy: str = "") -> None:
        super().__init__(what, where=f"{kind} {producer}", remedy=remedy)
        self.producer, self.verb = producer, verb


class ProducerTimedOut(ProducerRefused):
    """A producer did not answer a verb within its deadline."""

    cause = "no_answer"


class ProducerGone(ProducerRefused):
    """A producer went away after it was sent a verb."""

    cause = "producer_gone"


class DeviceChanged(Refused):
    """A device came or went on which the handover depends."""

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
    """Give the name an error has on the wire: its class's, or the nearest one's that has a name there."""
    return next((cls.__name__ for cls in type(error).__mro__ if cls.__name__ in BY_NAME), Failed.__name__)


def error_sentence(error: KhoError) -> str:
    """Say what failed, on which path, what to do next; fit for a terminal, whatever was read from a file."""
    where = f" ({error.where})" if error.where else ""
    remedy = f" {error.remedy}" if error.remedy else ""
    return printable(f"{error.what}{where}.{remedy}")


def errno_text(error: OSError) -> str:
    """Name an errno by its uapi spelling and its meaning: `EINVAL (Invalid argument)`."""
    number = error.errno or 0
    return f"{errno_names.errorcode.get(number, number)} ({os.strerror(number)})"
