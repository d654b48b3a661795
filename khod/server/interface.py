# SPDX-License-Identifier: LGPL-2.1-or-later
"""The Varlink interface io.kho.Handover, described by the model's own dataclasses."""

from collections.abc import AsyncIterator
from typing import TypedDict

from asyncvarlink import FileDescriptor, VarlinkInterface, varlinkmethod

from khod import model
from khod.dataclass import dataclass
from khod.history.model import AttemptRecord, AttemptSummary
from khod.region import Region
from khod.server.error_replies import ERRORS
from khod.wire import INTERFACE


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
class DetachedSignature:
    """A detached signature, of OpenPGP, minisign or signify, as a descriptor, with a name for people.

    `initrd` is the number of the initrd that it signs, counted from 0; without it it signs the image. With `required`
    its file is refused unless one of its signatures is good, whatever the policy of the host says.
    """

    file: FileDescriptor
    name: str | None = None
    initrd: int | None = None
    required: bool | None = None


@dataclass(frozen=True)
class NextKernel:
    """The next kernel: descriptors as indexes of those passed along, and names for people.

    Several `initrds` follow one another in memory, in this order. Without `cmdline` the image's own is used (a unified
    kernel image has one), else the running kernel's, without the words that must not be reused; `reuse_cmdline`
    requires the running kernel's. `remove` removes words by parameter (`console`) or whole (`console=ttyS0`), `append`
    adds words. `sha256` are digests in hex, one of which each of the files must have.
    """

    image: FileDescriptor | None = None
    image_name: str | None = None
    initrds: list[FileDescriptor] | None = None
    initrd_names: list[str] | None = None
    cmdline: str | None = None
    reuse_cmdline: bool | None = None
    append: str | None = None
    remove: list[str] | None = None
    signatures: list[DetachedSignature] | None = None
    sha256: list[str] | None = None


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
    async def Check(
        self, *, kernel: NextKernel | None = None, now: bool | None = None, terms: model.Terms | None = None
    ) -> list[model.Check]:
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
        terms: model.Terms | None = None,
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
        terms: model.Terms | None = None,
    ) -> model.Status:
        """Do the remaining steps of the handover. The reply says that the jump is under way; with `now` none comes.

        `terms` say what must hold for this handover besides the configuration.
        """
        raise NotImplementedError

    @varlinkmethod
    async def Announce(self, *, profile: str, ignore_window: bool | None = None, sudo_user: int | None = None) -> None:
        """Say that the unit of a profile is about to be started for the caller; the unit takes this within a minute.

        `sudo_user` is the number of the user for whom sudo(8) made the caller root.
        """
        raise NotImplementedError

    @varlinkmethod(return_parameter="announcement")
    async def TakeAnnouncement(self, *, profile: str) -> model.Announcement:
        """Return the announcement of a profile's run, and forget it; an empty one if there is none."""
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
