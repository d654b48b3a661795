# SPDX-License-Identifier: LGPL-2.1-or-later
"""The words of the history: frozen dataclasses, which are also the wire's. Times are as in `khod.model`.

A run's log (`RunLog`) has what the khods of both kernels saw, in the order in which they saw it. An `AttemptRecord` is
made of it when the run has ended. A `Timeline` is computed from a log.
"""

import enum
from dataclasses import field

from khod.dataclass import dataclass
from khod.model import Check, Event, Finding, Phase, Terms, Verdict
from khod.model import ColdBoot as ColdBoot  # noqa: PLC0414 - a word of the status and of the history


@dataclass(frozen=True)
class KernelFacts:
    """One kernel of a handover: its release, its build banner (/proc/version) and, where it has run, its boot id."""

    release: str = ""
    banner: str = ""
    boot_id: str = ""
    cmdline: str = ""


@dataclass(frozen=True)
class ImageFacts:
    """One file of the next kernel as it was loaded: `role` is kernel or initrd, `digest` its SHA-256 in hex."""

    role: str
    name: str
    digest: str
    bytes: int


@dataclass(frozen=True)
class Signer:
    """Who made a good signature of a file, as a key in /etc/kho/keys.d tells.

    `method` is openpgp, minisign or signify, and `verifier` the program that has verified it. `key` is the fingerprint
    of the OpenPGP key, else the public key itself, as minisign prints it. `name` is the user ID of the OpenPGP key,
    else the name of the key's file. `signed_at` is None where the signature does not say it.
    """

    method: str
    key: str
    name: str
    verifier: str
    signed_at: float | None = None


@dataclass(frozen=True)
class FileOrigin:
    """What is known of who made one file, as it was given: `role` is kernel or initrd, `digest` its SHA-256 in hex.

    `pinned_by` names who asks for this digest: images.sha256 of khod.toml, the caller. `refusal` says what policy has
    against the file, "" for nothing, and `remedy` what to do then. `doubts` are signatures that are not good, and that
    policy does not ask for. `unverified` are signatures that were not looked at, as this host has no keys.
    """

    role: str
    name: str
    digest: str
    bytes: int
    verified_at: float
    pinned_by: list[str] = field(default_factory=list)
    signers: list[Signer] = field(default_factory=list)
    refusal: str = ""
    remedy: str = ""
    doubts: list[str] = field(default_factory=list)
    unverified: list[str] = field(default_factory=list)


class RowKind(enum.Enum):
    """What a row of the timeline is about."""

    step = "step"
    """A step of khod's, before the jump: prepare, freeze, activate, load."""
    wait = "wait"
    """Between two steps, or until systemd takes the host down."""
    shutdown = "shutdown"
    """systemd stops its units."""
    unit = "unit"
    """One unit's stop, within the shutdown."""
    final = "final"
    """systemd-shutdown."""
    sleep = "sleep"
    """systemd-shutdown sleeps for MinimumUptimeSec=."""
    jump = "jump"
    """LUO preserves, and the jump."""
    kernel = "kernel"
    initrd = "initrd"
    userspace = "userspace"
    """From the first process to khod."""
    khod = "khod"
    """khod starts, and looks at what arrived."""
    restore = "restore"
    """The producers take back what they left."""
    producer = "producer"
    """One producer's answer, within a step or the restore."""


@dataclass(frozen=True)
class BootCost:
    """What makes the boot of a next kernel slow: what was found, and what the operator may do.

    `parts` are the rows of the timeline that have its time, among that of other things.
    """

    parts: list[RowKind]
    found: str
    remedy: str


@dataclass(frozen=True)
class RunBegun:
    """How a run began: by whom (for people), when, in which kernel, and on which terms (None without a profile)."""

    run: str
    at: float
    by: str
    origin: KernelFacts
    generation: str
    terms: Terms | None = None


@dataclass(frozen=True)
class RunTarget:
    """What the run leads to, if it loads an image: the next kernel, its files, how the jump is made, what is slow.

    `images` are the files as they are loaded, and `origins` those that were given: a unified kernel image is one file
    of these, and several initrds are loaded as one.
    """

    kernel: KernelFacts
    images: list[ImageFacts] = field(default_factory=list)
    at_once: bool = False
    costs: list[BootCost] = field(default_factory=list)
    origins: list[FileOrigin] = field(default_factory=list)


class ClockSource(enum.Enum):
    """What bridges the clocks of two kernels; the first that both kernels have is used."""

    tsc = "tsc"
    ptp = "ptp"
    wall = "wall"


class Moment(enum.Enum):
    """When the clocks were read."""

    start = "start"
    """khod started, in the kernel before: with it and `begin` the clocks' rates can be compared."""
    begin = "begin"
    """The run began, before anyone was told anything."""
    arrival = "arrival"
    """The next khod has started."""
    end = "end"
    """The verification was concluded."""


@dataclass(frozen=True)
class ClockReading:
    """The clocks of one kernel at one moment, in seconds but for `tsc`, which is in cycles; None for what is not there.

    All of them were read within `span_seconds`. `monotonic` stops where the host sleeps, `boottime` does not. `rtc` is
    the hardware clock, which counts whole seconds: it was between this and 1.1 seconds more.
    """

    moment: Moment
    boot_id: str
    monotonic: float
    boottime: float
    realtime: float
    span_seconds: float
    tsc: int | None = None
    ptp: float | None = None
    ptp_name: str = ""
    rtc: float | None = None


@dataclass(frozen=True)
class UnitStop:
    """How long one unit stopped, on the way down: CLOCK_MONOTONIC of the kernel before."""

    unit: str
    began_monotonic: float
    ended_monotonic: float


