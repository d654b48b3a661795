# SPDX-License-Identifier: LGPL-2.1-or-later
"""The vocabulary that all of khod shares: enums and frozen dataclasses, standard library only.

Times are in seconds. `*_monotonic` values are CLOCK_MONOTONIC of the boot in which they were taken; `*_at` values are
seconds since the epoch.
"""

import enum
from collections.abc import Iterable, Sequence
from dataclasses import field, replace

from khod.dataclass import dataclass


class Phase(enum.Enum):
    """The phase of a handover; `khod.handover.machine` has the transitions."""

    idle = "idle"
    preparing = "preparing"
    prepared = "prepared"
    quiescing = "quiescing"
    quiesced = "quiesced"
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
    """One action of a handover; each has an undo, except execute."""

    prepare = "prepare"
    quiesce = "quiesce"
    """The rest of the host is stopped; only on the way to a jump that is orderly."""
    freeze = "freeze"
    activate = "activate"
    load = "load"
    execute = "execute"


class Generation(enum.Enum):
    """The interface through which userspace drives KHO on the running kernel."""

    none = "none"
    sysfs = "sysfs"
    finalize = "finalize"
    finalize_no_abort = "finalize_no_abort"
    stateless = "stateless"


class Order(enum.Enum):
    """Whether the state must be in the tree before an image is loaded, because loading copies the tree."""

    activate_first = "activate_first"
    load_first = "load_first"


@dataclass(frozen=True)
class Observed:
    """What the kernel itself shows at this moment."""

    boot_id: str
    release: str
    active: bool | None
    loaded: bool
    arrived: bool
    cmdline: str


@dataclass(frozen=True)
class StepTiming:
    """The duration of one step in seconds, and when it began (CLOCK_MONOTONIC)."""

    step: str
    began_monotonic: float
    seconds: float


@dataclass(frozen=True)
class Producer:
    """One holder of state as status shows it.

    `rank` counts from 0 in the order in which producers are called. `phase` is the last verb sent, `answer` the last
    answer to it, `seconds` how long it took or has taken so far, `progress` how much the producer says is done (0 to
    1), and `limit` its time limit in seconds, 0 if no verb was sent. `stopped_seconds` is how long its work stood still
    in the handover, by a clock of its own that stood still too; None if it did not say.
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
    stopped_seconds: float | None = None


@dataclass(frozen=True)
class Spot:
    """What was read of a preserved file while its producer was frozen, to be compared in the next kernel.

    `pages` are the numbers of the pages of 4 KiB that were read, none for all of them. `digest` is the SHA-256 of their
    SHA-256 digests in order; `marks` has the first 8 hex digits of each, to tell which page differs. With a `gap`
    nothing was read, for this reason.
    """

    size: int = 0
    pages: tuple[int, ...] = ()
    digest: str = ""
    marks: str = ""
    gap: str = ""


@dataclass(frozen=True)
class Kept:
    """A file descriptor in a producer's LUO session: the producer's name for it, and its token.

    `spot` is what was read of it, None if no khod came to that.
    """

    name: str
    token: int
    spot: Spot | None = field(default=None, compare=False)


class FindingSource(enum.Enum):
    """What a finding is about."""

    kernel = "kernel"
    """A blob of the state tree, or the whole tree."""
    producer = "producer"
    session = "session"
    """A LUO session that no producer registered."""
    khod = "khod"
    """Something that khod could not examine."""
    boot = "boot"
    """Which kernel was booted, and how."""
    log = "log"
    """A complaint in the kernel log of this boot."""
    content = "content"
    """The contents of a file that a producer handed over; the subject is the producer's name for it."""
    health = "health"
    """A health check of verify.d; the subject is its name."""
    blackout = "blackout"
    """The blackout, which was longer than the budget of the profile."""
    profile = "profile"
    """A check that the profile requires and that has not passed; the subject is its name."""


class FindingSeverity(enum.Enum):
    """What a finding means for the state."""

    lost = "lost"
    changed = "changed"
    unknown = "unknown"


@dataclass(frozen=True)
class Finding:
    """One problem of a handover: `text` says what, `subject` is the item of its source ("" for all of it).

    `producer` is the subject if that is a producer, else "".
    """

    producer: str
    text: str
    source: FindingSource = FindingSource.kernel
    subject: str = ""
    severity: FindingSeverity = FindingSeverity.lost

    @classmethod
    def of_producer(cls, name: str, text: str) -> "Finding":
        """Return the finding that a producer did not take its state back, with its reason."""
        return cls(name, text, FindingSource.producer, name)

    @classmethod
    def of_khod(cls, text: str) -> "Finding":
        """Return the finding that khod could not examine or find out something."""
        return cls("", text, FindingSource.khod, severity=FindingSeverity.unknown)


