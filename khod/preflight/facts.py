# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the checks look at, and what each of them says."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from khod.config import Config
from khod.errors import KhoError
from khod.handover.record import Record, Store
from khod.kernel.kexec import Kexec
from khod.kernel.probe import Probed
from khod.kernel.protocol import Tree
from khod.model import CheckResult, Observed
from khod.producers.barrier import Participant
from khod.producers.registrations import RegisteredProducer
from khod.producers.session_holders import SightedSessions
from khod.region import Region
from khod.systemd.logind import Inhibitor
from khod.target.target import Target


@dataclass(frozen=True)
class Facts:
    """What the checks look at, in a thread of their own.

    `inhibitors` is None where nobody could be asked, `outgoing` where the kernel has no outgoing tree now or could not
    be asked for it. `absent` are producers that were registered before khod was restarted and have not come back,
    `unknown_sessions` LUO sessions of which no record says whose they are, `sighted` those of other processes. `now`
    is for a jump that stops nothing.
    """

    probed: Probed
    kexec: Kexec
    observed: Observed
    store: Store
    config: Config
    record: Record
    foreign: bool
    producers: Callable[[], list[Participant]]
    inhibitors: Sequence[Inhibitor] | None = None
    target: Target | None = None
    outgoing: Tree | None = None
    unknown_sessions: Sequence[str] = ()
    absent: Sequence[RegisteredProducer] = ()
    sighted: SightedSessions = field(default_factory=SightedSessions)
    now: bool = False


@dataclass(frozen=True)
class CheckFinding:
    """What one check says: the outcome, the evidence for it, and what to do.

    `panic` is whether the next kernel would not come up: that is refused where the operator softens the check, too.
    """

    result: CheckResult
    evidence: str
    remedy: str = ""
    panic: bool = False

    @classmethod
    def pass_with(cls, evidence: str) -> Self:
        """Nothing is in the way."""
        return cls(CheckResult.passed, evidence)

    @classmethod
    def warn_with(cls, evidence: str, remedy: str) -> Self:
        """It may go wrong."""
        return cls(CheckResult.warn, evidence, remedy)

    @classmethod
    def fail_with(cls, evidence: str, remedy: str) -> Self:
        """It would go wrong."""
        return cls(CheckResult.fail, evidence, remedy)

    @classmethod
    def skip_with(cls, why: str) -> Self:
        """It could not be looked at, or need not be."""
        return cls(CheckResult.skipped, why)

    @classmethod
    def from_error(cls, error: KhoError) -> Self:
        """One of our errors as a finding."""
        return cls(CheckResult.fail, f"{error.what} ({error.where})" if error.where else error.what, error.remedy)

    def with_judgement(self, judgement: str) -> Self:
        """The finding as the operator wants it taken.

        `warn` softens a failure that is no panic, `fail` hardens a warning; `off` refuses nothing.
        """
        failed = self.result in (CheckResult.fail, CheckResult.unsupported)
        match judgement:
            case "warn" if failed and not self.panic:
                return replace(self, result=CheckResult.warn)
            case "fail" if self.result is CheckResult.warn:
                return replace(self, result=CheckResult.fail)
            case "off" if failed:
                return replace(self, result=CheckResult.off)
            case "off":
                return replace(self, result=CheckResult.skipped)
            case _:
                return self


def format_regions(regions: Sequence[Region]) -> str:
    """Put regions in words, sizes in MiB."""
    return ", ".join(f"{region.size >> 20} MiB at {region.addr:#x}" for region in regions)