@dataclass(frozen=True)
class Departure:
    """How the kernel before went down, as systemd and its journal tell; None for what nobody told.

    `*_monotonic` are CLOCK_MONOTONIC of the kernel before: systemd's PreviousShutdown* timestamps. `unknown` has a
    sentence for each thing that could not be found out.
    """

    start_monotonic: float | None = None
    finish_monotonic: float | None = None
    late_start_monotonic: float | None = None
    late_finish_monotonic: float | None = None
    sleep_seconds: float | None = None
    """What systemd-shutdown slept at most for MinimumUptimeSec=, before `late_finish_monotonic`."""
    stops: list[UnitStop] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Arrival:
    """How the kernel after the jump came up, CLOCK_MONOTONIC of that kernel; None for what nobody told.

    The kernel starts at `began_monotonic`: 0 but for the simulated one, which has the clocks of its host. `analyze` is
    what `systemd-analyze time` prints of this boot.
    """

    kernel: KernelFacts
    initrd_monotonic: float | None = None
    userspace_monotonic: float | None = None
    khod_monotonic: float | None = None
    """When systemd started khod's process."""
    ready_monotonic: float | None = None
    """When khod looked at what had arrived; without it, when it said so first."""
    analyze: str = ""
    began_monotonic: float = 0.0


@dataclass(frozen=True)
class RunEnd:
    """How a run ended: `outcome` is verified, degraded or cold_boot, or after a rollback idle or failed.

    With `refused` it ended before its first step, and nothing had to be rolled back.
    """

    outcome: Phase
    at: float
    reason: str = ""
    verdict: Verdict | None = None
    blackout_seconds: float | None = None
    blackout_error_seconds: float = 0.0
    trees: list[str] = field(default_factory=list)
    """How the tree that arrived differs from the snapshot, a line each."""
    refused: bool = False


@dataclass
class RunLog:
    """Everything that was logged of one run. A khod adds to the lists; of the rest the last line counts."""

    run: str = ""
    begun: RunBegun | None = None
    target: RunTarget | None = None
    events: list[Event] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    readings: list[ClockReading] = field(default_factory=list)
    departure: Departure | None = None
    arrival: Arrival | None = None
    cold_boot: ColdBoot | None = None
    end: RunEnd | None = None
    damaged_lines: int = 0
    """Lines that could not be read, as where the disk was full."""


@dataclass(frozen=True)
class TimelineRow:
    """One row: `begin` is in seconds since the first `freeze` (negative before it), `parent` the row it lies in.

    The rows without a parent from 0 on follow one another without a gap, and add up to the blackout. `error_seconds` is
    the maximum error of `seconds`.
    """

    kind: RowKind
    name: str
    begin: float
    seconds: float
    error_seconds: float = 0.0
    parent: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Standstill:
    """How long one producer stood still: from its first `freeze` of the run to its answer to `restore`, at most.

    `own_seconds` is the same by its own account, as of a guest's clock; None if it did not say.
    """

    name: str
    kind: str
    seconds: float
    error_seconds: float = 0.0
    own_seconds: float | None = None


@dataclass(frozen=True)
class Timeline:
    """The rows of one run, in order. Without a `source` the clocks of the two kernels could not be bridged.

    `blackout_seconds` is None without a recovery. `standstills` has the producers that took their state back, the
    longest first, where the clocks could be bridged. `unknown` has a sentence for each thing that is not known,
    `analyze` what `systemd-analyze time` says of the boot after the jump.
    """

    rows: list[TimelineRow] = field(default_factory=list)
    blackout_seconds: float | None = None
    error_seconds: float = 0.0
    source: ClockSource | None = None
    unknown: list[str] = field(default_factory=list)
    analyze: str = ""
    standstills: list[Standstill] = field(default_factory=list)

    def select_parts(self, cost: BootCost) -> list[TimelineRow]:
        """Return the rows that have the time of a cost.

        An initrd without systemd has no row, and its time is in that of the kernel.
        """
        return self._select_kinds(cost.parts) or self._select_kinds([RowKind.kernel])

    def _select_kinds(self, kinds: list[RowKind]) -> list[TimelineRow]:
        return [row for row in self.rows if row.kind in kinds and not row.parent]


@dataclass(frozen=True)
class AttemptSummary:
    """One attempt as a list shows it. `by` is "" for callers that may not know who asked."""

    run: str
    began_at: float
    ended_at: float
    outcome: Phase
    reason: str
    from_release: str
    to_release: str
    blackout_seconds: float | None
    blackout_error_seconds: float
    by: str
    first_boot_id: str
    """The boot in which it began."""
    last_boot_id: str
    """The boot that it led to, "" if it led to none."""
    refused: bool = False
    """Whether it was refused before its first step."""
    damage: str = ""
    """Why these fields cannot be relied on, "" if they can."""


@dataclass(frozen=True)
class AttemptRecord:
    """One attempt at a handover, with all that is known of it: what `khoctl history show` and the report draw."""

    summary: AttemptSummary
    origin: KernelFacts
    target: RunTarget | None
    arrived: KernelFacts | None
    generation: str
    verdict: Verdict | None
    findings: list[Finding]
    events: list[Event]
    checks: list[Check]
    timeline: Timeline
    cold_boot: ColdBoot | None = None
    trees: list[str] = field(default_factory=list)
    terms: Terms | None = None
    """What its profile required, None without a profile."""
    damage: str = ""
    """What is missing here because the log or the database was damaged, "" for nothing."""
