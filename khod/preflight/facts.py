# SPDX-License-Identifier: LGPL-2.1-or-later
"""The input of the checks, and the result of each."""

from collections.abc import Callable, Sequence
from dataclasses import field, replace
from typing import Self

from khod.config import Config
from khod.dataclass import dataclass
from khod.errors import KhoError
from khod.handover.record import Record, Store
from khod.history.trial import Past
from khod.kernel.kexec import Kexec
from khod.kernel.probe import Probed
from khod.kernel.protocol import Tree
from khod.model import CheckResult, Observed
from khod.producers.barrier import Participant
from khod.producers.health import HealthCheck
from khod.producers.registrations import RegisteredProducer
from khod.producers.session_scan import SightedSessions
from khod.quiesce.host import Survey
from khod.region import Region
from khod.systemd.logind import Inhibitor
from khod.target.target import Target


@dataclass(frozen=True)
class PastFact:
    """What the history has for the checks of the image, or why that is not known."""

    past: Past | None
    unknown: str = ""


@dataclass(frozen=True)
class Facts:
    """The input of the checks, which run in a thread of their own.

    `inhibitors` is None if logind could not be asked, `outgoing` if the kernel has no outgoing tree now or could not be
    asked. `absent` are producers that were registered before khod was restarted and have not come back.
    `unknown_sessions` are LUO sessions without an owner in any record, `sighted` those of other processes. `now` is for
    a jump that stops nothing. `survey` is what a quiesce would stop, or why that is not known; None without that step.
    `health` reads the operator's health checks. `past` is None without a target.
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
    health: Callable[[], list[HealthCheck]] = list
    past: PastFact | None = None
    survey: Survey | KhoError | None = None

    @property
    def jumps_itself(self) -> bool:
        """Whether khod calls reboot(2) after an orderly quiesce, and asks systemd for nothing."""
        return isinstance(self.survey, Survey) and not self.survey.stores


@dataclass(frozen=True)
class CheckFinding:
    """The result of one check: the outcome, the evidence for it, and what to do.

    `panic` tells whether the next kernel would fail to boot. Such a finding refuses the handover even if the operator
    softens the check to a warning.
    """

    result: CheckResult
    evidence: str
    remedy: str = ""
    panic: bool = False

    @classmethod
    def pass_with(cls, evidence: str) -> Self:
        """Return a finding that nothing is in the way."""
        return cls(CheckResult.passed, evidence)

    @classmethod
    def warn_with(cls, evidence: str, remedy: str) -> Self:
        """Return a finding that the handover may go wrong."""
        return cls(CheckResult.warn, evidence, remedy)

    @classmethod
    def fail_with(cls, evidence: str, remedy: str) -> Self:
        """Return a finding that the handover would go wrong."""
        return cls(CheckResult.fail, evidence, remedy)

    @classmethod
    def skip_with(cls, why: str) -> Self:
        """Return a finding that the check was not possible, or not needed."""
        return cls(CheckResult.skipped, why)

    @classmethod
    def from_error(cls, error: KhoError) -> Self:
        """Return the finding for one of khod's errors."""
        return cls(CheckResult.fail, f"{error.what} ({error.where})" if error.where else error.what, error.remedy)

    def with_judgement(self, judgement: str) -> Self:
        """Return the finding as the operator wants it treated.

        `warn` softens a failure that is not a panic, `fail` hardens a warning; with `off` nothing is refused.
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
    """Format regions, with sizes in MiB."""
    return ", ".join(f"{region.size >> 20} MiB at {region.addr:#x}" for region in regions)
