# SPDX-License-Identifier: LGPL-2.1-or-later
"""The Varlink interfaces io.kho.Handover and io.kho.Producer, described by the model's own dataclasses."""

import enum
import types
from collections.abc import AsyncIterator
from typing import Any, TypedDict

from asyncvarlink import FileDescriptor, TypedVarlinkErrorReply, VarlinkInterface, varlinkmethod

from khod import model
from khod.errors import BY_NAME, KhoError, error_name
from khod.frozen import dataclass
from khod.history.model import AttemptRecord, AttemptSummary
from khod.region import Region
from khod.wire import INTERFACE, PRODUCER


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


class TreeReply(TypedDict):
    """A state tree as passed file descriptors: the root first, named "", then each producer's blob."""

    names: list[str]
    blobs: list[FileDescriptor]


class HistoryReply(TypedDict):
    """Attempts, newest first. `more` says that there are older ones, `note` what is wrong with the history, or "".

    An attempt with `damage` has a damaged row.
    """

    attempts: list[AttemptSummary]
    more: bool
    note: str


@dataclass(frozen=True)
class NextKernel:
    """The next kernel: descriptors as indexes of those passed along, and names for people.

    Several `initrds` follow one another in memory, in this order. Without `cmdline` the image's own is used (a unified
    kernel image has one), else the running kernel's, without the words that must not be reused; `reuse_cmdline`
    requires the running kernel's. `remove` removes words by parameter (`console`) or whole (`console=ttyS0`), `append`
    adds words.
    """

    image: FileDescriptor | None = None
    image_name: str | None = None
    initrds: list[FileDescriptor] | None = None
    initrd_names: list[str] | None = None
    cmdline: str | None = None
    reuse_cmdline: bool | None = None
    append: str | None = None
    remove: list[str] | None = None


class Handover(VarlinkInterface, name=INTERFACE):
    """Takes this host from one kernel to the next. Every user may read; root and one group may change.

    Every error has a sentence on what failed (`what`), the path, call or key it concerns (`where`) and what to do next
    (`remedy`).
    """

    errors = tuple(ERRORS.values())

    @varlinkmethod(return_parameter="status")
    async def Status(self) -> model.Status:
        """Return the current state; never waits for the kernel longer than a second."""
        raise NotImplementedError

    @varlinkmethod(return_parameter="event", delay_generator=False)
    async def Monitor(self) -> AsyncIterator[model.Event]:
        """Stream every change, beginning with the current state; call it with `more`."""
        raise NotImplementedError
        yield

    @varlinkmethod(return_parameter="checks")
    async def Check(self, *, kernel: NextKernel | None = None, now: bool | None = None) -> list[model.Check]:
        """Run the preflight checks and touch nothing; with an image also those of the next kernel.

        With `now` they are for a jump at once, before which nothing is stopped; otherwise for an orderly one.
        """
        raise NotImplementedError

    @varlinkmethod(return_parameter="plan")
    async def Plan(
        self,
        *,
        kernel: NextKernel | None = None,
        now: bool | None = None,
        load_only: bool | None = None,
    ) -> model.Plan:
        """Return what Kexec with these parameters would do, step by step, and touch nothing."""
        raise NotImplementedError

    @varlinkmethod(return_parameter="status")
    async def Activate(self) -> model.Status:
        """Bring producers and kernel to the phase `active`; a failure is rolled back."""
        raise NotImplementedError

    @varlinkmethod(return_parameter="status")
    async def Abort(self, *, force: bool | None = None) -> model.Status:
        """Roll everything back; with `force` also what khod did not do."""
        raise NotImplementedError

    @varlinkmethod(return_parameter="status")
    async def Kexec(
        self,
        *,
        kernel: NextKernel | None = None,
        now: bool | None = None,
        load_only: bool | None = None,
        hold: bool | None = None,
    ) -> model.Status:
        """Do the remaining steps of the handover. The reply says that the jump is under way; with `now` none comes."""
        raise NotImplementedError

    @varlinkmethod(return_parameter="producers")
    async def Producers(self) -> list[model.Producer]:
        """List every producer that is configured, connected or awaited, in the order in which they are called."""
        raise NotImplementedError

    @varlinkmethod(return_parameter="producers")
    async def Rehearse(self, *, name: str) -> list[model.Producer]:
        """Send prepare, freeze, thaw and cancel to one producer; the kernel is not touched."""
        raise NotImplementedError

    @varlinkmethod
    async def Retry(self, *, name: str) -> None:
        """Tell a producer again to take back what it left before the jump; Refused if it does not."""
        raise NotImplementedError

    @varlinkmethod
    async def Forget(self, *, name: str) -> None:
        """Free what a producer left before the jump and will not take back."""
        raise NotImplementedError

    @varlinkmethod
    async def Tree(self, *, side: str) -> TreeReply:
        """Return a state tree: `out` (would leave), `in` (arrived), `snapshot` (left last), or a snapshot by its id."""
        raise NotImplementedError

    @varlinkmethod(return_parameter="snapshots")
    async def Snapshots(self) -> list[model.Snapshot]:
        """List the snapshots, newest first, and then, with an empty `run`, entries that are not snapshots."""
        raise NotImplementedError

    @varlinkmethod(return_parameter="regions")
    async def Scratch(self) -> list[Region]:
        """Return the scratch regions, in which the next kernel starts and which may hold no state."""
        raise NotImplementedError

    @varlinkmethod
    async def History(self, *, before: str | None = None, limit: int | None = None) -> HistoryReply:
        """List past attempts at a handover, at most `limit`: the newest, or those older than the run `before`.

        In what this and the next two methods return, only root and the operators' group find who asked, command lines
        and lines of the kernel's log.
        """
        raise NotImplementedError

    @varlinkmethod(return_parameter="attempt")
    async def Attempt(self, *, run: str | None = None) -> AttemptRecord:
        """Return all that is known of one attempt: the last, or the one whose run begins with `run`."""
        raise NotImplementedError

    @varlinkmethod(return_parameter="attempts")
    async def Chain(self) -> list[AttemptSummary]:
        """List the handovers since the last cold boot that led to this kernel, newest first."""
        raise NotImplementedError

    @varlinkmethod(return_parameter="runs")
    async def Acknowledge(self, *, image: str) -> list[str]:
        """Let a barred image be tried again, and return the runs that no longer count against it.

        `image` is such a run, or begins a digest of the image.
        """
        raise NotImplementedError


class Word(enum.Enum):
    """A producer's answer to a command; not_yet means that it takes longer, within the same deadline."""

    ready = "ready"
    not_yet = "not_yet"
    veto = "veto"


class ShownKind(enum.Enum):
    """What a producer shows itself as; khod treats all of them alike."""

    varlink = "varlink"
    vm = "vm"


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
    ) -> Command:
        """Answer the command `serial` and wait for the next; not_yet is answered at once with the command in force.

        `progress` is from 0 to 1. With prepare and freeze, `fds` are preserved under `names` and `tokens` in this
        producer's own LUO session.
        """
        raise NotImplementedError