def render_findings(findings: Sequence[Finding]) -> str:
    """Join findings in one line; blobs with the same text are listed together."""
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


class CheckResult(enum.Enum):
    """The outcome of one check; it is `passed` because `pass` is a Python keyword.

    `off` is a failure that the operator has switched off: it was found, but refuses nothing.
    """

    passed = "passed"
    warn = "warn"
    fail = "fail"
    unsupported = "unsupported"
    skipped = "skipped"
    off = "off"


@dataclass(frozen=True)
class Check:
    """The outcome of one check before the jump, or of one after it: its name, its evidence, and what to do."""

    name: str
    result: CheckResult
    evidence: str
    remedy: str


@dataclass(frozen=True)
class Verdict:
    """How much of the state before the jump the next kernel has; names are those of the tree's blobs.

    `reason` is all `findings` in one line, "" without any. For the blobs in `unknown` it cannot be known whether they
    arrived. `checks` is the evidence: what was verified, with what result, also where nothing was found. `tolerated`
    are findings that do not make the handover degraded, because its profile says so.
    """

    arrived: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    reason: str = ""
    findings: list[Finding] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    tolerated: list[Finding] = field(default_factory=list)

    def with_findings(self, findings: Iterable[Finding]) -> "Verdict":
        """Return the same verdict with these findings, and with the reason rendered from them."""
        kept = list(findings)
        return replace(self, findings=kept, reason=render_findings(kept))


@dataclass(frozen=True)
class NotUndone:
    """One item that was not rolled back: its step, its producer ("" for the kernel), why, and what to do."""

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

    `name` is "" if the kernel does not show it. `holder` says who has it open, and `why` gives the reason for `fate`.
    An immediate jump keeps the session unless it is `incoming`, which means that it came from the previous kernel.
    """

    name: str
    holder: str
    fate: SessionFate
    why: str
    incoming: bool = False


@dataclass(frozen=True)
class TermsDeadlines:
    """Seconds of [deadlines] for one handover; None leaves those of the configuration."""

    prepare: float | None = None
    freeze: float | None = None
    activate: float | None = None
    load: float | None = None
    restore: float | None = None


@dataclass(frozen=True)
class Terms:
    """What must hold for one handover besides the configuration, as its profile says; None for nothing.

    `require` are producers that must take part. `blackout_budget` is the maximum blackout in seconds: a longer one
    makes the handover degraded. `must_pass` are checks of the verification: one that has not passed makes the handover
    degraded too, also where it was skipped. Findings of the sources in `tolerate` (log, health, boot) do not. The
    handover does not begin at `begin_before` (seconds since the epoch) or later; `window` describes that time, and
    `window_ignored` says that the operator has it ignored. `asked_by` is who asked for the run of the profile, as the
    caller says.
    """

    profile: str | None = None
    asked_by: str | None = None
    require: list[str] | None = None
    deadlines: TermsDeadlines | None = None
    blackout_budget: float | None = None
    must_pass: list[str] | None = None
    tolerate: list[str] | None = None
    begin_before: float | None = None
    window: str | None = None
    window_ignored: bool | None = None


NO_TERMS = Terms()
MAX_TERMS_SECONDS = 86400.0
"""The maximum of a deadline and of a budget: a day."""
TOLERABLE = (FindingSource.log, FindingSource.health, FindingSource.boot)
"""What a profile may tolerate: nothing of it says that state is missing or differs."""
VERIFICATION_CHECKS = (
    *("kho", "kernel", "tree", "memblock", "kexec-metadata", "log", "required", "luo", "blackout"),
    *("health", "contents"),
)
"""The checks of the verification; of the last two there is one for each file of verify.d, or each producer."""


def names_check(name: str) -> bool:
    """Whether a name is that of a check of the verification, or of all checks of one kind (`health`, `health NAME`)."""
    kind, _, subject = name.partition(" ")
    return kind in VERIFICATION_CHECKS and (not subject or kind in VERIFICATION_CHECKS[-2:])


@dataclass(frozen=True)
class Begun:
    """Who began the handover `run`, when (seconds since the epoch, 0 if unknown), and the image it loads.

    `profile` is the name of the profile by which it was begun, "" without one. With `luo_off` the kernel of the image
    starts with LUO off, and no file may be handed over to it. `kernel_release` and `kernel_banner` are what uname -r
    and /proc/version will say in the kernel of the image, "" if the image does not show it.
    """

    at: float = 0.0
    by: str = ""
    image: str = ""
    luo_off: bool = False
    kernel_release: str = ""
    kernel_banner: str = ""
    profile: str = ""


@dataclass(frozen=True)
class Announcement:
    """Who has announced the run of a profile (for people, "" for nobody), and whether its window is to be ignored."""

    by: str = ""
    ignore_window: bool = False


@dataclass(frozen=True)
class UnderWay:
    """The step that runs now, and how many seconds it has taken."""

    step: str
    seconds: float


@dataclass(frozen=True)
class ColdBoot:
    """What is known of a handover that ended as a cold boot, in the order from cause to detail.

    `reason` is one sentence. `last_phase` is the last one that the kernel before recorded, `journal_end` how its
    journal ends, `last_words` the end of what pstore kept of it, `watchdog` whether a watchdog reset the host (None if
    the kernel does not tell). `boot_id` is the boot in which `last_phase` was recorded. `is_image_suspect` says whether
    the image may be the cause: it was booted, or nobody knows that it was not.
    """

    reason: str
    last_phase: Phase = Phase.idle
    journal_end: str = ""
    last_words: list[str] = field(default_factory=list)
    watchdog: bool | None = None
    boot_id: str = ""
    is_image_suspect: bool = False


@dataclass(frozen=True)
class Status:
    """The state of the host, for the operator.

    `outcome` is the result of the handover into this boot (verified, degraded, cold_boot; idle without one); later
    handovers do not change it. `waiting_for` names producers, and units whose stop or start is waited for. `claims` are
    the producers that have not taken back what they left before the jump. `phase` is the machine's phase unless the
    kernel contradicts it: if this boot had no handover, an active phase or an image that is not khod's shows as
    `foreign`. The field `foreign` reports that in every case. `done` are the finished steps, `under_way` is the one
    that runs. `left` are the steps that a rollback could not undo, `not_undone` are the same item by item. `sessions`
    are LUO sessions of other processes, and `sessions_unseen` says why there may be more.
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
    cold_boot: ColdBoot | None = None
    blackout_error_seconds: float = 1.0
    image: str = ""
    """The image of the handover that ended as this cold boot; "" otherwise, and where it is not known."""
    terms: Terms = NO_TERMS
    """The terms of the handover under way, at rest those of the handover into this boot."""
    arrived_run: str = ""
    """The handover into this boot."""


