# SPDX-License-Identifier: LGPL-2.1-or-later
"""The table of metrics: each with its name, its type, what it means, and how it is read.

Names follow Prometheus' conventions: base units, `_total` for what only grows, `_info` for a constant 1 that carries
text in its labels. One of several states is a series for each, of which one is 1.
"""

import enum
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import field

from khod import __version__
from khod.dataclass import dataclass
from khod.handover.machine import RESTING
from khod.history.model import AttemptSummary, Standstill
from khod.model import FindingSeverity, FindingSource, Phase, Producer, Status
from khod.producers.barrier import READY

MAX_PRODUCERS = 200
"""Maximum number of producers with a series of their own: systemd-report takes 1024 metrics of a whole host."""
ROLLED_BACK = "rolled_back"
OUTCOMES = {
    Phase.verified: "verified",
    Phase.degraded: "degraded",
    Phase.cold_boot: "cold_boot",
    Phase.idle: ROLLED_BACK,
    Phase.failed: "failed",
}
"""How a handover can end, and the label of it: what is rolled back ends as idle."""
BOOT_OUTCOMES = {**{phase: OUTCOMES[phase] for phase in RESTING}, Phase.idle: "none"}
PRODUCER_STATES = ("idle", "waiting", "ready", "refused")

Labels = dict[str, str]


class MetricType(enum.Enum):
    """The type of a metric, by the name that Prometheus and systemd both have for it."""

    counter = "counter"
    gauge = "gauge"


@dataclass(frozen=True)
class MetricFacts:
    """What metrics are read from.

    `counts` is how many handovers ended in each way, `last` the last one, and `standstills` how long its producers were
    stopped, the longest first; without a history they are empty.
    """

    status: Status
    counts: Mapping[Phase, int] = field(default_factory=dict)
    last: AttemptSummary | None = None
    standstills: Sequence[Standstill] = ()


@dataclass(frozen=True)
class Sample:
    """One value of a metric, in its base unit."""

    value: float
    labels: Labels = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    """One metric: `name` without a prefix, `help` as one sentence, and what reads its samples.

    A metric without a sample is not known now.
    """

    name: str
    type: MetricType
    help: str
    read: Callable[[MetricFacts], Iterable[Sample]]


def _read_one(value: float | None) -> list[Sample]:
    """Return a sample without labels, or none where the value is not known."""
    return [] if value is None else [Sample(value)]


def _read_states(label: str, states: Iterable[str], current: str) -> list[Sample]:
    """Return a sample for each state, 1 for the current one."""
    return [Sample(int(state == current), {label: state}) for state in states]


def _read_last_outcome(facts: MetricFacts) -> list[Sample]:
    return [] if facts.last is None else _read_states("outcome", OUTCOMES.values(), OUTCOMES[facts.last.outcome])


def _read_last_blackout(facts: MetricFacts) -> list[Sample]:
    """Return the blackout of the last handover that ended in a kernel; without a history, that of this boot."""
    return _read_one(facts.status.blackout_seconds if facts.last is None else facts.last.blackout_seconds)


def _read_blackout_error(facts: MetricFacts) -> list[Sample]:
    known = facts.last is not None and facts.last.blackout_seconds is not None
    return [Sample(facts.last.blackout_error_seconds)] if facts.last is not None and known else []


def _state_of(producer: Producer) -> str:
    if producer.waiting:
        return "waiting"
    if not producer.phase:
        return "idle"
    return "ready" if producer.answer == READY else "refused"


def _read_producers(facts: MetricFacts) -> list[Sample]:
    found = Counter(_state_of(producer) for producer in facts.status.producers)
    return [Sample(found[state], {"state": state}) for state in PRODUCER_STATES]


def _read_producer_seconds(facts: MetricFacts) -> Iterator[Sample]:
    """Yield the seconds of each producer that was told something, of the slowest MAX_PRODUCERS."""
    told = [producer for producer in facts.status.producers if producer.phase]
    for producer in sorted(told, key=lambda producer: -producer.seconds)[:MAX_PRODUCERS]:
        yield Sample(producer.seconds, {"producer": producer.name, "kind": producer.kind, "verb": producer.phase})


def _read_standstills(facts: MetricFacts) -> Iterator[Sample]:
    """Yield how long producers were stopped by khod's account, and by their own; of those that were longest."""
    for one in facts.standstills[:MAX_PRODUCERS]:
        labels = {"producer": one.name, "kind": one.kind}
        yield Sample(one.seconds, {**labels, "clock": "host"})
        if one.own_seconds is not None:
            yield Sample(one.own_seconds, {**labels, "clock": "own"})


