# SPDX-License-Identifier: LGPL-2.1-or-later
"""The wire: the Varlink interfaces io.kho.Handover and io.kho.Producer, described by the model's own dataclasses."""

import enum
import types
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, TypedDict

from asyncvarlink import FileDescriptor, TypedVarlinkErrorReply, VarlinkInterface, varlinkmethod

from khod import model
from khod.errors import BY_NAME, KhoError, error_name
from khod.region import Region
from khod.wire import INTERFACE, PRODUCER


class _Fields:
    """What every error carries; see khod.errors."""

    what: str
    where: str
    remedy: str
    cause: str | None


def _error_reply(cls: type[KhoError]) -> type[TypedVarlinkErrorReply]:
    """Make the Varlink error of one class of ours, which the library wants as a class of its own."""
    namespace: dict[str, Any] = {"Parameters": _Fields, "__doc__": cls.__doc__, "__annotations__": {}}
    options = {"name": f"{INTERFACE}.{cls.__name__}", "paramprefix": ""}
    return types.new_class(cls.__name__, (TypedVarlinkErrorReply,), options, lambda body: body.update(namespace))


ERRORS = {name: _error_reply(cls) for name, cls in BY_NAME.items()}


def to_wire(error: KhoError) -> TypedVarlinkErrorReply:
    """The Varlink error of one of ours."""
    reply = ERRORS[error_name(error)]
    return reply(what=error.what, where=error.where, remedy=error.remedy, cause=error.cause or None)


class TreeReply(TypedDict):
    """A state tree as passed file descriptors: the root first, named "", then each producer's blob."""

    names: list[str]
    blobs: list[FileDescriptor]


@dataclass(frozen=True)
class NextKernel:
    """The next kernel: descriptors as indexes of those passed along, names for people.

    Several `initrds` follow one another in memory, in this order. Without `cmdline` an image's own counts (a
    unified kernel image has one), then the running kernel's, less what must not travel; `reuse_cmdline` insists on
    that. `remove` takes words away by parameter (`console`) or whole (`console=ttyS0`), `append` adds some.
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
    """Takes this host from one kernel to the next. Reading is for everyone, changing for root and one group.

    Every error carries a sentence on what failed (`what`), the path, call or key it is about (`where`)
    and what to do next (`remedy`).
    """

    errors = tuple(ERRORS.values())

    @varlinkmethod(return_parameter="status")
    async def Status(self) -> model.Status:
        """Tell how it stands; never waits for the kernel longer than a second."""
        raise NotImplementedError

    @varlinkmethod(return_parameter="event", delay_generator=False)
    async def Monitor(self) -> AsyncIterator[model.Event]:
        """Stream every change, beginning with how it stands; call it with `more`."""
        raise NotImplementedError
        yield

    @varlinkmethod(return_parameter="checks")
    async def Check(self, *, kernel: NextKernel | None = None, now: bool | None = None) -> list[model.Check]:
        """Run the preflight checks and touch nothing; with an image also those of the next kernel.

        With `now` for a jump at once, which stops nothing before; else for an orderly one.
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
        """Tell what Kexec with these parameters would do, step by step, and touch nothing."""
        raise NotImplementedError

    @varlinkmethod(return_parameter="status")
    async def Activate(self) -> model.Status:
        """Bring producers and kernel to `active`; on failure everything is put back."""
        raise NotImplementedError

    @varlinkmethod(return_parameter="status")
    async def Abort(self, *, force: bool | None = None) -> model.Status:
        """Put everything back; with `force` also what khod did not do."""
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
        """Do what is left of the handover. The reply says that the jump is under way; with `now` none comes."""
        raise NotImplementedError

    @varlinkmethod(return_parameter="producers")
    async def Producers(self) -> list[model.Producer]:
        """List every producer that is configured, connected or waited for, in the order they are told."""
        raise NotImplementedError

    @varlinkmethod(return_parameter="producers")
    async def Rehearse(self, *, name: str) -> list[model.Producer]:
        """Drive one producer through prepare, freeze, thaw and cancel, and leave the kernel alone."""
        raise NotImplementedError

    @varlinkmethod
    async def Retry(self, *, name: str) -> None:
        """Tell a producer again to take back what it left before the jump; Refused where it does not."""
        raise NotImplementedError

    @varlinkmethod
    async def Forget(self, *, name: str) -> None:
        """Free what a producer left before the jump and will not claim."""
        raise NotImplementedError

    @varlinkmethod
    async def Tree(self, *, side: str) -> TreeReply:
        """Give a state tree: `out` (would leave), `in` (arrived), `snapshot` (left last), or a snapshot by its id."""
        raise NotImplementedError

    @varlinkmethod(return_parameter="snapshots")
    async def Snapshots(self) -> list[model.Snapshot]:
        """List the state trees that were kept when they left, the newest first; then, `run` empty, what is none."""
        raise NotImplementedError

    @varlinkmethod(return_parameter="regions")
    async def Scratch(self) -> list[Region]:
        """Give the scratch regions, which the next kernel starts in and no state may lie in."""
        raise NotImplementedError


class Word(enum.Enum):
    """What a producer says to a command. not_yet: it takes longer, within the same deadline."""

    ready = "ready"
    not_yet = "not_yet"
    veto = "veto"


class Registered(TypedDict):
    """`told` is the last verb khod counts on ("" for none): whoever did more undoes the rest by itself."""

    version: int
    run: str
    told: str


class Command(TypedDict):
    """One verb: prepare, freeze, thaw, cancel, restore or finish. `timeout` is in seconds.

    With restore come the files that were preserved, `names`, `tokens` and `fds` side by side.
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

    Register, then call Next for ever: each call says how the command before went, and is answered with the
    next one, which may be hours later. The end of the connection is a veto. Whoever loses khod connects again
    and does what `told` says; undo may come for what was never done, and must be harmless then.
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
    ) -> Registered:
        """Become the producer `name`. `version` is the newest of this interface the caller knows; 1 is the only one."""
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
        """Answer the command `serial` and wait for the next; not_yet is answered at once with what counts now.

        `progress` goes from 0 to 1. With prepare and freeze, `fds` are preserved under `names` and `tokens` in
        this producer's own LUO session.
        """
        raise NotImplementedError
