# SPDX-License-Identifier: LGPL-2.1-or-later
"""The common part of the producers that a file in /etc/kho/producers.d describes."""

import asyncio
import errno
import re
import traceback
from collections.abc import Awaitable
from typing import Any, TypeVar

from khod.concurrency.bounded import raise_if_cancelling
from khod.dataclass import dataclass
from khod.errors import ConfigError, KhoError, UsageError
from khod.files import Fragment, require_type
from khod.handover.record import ProducerRecord
from khod.producers.barrier import ParticipantVeto, ProducerCall
from khod.producers.order import LEADERS
from khod.producers.output import STDERR
from khod.text import one_line
from khod.wire import VERB_SECONDS

__all__ = ["Configured", "check_name", "one_line", "require_string", "require_strings"]

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@-]{0,63}")

RESERVED = {"systemd": "the service manager", **dict.fromkeys(LEADERS, "khod itself")}
"""Names that no other producer may have, and who has them: LUO's session `systemd` is the service manager's."""

SHORTAGE_ERRNOS = {
    errno.EAGAIN: "khod may start no more processes (TasksMax= of kho-handover.service, kernel.pid_max)",
    errno.EMFILE: "khod has too many files open (LimitNOFILE= of kho-handover.service)",
    errno.ENFILE: "the host has too many files open (sysctl fs.file-max)",
    errno.ENOMEM: "there is no memory left for it",
}
"""What the host or khod lacks if the kernel returns one of these errnos."""

T = TypeVar("T")


@dataclass(frozen=True)
class Configured:
    """The keys that all kinds share, see `khod.producers.barrier.Participant`. `timeout` is in seconds per verb."""

    name: str
    timeout: float = VERB_SECONDS
    after: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    units: tuple[str, ...] = ()
    kind: str = ""

    @property
    def restores_state(self) -> bool:
        return False

    @property
    def is_reachable(self) -> bool:
        return True

    async def carry_out(self, telling: ProducerCall) -> str | None:
        """Carry a verb out; ParticipantVeto or KhoError if that fails. Ends within CUT_SECONDS after a cancellation."""
        return await _veto_on_failure(self._carry_out(telling))

    async def make_way(self, note: str) -> None:
        """Make way for the shutdown; ParticipantVeto if that fails."""
        await _veto_on_failure(self._make_way(note))

    async def _carry_out(self, telling: ProducerCall) -> str | None:
        """Do what `carry_out` promises, and return the answer to show; any error except a KhoError becomes a veto."""
        raise NotImplementedError

    async def _make_way(self, note: str) -> None:
        """Do nothing: by default a producer does not delay the shutdown."""

    async def wait_returned(self) -> None:
        """Return at once: it has no connection, khod tells it where it is."""

    def to_record(self) -> ProducerRecord:
        """Return its record; everything else is in its file."""
        return ProducerRecord(self.name, self.kind)


def check_name(name: str) -> None:
    """Raise UsageError if no producer can have this name."""
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{name[:80]!r} is not a valid name of a producer",
            where="name",
            remedy="Letters, digits, `.`, `_`, `@` and `-`, at most 64, the first one a letter, a digit or `_`.",
        )
    if name in RESERVED:
        raise UsageError(f"The name {name!r} is taken by {RESERVED[name]}", where="name", remedy="Choose another.")


def require_strings(value: Any, fragment: Fragment, key: str, *, some: bool = False) -> list[str]:
    """Return a list of strings, with `some` a list that is not empty; ConfigError names file and line otherwise."""
    where = fragment.locate_key(key)
    words = require_type(value, tuple[str, ...], key, where)
    if some and not words:
        raise ConfigError(f"`{key}` is an empty list", where=where, remedy="Name the command and its arguments.")
    return list(words)


def require_string(value: Any, fragment: Fragment, key: str) -> str:
    """Return a string that is not empty; ConfigError names file and line if it is anything else."""
    where = fragment.locate_key(key)
    text: str = require_type(value, str, key, where)
    if not text or "\0" in text:
        raise ConfigError(f"`{key}` is {text!r}", where=where, remedy="It must be a text of one character or more.")
    return text


def describe_error(error: Exception) -> str:
    """Return in plain words what an exception means that is not khod's own."""
    if isinstance(error, OSError):
        said = SHORTAGE_ERRNOS.get(error.errno or 0) or error.strerror or str(error)
        return one_line(f"{said} ({error.filename})" if error.filename else said)
    return one_line(str(error)) or type(error).__name__


async def _veto_on_failure(work: Awaitable[T]) -> T:
    """Return what `work` returns; an error that is not a KhoError becomes a ParticipantVeto."""
    try:
        return await work
    except (ParticipantVeto, KhoError):
        raise
    except asyncio.CancelledError as error:
        raise_if_cancelling(error)
        raise ParticipantVeto("it was cancelled from within") from None
    except Exception as error:
        if not isinstance(error, OSError):
            STDERR.queue_bytes("".join(traceback.format_exception(error)).encode())
        raise ParticipantVeto(f"it could not be carried out: {describe_error(error)}") from error
