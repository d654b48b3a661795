# SPDX-License-Identifier: LGPL-2.1-or-later
"""The words of a fleet: frozen dataclasses, which are also its JSON. Every text and number of a host is bounded."""

import enum
from dataclasses import field

from khod.dataclass import dataclass
from khod.history.model import AttemptSummary


class RemarkKind(enum.Enum):
    """Why a host stands out, in the order in which a person should look at it."""

    not_rolled_back = "not rolled back"
    degraded = "degraded"
    cold_boot = "cold boot"
    inconsistent = "inconsistent"
    foreign = "foreign"
    refused_login = "refused"
    """ssh refused: the host key, or the login."""
    not_reached = "not reached"
    unreadable = "unreadable"
    claims = "waiting state"
    over_budget = "over budget"
    slow = "slow"
    clock_off = "clock off"
    rolled_back = "rolled back"
    under_way = "under way"
    without_kho = "without KHO"


@dataclass(frozen=True)
class Remark:
    """One reason why a host stands out, with what was found."""

    kind: RemarkKind
    text: str


@dataclass(frozen=True)
class HostView:
    """One host: where it stands, its versions, its past attempts (newest first), and why it stands out, worst first.

    `kernel` and `khod` are "" where they are not known. `clock_offset_seconds` is how far the host's clock is ahead of
    this one's, None if it was not asked.
    """

    name: str
    state: str = ""
    kernel: str = ""
    khod: str = ""
    attempts: list[AttemptSummary] = field(default_factory=list)
    clock_offset_seconds: float | None = None
    clock_error_seconds: float = 0.0
    remarks: list[Remark] = field(default_factory=list)

    @property
    def last_blackout(self) -> AttemptSummary | None:
        """The last attempt whose blackout is known."""
        return next((one for one in self.attempts if one.blackout_seconds is not None), None)

    @property
    def has_kho(self) -> bool:
        """Whether the host counts as one of those that can hand over."""
        return all(remark.kind is not RemarkKind.without_kho for remark in self.remarks)


@dataclass(frozen=True)
class BlackoutSpread:
    """The blackouts of the handovers that were read, in seconds; `error_seconds` is the largest error among them."""

    count: int
    hosts: int
    median: float
    lower_quartile: float
    upper_quartile: float
    error_seconds: float
    worst: float
    worst_error_seconds: float
    worst_host: str
    limit: float | None
    """From here on the last blackout of a host stands out; None for too few hosts."""


@dataclass(frozen=True)
class FleetView:
    """All hosts, those first that a person should look at."""

    hosts: list[HostView]
    blackout: BlackoutSpread | None
    counts: dict[str, int]
    """The number of hosts by their first remark, or by their state without one."""
    kernels: dict[str, int]
    khods: dict[str, int]
    exit_code: int
