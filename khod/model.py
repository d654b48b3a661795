# SPDX-License-Identifier: LGPL-2.1-or-later
"""The words everything else is said in: enums and frozen dataclasses, standard library only.

Times are seconds. `*_monotonic` values are CLOCK_MONOTONIC of the boot they were taken in; `*_at`
values are seconds since the epoch.
"""

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace


class Phase(enum.Enum):
    """Where one handover stands; `khod.handover.machine` says what leads where."""

    idle = "idle"
    preparing = "preparing"
    prepared = "prepared"
    freezing = "freezing"
    frozen = "frozen"
    activating = "activating"
    active = "active"
    loading = "loading"
    loaded = "loaded"
    executing = "executing"
    verifying = "verifying"
    verified = "verified"
    degraded = "degraded"
    cold_boot = "cold_boot"
    rolling_back = "rolling_back"
    failed = "failed"
    foreign = "foreign"
    inconsistent = "inconsistent"


class Step(enum.Enum):
    """One action of a handover that has an undo (all but execute)."""

    prepare = "prepare"
    freeze = "freeze"
    activate = "activate"
    load = "load"
    execute = "execute"


class Generation(enum.Enum):
    """How the running kernel lets userspace drive KHO."""

    none = "none"
    sysfs = "sysfs"
    finalize = "finalize"
    finalize_no_abort = "finalize_no_abort"
    stateless = "stateless"


class Order(enum.Enum):
    """Whether the state must be in the tree before an image is loaded (it is copied at load)."""

    activate_first = "activate_first"
    load_first = "load_first"


@dataclass(frozen=True)
class Observed:
    """What the kernel itself says, now."""

    boot_id: str
    release: str
    active: bool | None
    loaded: bool
    arrived: bool
    cmdline: str


@dataclass(frozen=True)
class StepTiming:
    """How long one step took, in seconds, and when it began (CLOCK_MONOTONIC)."""

    step: str
    began_monotonic: float
    seconds: float


@dataclass(frozen=True)
class Producer:
    """One holder of state as status shows it.

    `rank` counts from 0 in the order they are told; `phase` is the last verb it was told, `answer` its
    last word to that, `seconds` how long it took or takes, `progress` what it said is done of it (0 to 1), `limit` how
    many seconds it has for it, 0 where it was told nothing.
    """

    name: str
    kind: str
    rank: int
    phase: str
    answer: str
    seconds: float
    waiting: bool
    progress: float | None
    limit: float = 0.0


@dataclass(frozen=True)
class Kept:
    """A file descriptor in a producer's LUO session: the producer's name for it, and its token."""

    name: str
    token: int


class FindingSource(enum.Enum):
    """Whose a finding is."""

    kernel = "kernel"
    """A blob of the state tree, or the tree."""
    producer = "producer"
    session = "session"
    """A LUO session that no producer registered."""
    khod = "khod"
    """What khod could not look at."""


class FindingSeverity(enum.Enum):
    """What a finding means for the state."""

    lost = "lost"
    changed = "changed"
    unknown = "unknown"


@dataclass(frozen=True)
class Finding:
    """One thing that speaks against a handover: `text` says what, of the `subject` of its source ("" for all of it).

    `producer` is the subject where that is a producer, else "".
    """

    producer: str
    text: str
    source: FindingSource = FindingSource.kernel
    subject: str = ""
    severity: FindingSeverity = FindingSeverity.lost

    @classmethod
    def of_producer(cls, name: str, text: str) -> "Finding":
        """A producer did not take its state back, and says why."""
        return cls(name, text, FindingSource.producer, name)

    @classmethod
    def of_khod(cls, text: str) -> "Finding":
        """What khod could not look at, or find out."""
        return cls("", text, FindingSource.khod, severity=FindingSeverity.unknown)


def render_findings(findings: Sequence[Finding]) -> str:
    """Say findings in one line; those of several blobs that say the same are one."""
    blobs: dict[str, list[str]] = {}
    for finding in findings:
        if finding.source is FindingSource.kernel and finding.subject:
            blobs.setdefault(finding.text, []).append(finding.subject)
    parts = [f"{text}: {', '.join(names)}" for text, names in blobs.items()]
    for finding in findings:
        if finding.producer:
            parts.append(f"producer {finding.producer}: {finding.text}")
        elif finding.source is not FindingSource.kernel or not finding.subject:
            parts.append(finding.text)
    return "; ".join(parts)


@dataclass(frozen=True)
class Verdict:
    """What the kernel after the jump had of the state before it; names are those of the tree's blobs.

    `reason` says all `findings` in one line; "" where there is nothing against it. Of what is `unknown` nobody can
    tell whether it arrived.
    """

    arrived: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    reason: str = ""
    findings: list[Finding] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def with_findings(self, findings: Iterable[Finding]) -> "Verdict":
        """The same verdict with these findings, and what they come to in one line."""
        kept = list(findings)
        return replace(self, findings=kept, reason=render_findings(kept))


@dataclass(frozen=True)
class NotUndone:
    """One thing a rollback could not put back: of which step, whose ("" for the kernel's), why, and what to do."""

    step: str
    producer: str
    why: str
    remedy: str


class SessionFate(enum.Enum):
    """What an orderly shutdown does to a LUO session."""

    kept = "kept"
    lost = "lost"
    unknown = "unknown"


