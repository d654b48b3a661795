# SPDX-License-Identifier: LGPL-2.1-or-later
"""Invented run logs for the timeline: what two khods saw of one handover, with clocks that are exact."""

from dataclasses import replace

from khod.history.model import (
    Arrival,
    ClockReading,
    Departure,
    KernelFacts,
    Moment,
    RunBegun,
    RunEnd,
    RunLog,
    RunTarget,
    UnitStop,
)
from khod.model import Event, EventKind, Phase, Producer, Step

ZERO = 500.0
"""CLOCK_MONOTONIC of the first kernel at the first `freeze`."""
START = 510.0
"""The same when the second kernel started."""
TSC_HZ = 1_000_000_000
RUN = "0123456789abcdef"
FIRST, SECOND = KernelFacts("7.3.4", boot_id="first"), KernelFacts("7.3.4", boot_id="second")


def event(seconds: float, phase: Phase, kind: EventKind = EventKind.phase, **fields: object) -> Event:
    return replace(Event(seconds, phase, "", RUN, kind=kind), **fields)  # type: ignore[arg-type]


def step(name: Step, began: float, ended: float, phases: tuple[Phase, Phase]) -> list[Event]:
    return [
        event(began, phases[0], EventKind.step_began, step=name.value),
        event(ended, phases[1], EventKind.step_ended, step=name.value, duration=ended - began),
    ]


def call(name: str, verb: str, phase: Phase, began: float, ended: float, answer: str = "ready") -> list[Event]:
    """What a producer was told, and what it answered."""
    told = Producer(name, "peer", 0, verb, "", 0.0, True, None)
    answered = replace(told, answer=answer, waiting=False)
    return [
        event(began, phase, EventKind.producer_called, producer=told),
        event(ended, phase, EventKind.producer_answered, producer=answered, duration=ended - began),
    ]


def steps_before() -> list[Event]:
    """Stateless: the image is loaded before the freeze; the jump is asked for 0.4 s after it."""
    return [
        *step(Step.prepare, ZERO - 3, ZERO - 2, (Phase.preparing, Phase.prepared)),
        *step(Step.load, ZERO - 1, ZERO - 0.5, (Phase.loading, Phase.loaded)),
        event(ZERO - 0.001, Phase.freezing, EventKind.step_began, step="freeze"),
        *call("kv", "freeze", Phase.freezing, ZERO, ZERO + 0.2),
        event(ZERO + 0.25, Phase.frozen, EventKind.step_ended, step="freeze", duration=0.251),
        *step(Step.activate, ZERO + 0.25, ZERO + 0.3, (Phase.activating, Phase.active)),
        event(ZERO + 0.4, Phase.executing, EventKind.step_began, step="execute"),
    ]


def events_after() -> list[Event]:
    """CLOCK_MONOTONIC of the second kernel."""
    return [
        event(8.0, Phase.verifying),
        *call("kv", "restore", Phase.verifying, 9.0, 9.5),
        *call("kv", "finish", Phase.verifying, 9.6, 9.7),
        event(9.8, Phase.verified),
    ]


def reading(moment: Moment, monotonic: float) -> ClockReading:
    """Read clocks that have no error, within no time."""
    second = moment in (Moment.arrival, Moment.end)
    real = monotonic + (START if second else 0.0)
    boot = SECOND.boot_id if second else FIRST.boot_id
    return ClockReading(moment, boot, monotonic, monotonic, 1.8e9 + real, 0.0, tsc=round(real * TSC_HZ))


STOPS = [UnitStop("kv.service", ZERO + 0.6, ZERO + 1.5), UnitStop("ssh.service", ZERO + 1.0, ZERO + 4.9)]
DEPARTURE = Departure(
    start_monotonic=ZERO + 0.5,
    finish_monotonic=ZERO + 5.0,
    late_start_monotonic=ZERO + 5.1,
    late_finish_monotonic=ZERO + 5.4,
    stops=STOPS,
)
ARRIVAL = Arrival(SECOND, None, 1.25, 7.0, 8.0, analyze="Startup finished in 1.250s (kernel)")


def orderly() -> RunLog:
    """Return the log of a handover by systemctl kexec that was verified."""
    return RunLog(
        run=RUN,
        begun=RunBegun(RUN, 1.8e9, "uid 0", FIRST, "stateless"),
        target=RunTarget(SECOND),
        events=[*steps_before(), *events_after()],
        readings=[
            reading(Moment.start, ZERO - 300),
            reading(Moment.begin, ZERO - 5),
            reading(Moment.arrival, 8.0),
            reading(Moment.end, 12.0),
        ],
        departure=DEPARTURE,
        arrival=ARRIVAL,
        end=RunEnd(Phase.verified, 1.8e9 + 30),
    )


def at_once() -> RunLog:
    """Return the log of the same handover with --now."""
    log = orderly()
    log.target = RunTarget(SECOND, at_once=True)
    log.departure = Departure()
    return log