def _read_findings(facts: MetricFacts) -> list[Sample]:
    verdict = facts.status.verdict
    if verdict is None:
        return []
    found = Counter((finding.source, finding.severity) for finding in verdict.findings)
    return [
        Sample(found[source, severity], {"source": source.value, "severity": severity.value})
        for source in FindingSource
        for severity in FindingSeverity
        if found[source, severity] or severity is FindingSeverity.lost
    ]


def _read_kernel(facts: MetricFacts) -> list[Sample]:
    status = facts.status
    if not status.kernel_release:
        return []
    return [Sample(1, {"release": status.kernel_release, "generation": status.generation.value})]


METRICS = (
    Metric("info", MetricType.gauge, "The version of khod.", lambda _facts: [Sample(1, {"version": __version__})]),
    Metric(
        "kernel_info",
        MetricType.gauge,
        "The running kernel, and the interface through which it hands over.",
        _read_kernel,
    ),
    Metric(
        "phase",
        MetricType.gauge,
        "Whether the handover is in this phase.",
        lambda facts: _read_states("phase", (phase.value for phase in Phase), facts.status.phase.value),
    ),
    Metric(
        "handovers_total",
        MetricType.counter,
        "Handovers that ended, by how they ended.",
        lambda facts: [
            Sample(facts.counts.get(phase, 0), {"outcome": label})
            for phase, label in (OUTCOMES.items() if facts.counts or facts.last else ())
        ],
    ),
    Metric(
        "last_handover_timestamp_seconds",
        MetricType.gauge,
        "When the last handover ended, in seconds since the epoch.",
        lambda facts: _read_one(None if facts.last is None else facts.last.ended_at),
    ),
    Metric(
        "last_handover_outcome", MetricType.gauge, "Whether the last handover ended in this way.", _read_last_outcome
    ),
    Metric(
        "last_blackout_seconds",
        MetricType.gauge,
        "How long the producers stood still in the last handover.",
        _read_last_blackout,
    ),
    Metric(
        "last_blackout_error_seconds", MetricType.gauge, "The maximum error of that duration.", _read_blackout_error
    ),
    Metric(
        "last_step_seconds",
        MetricType.gauge,
        "How long each step of the last handover took.",
        lambda facts: [Sample(timing.seconds, {"step": timing.step}) for timing in facts.status.timings],
    ),
    Metric(
        "boot_outcome",
        MetricType.gauge,
        "Whether the handover into this boot ended in this way.",
        lambda facts: _read_states(
            "outcome", BOOT_OUTCOMES.values(), BOOT_OUTCOMES.get(facts.status.outcome, BOOT_OUTCOMES[Phase.idle])
        ),
    ),
    Metric(
        "handovers_since_cold_boot",
        MetricType.gauge,
        "Kernels that were reached by a handover, one after the other, since the last cold boot.",
        lambda facts: _read_one(facts.status.handovers),
    ),
    Metric("findings", MetricType.gauge, "Problems that the verification of this boot found.", _read_findings),
    Metric("producers", MetricType.gauge, "Producers by their answer to what they were told last.", _read_producers),
    Metric(
        "producer_answer_seconds",
        MetricType.gauge,
        "How long the producer took for its last answer; of the slowest ones.",
        _read_producer_seconds,
    ),
    Metric(
        "last_producer_stopped_seconds",
        MetricType.gauge,
        "How long the last handover stopped the producer, by the host's clock and by its own; of the longest.",
        _read_standstills,
    ),
    Metric(
        "claims",
        MetricType.gauge,
        "Producers that have not taken back what they left before the jump.",
        lambda facts: _read_one(len(facts.status.claims)),
    ),
    Metric(
        "not_undone",
        MetricType.gauge,
        "What a rollback could not put back.",
        lambda facts: _read_one(len(facts.status.not_undone)),
    ),
    Metric(
        "foreign",
        MetricType.gauge,
        "Whether another program uses KHO or kexec.",
        lambda facts: _read_one(int(facts.status.foreign)),
    ),
    Metric(
        "status_stale",
        MetricType.gauge,
        "Whether the kernel did not answer, and what it last said is shown.",
        lambda facts: _read_one(int(facts.status.stale)),
    ),
)
