# SPDX-License-Identifier: LGPL-2.1-or-later
"""One timeline of a run across both kernels, computed from its log.

Times are those of the first kernel's CLOCK_MONOTONIC, counted from the first `freeze`. From there on the rows without a
parent follow one another without a gap: what no step and no time stamp explains is a wait.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from khod.dataclass import dataclass
from khod.history.bridge import Bridge, bridge_clocks
from khod.history.model import Arrival, ClockReading, Departure, Moment, RowKind, RunLog, Timeline
from khod.history.phases import (
    Recovery,
    find_answers,
    find_execute,
    find_freeze,
    find_recovery,
    find_steps,
    split_events,
)
from khod.history.standstills import find_standstills
from khod.history.stretches import Chain, Stretch
from khod.model import Event, Phase

SHUTDOWN, FINAL = "shutdown", "systemd-shutdown"
NO_FREEZE = "No producer was told to freeze: the times count back from the end of the run."
CONTRADICTION = "systemd's time stamps of the shutdown contradict the run, and are left out."
NOT_STAMPED = "systemd left no time stamps of the shutdown: it keeps them since version 262, where LUO is on."
NO_TIMES = "The host came back, and systemd did not say when: its boot is one row."
UNPLACED = "The rows after the jump are placed as if it had taken no time."
UNRECOVERED = "The state was not recovered: there is no blackout to state."


def build_timeline(log: RunLog) -> Timeline:
    """Return the rows of a run, as far as its log tells; the blackout is None without a recovery or a bridge."""
    before, after = split_events(log.events)
    left, came = _split_readings(log)
    if log.arrival is not None and (began := log.arrival.began_monotonic):
        after = [replace(event, seconds=event.seconds - began) for event in after]
        came = [replace(one, monotonic=one.monotonic - began, boottime=one.boottime - began) for one in came]
    zero = find_freeze(before)
    unknown = [*(log.departure.unknown if log.departure else [])]
    if zero is None:
        unknown.append(NO_FREEZE)
        zero = before[-1].seconds if before else 0.0
    chain = Chain(zero)
    _append_steps(chain, before)
    asked = find_execute(before)
    if asked is None and before and (after or log.arrival or log.cold_boot):
        asked = before[-1].seconds  # what khod said of the jump itself may not have reached the disk
    if asked is None or _is_rolled_back(log):
        return Timeline(chain.rows, unknown=unknown)
    departure, said = _plausible_departure(log, asked)
    unknown += said
    _append_shutdown(chain, departure)
    arrival = log.arrival
    if arrival is None or log.cold_boot is not None:
        unknown += [UNRECOVERED] if log.cold_boot is not None else []
        return Timeline(chain.rows, unknown=unknown, analyze=arrival.analyze if arrival else "")
    jump_begin = _jump_begin(departure, asked)
    bridge = bridge_clocks(left, came, jump_begin)
    unknown += bridge.notes
    recovery = find_recovery(after)
    ready = arrival.ready_monotonic or next((event.seconds for event in after), None)
    boot = replace(arrival, ready_monotonic=ready)
    _append_boot(chain, _Boot(bridge, boot, recovery, jump_begin, _jump_name(log, departure)))
    if arrival.userspace_monotonic is None and arrival.khod_monotonic is None:
        unknown.append(NO_TIMES)
    if bridge.source is None:
        unknown.append(UNPLACED)
    if recovery is None:
        unknown.append(UNRECOVERED)
    known = bridge.source is not None and recovery is not None
    return Timeline(
        chain.rows,
        chain.seconds if known else None,
        bridge.error_seconds if known else 0.0,
        bridge.source,
        unknown,
        arrival.analyze,
        find_standstills(before, after, bridge) if bridge.source is not None else [],
    )


def _is_rolled_back(log: RunLog) -> bool:
    return log.end is not None and log.end.outcome in (Phase.idle, Phase.failed)


def _append_steps(chain: Chain, events: Sequence[Event]) -> None:
    """Append the steps before the jump; those that ended before the first `freeze` stand before 0."""
    answers = find_answers(events)
    for step in find_steps(events):
        inside = [one for one in answers if one.parent == step.name and step.begin <= one.begin <= step.end]
        if step.end <= chain.reached and chain.seconds == 0:
            chain.add_before(step, inside)
        else:
            chain.append(step, inside)


def _plausible_departure(log: RunLog, asked: float) -> tuple[Departure, list[str]]:
    """Return how the host went down, without time stamps that cannot be of this run, and a sentence on those."""
    found = log.departure or Departure()
    stamps = [
        stamp
        for stamp in (
            found.start_monotonic,
            found.finish_monotonic,
            found.late_start_monotonic,
            found.late_finish_monotonic,
        )
        if stamp is not None
    ]
    if log.target is not None and log.target.at_once:
        return Departure(), []
    if not stamps:
        return Departure(), [NOT_STAMPED]
    if stamps != sorted(stamps) or stamps[0] < asked:
        return Departure(), [CONTRADICTION]
    return found, []


def _append_shutdown(chain: Chain, found: Departure) -> None:
    """Append what systemd stamped: the stop of its units, its exit, systemd-shutdown."""
    start, finish = found.start_monotonic, found.finish_monotonic
    late_start, late_finish = found.late_start_monotonic, found.late_finish_monotonic
    if start is not None and finish is not None:
        units = [
            Stretch(RowKind.unit, stop.unit, stop.began_monotonic, stop.ended_monotonic, parent=SHUTDOWN)
            for stop in sorted(found.stops, key=lambda stop: stop.began_monotonic)
        ]
        chain.append(Stretch(RowKind.shutdown, SHUTDOWN, start, finish), units)
    if finish is not None and late_start is not None:
        chain.append(Stretch(RowKind.final, "exit", finish, late_start))
    if late_start is not None and late_finish is not None:
        sleep = []
        if found.sleep_seconds:
            begin = late_finish - found.sleep_seconds
            detail = "at most: systemd does not say when it began"
            sleep = [Stretch(RowKind.sleep, "minimum uptime", begin, late_finish, parent=FINAL, detail=detail)]
        chain.append(Stretch(RowKind.final, FINAL, late_start, late_finish), sleep)


def _split_readings(log: RunLog) -> tuple[list[ClockReading], list[ClockReading]]:
    """Return the readings of both kernels, by the boot in which they were taken."""
    moments = (Moment.start, Moment.begin)
    origin = log.begun.origin.boot_id if log.begun else ""
    origin = origin or next((one.boot_id for one in log.readings if one.moment in moments), "")
    came = log.arrival.kernel.boot_id if log.arrival else ""
    came = came or next((one.boot_id for one in log.readings if one.boot_id != origin), "")
    ordered = sorted(log.readings, key=lambda one: one.monotonic)
    return [one for one in ordered if one.boot_id == origin], [one for one in ordered if one.boot_id == came]


def _jump_begin(departure: Departure, asked: float) -> float:
    """Return the last instant before the jump that is known."""
    stamps = (departure.start_monotonic, departure.finish_monotonic, departure.late_start_monotonic)
    known = [stamp for stamp in (*stamps, departure.late_finish_monotonic) if stamp is not None]
    return max([asked, *known])


def _jump_name(log: RunLog, departure: Departure) -> str:
    if log.target is not None and log.target.at_once:
        return "jump"
    if departure.late_finish_monotonic is not None:
        return "LUO and jump"
    return f"{FINAL} and jump" if departure.finish_monotonic is not None else "shutdown and jump"


@dataclass(frozen=True)
class _Boot:
    """What is known of the boot after the jump; its own times are CLOCK_MONOTONIC of that kernel."""

    bridge: Bridge
    arrival: Arrival
    recovery: Recovery | None
    jump_begin: float
    jump_name: str

    def boundaries(self) -> Iterator[tuple[RowKind, str, float, str]]:
        """Yield what ended when: the kind and the name of a row, its end, and the parent of its children."""
        arrival, recovery = self.arrival, self.recovery
        first = arrival.initrd_monotonic or arrival.userspace_monotonic
        if first is not None:
            yield RowKind.kernel, "kernel", first, ""
        if arrival.initrd_monotonic and arrival.userspace_monotonic is not None:
            yield RowKind.initrd, "initrd", arrival.userspace_monotonic, ""
        if arrival.khod_monotonic is not None:
            yield RowKind.userspace, "userspace before khod", arrival.khod_monotonic, ""
        if arrival.ready_monotonic is not None:
            kind, name = RowKind.khod, "khod"
            if arrival.khod_monotonic is None:
                kind, name = (RowKind.kernel, "boot") if first is None else (RowKind.userspace, "userspace and khod")
            yield kind, name, arrival.ready_monotonic, ""
        if recovery is None:
            return
        if recovery.finished is None:
            yield RowKind.khod, "verification", recovery.ended, ""
            return
        if recovery.restored is not None:
            yield RowKind.restore, "restore", recovery.restored, "restore"
        yield RowKind.restore, "finish", recovery.finished, "finish"


def _append_boot(chain: Chain, boot: _Boot) -> None:
    """Append the jump and the boot after it; without a bridge the boot follows at once."""
    bridge = boot.bridge
    start = bridge.to_first(0.0) if bridge.source is not None else max(boot.jump_begin, chain.reached)
    if bridge.source is not None:
        begin = max(boot.jump_begin, chain.reached)
        chain.append(Stretch(RowKind.jump, boot.jump_name, begin, start, bridge.error_seconds))
    reached = start
    for kind, name, end, parent in boot.boundaries():
        inside = [
            Stretch(one.kind, one.name, start + one.begin, start + one.end, parent=parent, detail=one.detail)
            for one in (boot.recovery.answers if boot.recovery else ())
            if parent and one.parent == parent
        ]
        chain.append(Stretch(kind, name, reached, start + end), inside)
        reached = max(reached, start + end)
