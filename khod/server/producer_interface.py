# SPDX-License-Identifier: LGPL-2.1-or-later
"""The Varlink interface io.kho.Producer."""

import enum
from typing import TypedDict

from asyncvarlink import FileDescriptor, VarlinkInterface, varlinkmethod

from khod.server.error_replies import ERRORS
from khod.wire import PRODUCER


class ShownKind(enum.Enum):
    """What a producer shows itself as; khod treats all of them alike."""

    varlink = "varlink"
    vm = "vm"


class Word(enum.Enum):
    """A producer's answer to a command; not_yet means that it takes longer, within the same deadline."""

    ready = "ready"
    not_yet = "not_yet"
    veto = "veto"


class Registered(TypedDict):
    """The result of a registration.

    `told` is the last verb that khod assumes to hold ("" for none); a producer that has done more undoes the rest
    itself.
    """

    version: int
    run: str
    told: str


class Command(TypedDict):
    """One verb: prepare, freeze, thaw, cancel, restore or finish. `timeout` is in seconds.

    With restore come the preserved files: `names`, `tokens` and `fds` in the same order.
    """

    serial: int
    verb: str
    run: str
    timeout: float
    names: list[str]
    tokens: list[int]
    fds: list[FileDescriptor]


class Producer(VarlinkInterface, name=PRODUCER):
    """How a holder of state takes part. One connection is one producer, for as long as it lives.

    Register, then call Next in a loop: each call has the result of the command before, and is answered with the next
    command, which may be hours later. The end of the connection is a veto. A producer that loses khod connects again
    and does what `told` says. An undo may be sent for something that was never done, and must be harmless then.
    """

    errors = tuple(ERRORS.values())

    @varlinkmethod
    async def Register(
        self,
        *,
        name: str,
        version: int,
        timeout: float | None = None,
        after: list[str] | None = None,
        before: list[str] | None = None,
        devices: list[str] | None = None,
        kind: ShownKind | None = None,
    ) -> Registered:
        """Become the producer `name`. `version` is the newest of this interface the caller knows; 1 is the only one.

        `kind` is shown, in the place of varlink, and has no other effect.
        """
        raise NotImplementedError

    @varlinkmethod
    async def Next(
        self,
        *,
        serial: int | None = None,
        answer: Word | None = None,
        reason: str | None = None,
        progress: float | None = None,
        names: list[str] | None = None,
        tokens: list[int] | None = None,
        fds: list[FileDescriptor] | None = None,
        stopped: float | None = None,
    ) -> Command:
        """Answer the command `serial` and wait for the next; not_yet is answered at once with the command in force.

        `progress` is from 0 to 1. With prepare and freeze, `fds` are preserved under `names` and `tokens` in this
        producer's own LUO session. With finish, `stopped` is how many seconds the work stood still by a clock of its
        own; it is shown beside what khod measures.
        """
        raise NotImplementedError