class Fate(enum.Enum):
    """What happens to a word of the command line."""

    kept = "kept"
    added = "added"
    removed = "removed"


@dataclass(frozen=True)
class Word:
    """One word of the command line of the running kernel or of the next one.

    `lost` says what a handover loses by this change, "" for nothing.
    """

    text: str
    fate: Fate
    lost: str = ""


@dataclass(frozen=True)
class Planned:
    """One step of a planned handover: what it would do, and what its undo would do."""

    step: str
    does: str
    undo: str


@dataclass(frozen=True)
class Plan:
    """What a handover would do: its steps in order, the checks before it, and the changes of the command line."""

    steps: list[Planned]
    checks: list[Check]
    cmdline: str
    words: list[Word]
    rollback_seconds: float = 0.0
    """The maximum time of a rollback in seconds, from `khoctl abort` to its answer."""
    release: str = ""
    """The release of the next kernel; "" where its image does not show it, and without an image."""
    digests: list[str] = field(default_factory=list)
    """The SHA-256 of the next kernel and of its initrd, in hex, as the history has them."""


@dataclass(frozen=True)
class Snapshot:
    """A state tree kept at its handover; with `run` empty, another entry of the directory that is not a snapshot.

    `taken_at` is in seconds since the epoch, for people; snapshots are ordered by a sequence number instead. `bytes` is
    the size of all blobs, `digest` the SHA-256 of the root and then of each blob in order of name. `wrong` says what is
    wrong with it, "" for nothing. `outcome` is the result of its handover: this boot's outcome if it led here, the
    phase if it is under way, `rolled_back` if it began in this boot, "" if khod does not know.
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
    """The kind of an event; programs that keep or count events use this, never the message."""

    phase = "phase"
    """The handover entered another phase, and no step event says so."""
    step_began = "step_began"
    step_ended = "step_ended"
    """With its duration."""
    producer_called = "producer_called"
    """A verb was sent to a producer."""
    producer_answered = "producer_answered"
    """Its answer came, or it ended; with the duration."""
    producer_waits = "producer_waits"
    """It needs more time, or it connected or disconnected."""
    device = "device"
    note = "note"


@dataclass(frozen=True)
class Event:
    """One change as the monitor sees it: `seconds` is CLOCK_MONOTONIC, `at` the same instant by the wall clock.

    `producer` is the producer it is about, if any; `step` is the step that began or ended, and `duration` its seconds,
    or those of an answer. `words` is set in the event that reports the next kernel's command line. `boot_id` is set in
    the log of a run alone, which has the events of two boots.
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
    boot_id: str = ""