@dataclass(frozen=True)
class LuoSession:
    """A LUO session that no producer registered with khod.

    `name` is "" where the kernel does not show it. `holder` says who has it open, `why` why an orderly shutdown does
    to it what `fate` says. An immediate jump keeps it, unless it is `incoming`: then it came from the previous kernel.
    """

    name: str
    holder: str
    fate: SessionFate
    why: str
    incoming: bool = False


@dataclass(frozen=True)
class Begun:
    """Who began the handover `run` and when (seconds since the epoch, 0 where nobody did), and the image it took.

    With `luo_off` the image's kernel comes up with LUO off, and no file may be handed over to it.
    """

    at: float = 0.0
    by: str = ""
    image: str = ""
    luo_off: bool = False


@dataclass(frozen=True)
class UnderWay:
    """The step under way, and for how many seconds."""

    step: str
    seconds: float


@dataclass(frozen=True)
class Status:
    """What the operator is told.

    `outcome` is what the handover into this boot came to (verified, degraded, cold_boot; idle where there was none)
    and does not change with what is done since; `claims` are those who have not taken back what they left before the
    jump. `phase` is the machine's, unless the kernel contradicts it: where this boot had no handover, an active phase
    or an image that is not khod's shows as `foreign`; `foreign` says so in any case. `done` are the steps that are
    finished, `under_way` is the one that is not. `left` are the steps that a rollback could not undo, `not_undone` the
    same item by item. `sessions` are LUO sessions of other processes, and `sessions_unseen` why there may be more.
    """

    phase: Phase
    summary: str
    remedy: str
    exit_code: int
    generation: Generation
    kernel_active: bool | None
    kernel_loaded: bool | None
    kernel_release: str
    boot_id: str
    run: str
    done: list[str]
    left: list[str]
    waiting_for: list[str]
    producers: list[Producer]
    verdict: Verdict | None
    previous_release: str
    handovers: int
    blackout_seconds: float | None
    timings: list[StepTiming]
    last_error: str
    stale: bool
    outcome: Phase = Phase.idle
    foreign: bool = False
    claims: list[str] = field(default_factory=list)
    not_undone: list[NotUndone] = field(default_factory=list)
    begun: Begun | None = None
    under_way: UnderWay | None = None
    sessions: list[LuoSession] = field(default_factory=list)
    sessions_unseen: str = ""


class CheckResult(enum.Enum):
    """The outcome of one check; `passed` because `pass` is a Python keyword.

    `off` is a failure that the operator has switched off: it was found, and refuses nothing.
    """

    passed = "passed"
    warn = "warn"
    fail = "fail"
    unsupported = "unsupported"
    skipped = "skipped"
    off = "off"


@dataclass(frozen=True)
class Check:
    """One named preflight check with its evidence and what to do."""

    name: str
    result: CheckResult
    evidence: str
    remedy: str


class Fate(enum.Enum):
    """What becomes of a word of the command line."""

    kept = "kept"
    added = "added"
    removed = "removed"


@dataclass(frozen=True)
class Word:
    """One word of the running kernel's command line or the next one's.

    `lost` says what a handover loses by what becomes of it, "" nothing.
    """

    text: str
    fate: Fate
    lost: str = ""


@dataclass(frozen=True)
class Planned:
    """One step a handover would take, what it would do, and what would put it back."""

    step: str
    does: str
    undo: str


@dataclass(frozen=True)
class Plan:
    """What a handover would do: its steps in order, the checks before it, and what becomes of the command line."""

    steps: list[Planned]
    checks: list[Check]
    cmdline: str
    words: list[Word]
    rollback_seconds: float = 0.0
    """The most that putting everything back may take, from `khoctl abort` to its answer."""


@dataclass(frozen=True)
class Snapshot:
    """A state tree that was kept when it left; or, with `run` empty, what lies among them and is none.

    `taken_at` is in seconds since the epoch, for people: what orders them is the order they were taken in. `bytes` is
    the size of all blobs, `digest` the SHA-256 of the root and then each blob in order of name. `wrong` says what is
    the matter with it, "" nothing. `outcome` is what its handover came to: what this boot came to, where it led here;
    the phase, where it is under way; `rolled_back`, where it was begun in this boot; "" where khod does not know.
    """

    id: str
    run: str
    taken_at: float
    boot_id: str
    release: str
    generation: Generation
    bytes: int
    blobs: list[str]
    digest: str
    wrong: str = ""
    outcome: str = ""


class EventKind(enum.Enum):
    """What an event is about; whoever keeps or counts events reads this, never the message."""

    phase = "phase"
    """The handover is in another phase, and no step says so."""
    step_began = "step_began"
    step_ended = "step_ended"
    """With its duration."""
    producer_called = "producer_called"
    """A verb was sent to a producer."""
    producer_answered = "producer_answered"
    """Its answer came, or its end: with the duration."""
    producer_waits = "producer_waits"
    """It needs more time, or it came or went."""
    device = "device"
    note = "note"


@dataclass(frozen=True)
class Event:
    """One change as the monitor sees it: `seconds` is CLOCK_MONOTONIC, `at` the same instant by the wall clock.

    `producer` is who it is about if one, `step` the step that began or ended, and `duration` its seconds, or those of
    an answer. `words` stand with the event that tells the next kernel's command line.
    """

    seconds: float
    phase: Phase
    message: str
    run: str
    producer: Producer | None = None
    words: list[Word] | None = None
    kind: EventKind = EventKind.note
    step: str = ""
    duration: float | None = None
    at: float = 0.0
