# SPDX-License-Identifier: LGPL-2.1-or-later
"""Bridge the clocks of two kernels: an instant of the second one's CLOCK_MONOTONIC as one of the first one's.

The first source that both kernels have and that contradicts nothing known is used: the TSC, a PTP clock, the wall
clock. Each result has the maximum error that follows from how its clocks were read.
"""

from collections.abc import Callable, Sequence
from itertools import combinations

from khod.dataclass import dataclass
from khod.history.model import ClockReading, ClockSource

MAX_SLEW = 500e-6
"""By how much two clocks may run apart: the kernel slews CLOCK_MONOTONIC by no more (MAXFREQ in linux/timex.h)."""
MAX_JUMP_SECONDS = 600.0
"""A longer time between the last sign of a kernel and the first of the next one means that a clock was set."""
WALL_SECONDS = 1.0
"""The precision of the wall clock over a kexec: the next kernel sets it from a clock that counts whole seconds."""
RTC_SECONDS = 1.1
"""How much later than its reading says a hardware clock may have been: see `ClockReading.rtc`."""
STEP_SECONDS = 0.2
"""A wall clock that moves by more against CLOCK_MONOTONIC, beyond MAX_SLEW, was set."""

SLEEP_SECONDS = 0.1
"""By how much CLOCK_BOOTTIME moves against CLOCK_MONOTONIC at least where the host was suspended."""


@dataclass(frozen=True)
class Bridge:
    """How far the second kernel's CLOCK_MONOTONIC is behind the first one's, in seconds, give or take the error.

    `notes` has a sentence for each clock that was left out although it was read, and for a wall clock that was set.
    """

    source: ClockSource | None
    offset: float = 0.0
    error_seconds: float = 0.0
    notes: tuple[str, ...] = ()

    def to_first(self, monotonic: float) -> float:
        """Return an instant of the second kernel as one of the first."""
        return monotonic + self.offset


@dataclass(frozen=True)
class _Offset:
    seconds: float
    error: float


def bridge_clocks(before: Sequence[ClockReading], after: Sequence[ClockReading], last_monotonic: float) -> Bridge:
    """Return the bridge between the readings of two kernels; without a source if no clock can be trusted.

    `last_monotonic` is the last sign of the first kernel: the second one started after it.
    """
    notes: list[str] = []
    if not before or not after:
        missing = "before" if not before else "after"
        return Bridge(None, notes=(f"The clocks of the kernel {missing} the jump were not read.",))
    before, after = _without_sleep(before, before[-1]), _without_sleep(after, after[0])
    found: dict[ClockSource, _Offset] = {}
    for source, compute in _SOURCES.items():
        offset = compute(before, after)
        if isinstance(offset, str):
            notes += [offset] if offset else []
        elif reason := _contradiction(offset, last_monotonic):
            notes.append(f"{NAMES[source]} is not used: by it {reason}.")
        else:
            found[source] = offset
    if not found:
        return Bridge(None, notes=(*notes, "The clocks of the two kernels cannot be compared."))
    source, offset = next(iter(found.items()))
    notes += _wall_steps(offset, _wall_offset(before, after)) if source is not ClockSource.wall else []
    slew = after[-1].monotonic * MAX_SLEW  # from the readings to the kernel's start
    return Bridge(source, offset.seconds, offset.error + slew, tuple(notes))


def _contradiction(offset: _Offset, last_monotonic: float) -> str:
    jump = offset.seconds - last_monotonic
    if jump < -offset.error:
        return f"the next kernel started {-jump:.3f} s before the last sign of the one before"
    if jump > MAX_JUMP_SECONDS + offset.error:
        return f"the jump took {jump:.0f} s"
    return ""


def _wall_steps(best: _Offset, wall: _Offset) -> list[str]:
    step = wall.seconds - best.seconds
    if abs(step) <= best.error + wall.error + WALL_SECONDS:  # a loaded guest's clock was off by more than its second
        return []
    return [f"The wall clock was set by about {step:+.0f} s between the two kernels."]


def _by_tsc(before: Sequence[ClockReading], after: Sequence[ClockReading]) -> _Offset | str:
    ours, theirs = ([one for one in readings if one.tsc is not None] for readings in (before, after))
    if not ours or not theirs:
        return ""
    rates = [rate for rate in (_tsc_rate(ours), _tsc_rate(theirs)) if rate is not None]
    if not rates:
        return "The TSC is not used: its rate is not known, because it was read once in each kernel."
    cycles, error = min(rates, key=lambda rate: rate[1])
    for other, unsure in rates:
        if abs(other - cycles) > cycles * (error + unsure + MAX_SLEW):
            return "The TSC is not used: its rate changed over the jump."
    left, came = ours[-1], theirs[0]
    gap = ((came.tsc or 0) - (left.tsc or 0)) / cycles
    if gap <= 0:
        return "The TSC is not used: it went back."
    return _Offset(left.monotonic + gap - came.monotonic, _span_error(left, came) + gap * (error + MAX_SLEW))


def _tsc_rate(readings: Sequence[ClockReading]) -> tuple[float, float] | None:
    """Return the TSC's cycles in a second of CLOCK_MONOTONIC, and their relative error."""
    first, last = readings[0], readings[-1]
    seconds, cycles = last.monotonic - first.monotonic, (last.tsc or 0) - (first.tsc or 0)
    error = _span_error(first, last)
    if seconds <= error or cycles <= 0:
        return None
    return cycles / seconds, error / (seconds - error)


def _by_ptp(before: Sequence[ClockReading], after: Sequence[ClockReading]) -> _Offset | str:
    for left in reversed(before):
        for came in after:
            if left.ptp is not None and came.ptp is not None and left.ptp_name == came.ptp_name:
                gap = came.ptp - left.ptp
                error = _span_error(left, came) + abs(gap) * MAX_SLEW
                return _Offset(left.monotonic + gap - came.monotonic, error)
    return ""


def _by_wall(before: Sequence[ClockReading], after: Sequence[ClockReading]) -> _Offset | str:
    """Compare the hardware clocks where both kernels showed one, else the wall clocks.

    The hardware clock is not set with the wall clock, and each reading of it narrows its offset to CLOCK_MONOTONIC.
    """
    ours, theirs = _rtc_bounds(before), _rtc_bounds(after)
    if ours is None or theirs is None:
        if _was_set(before) or _was_set(after):
            return "The wall clock is not used: it was set while it was watched."
        return _wall_offset(before, after)
    low, high = theirs[0] - ours[1], theirs[1] - ours[0]
    if ours[0] > ours[1] or theirs[0] > theirs[1]:
        return "The hardware clock is not used: it was set while it was watched."
    gap = after[0].monotonic - before[-1].monotonic + (low + high) / 2
    return _Offset((low + high) / 2, (high - low) / 2 + abs(gap) * MAX_SLEW)


def _wall_offset(before: Sequence[ClockReading], after: Sequence[ClockReading]) -> _Offset:
    left, came = before[-1], after[0]
    gap = came.realtime - left.realtime
    return _Offset(left.monotonic + gap - came.monotonic, WALL_SECONDS + _span_error(left, came) + abs(gap) * MAX_SLEW)


def _rtc_bounds(readings: Sequence[ClockReading]) -> tuple[float, float] | None:
    """Return between which bounds the hardware clock is ahead of CLOCK_MONOTONIC; None where it was not read.

    The first bound is higher than the second if the clock was set.
    """
    last = readings[-1].monotonic
    bounds = [(one.rtc - one.monotonic, (last - one.monotonic) * MAX_SLEW) for one in readings if one.rtc is not None]
    if not bounds:
        return None
    return max(low - drift for low, drift in bounds), min(low + RTC_SECONDS + drift for low, drift in bounds)


def _without_sleep(readings: Sequence[ClockReading], beside: ClockReading) -> list[ClockReading]:
    """Return the readings between which and one of them the host was not suspended: CLOCK_MONOTONIC stops there."""
    slept = beside.boottime - beside.monotonic
    return [one for one in readings if abs(one.boottime - one.monotonic - slept) <= SLEEP_SECONDS]


def _was_set(readings: Sequence[ClockReading]) -> bool:
    """Whether the wall clock was set between two readings of one kernel."""
    for one, other in combinations(readings, 2):
        moved = abs((other.realtime - one.realtime) - (other.monotonic - one.monotonic))
        if moved > STEP_SECONDS + (other.monotonic - one.monotonic) * MAX_SLEW:
            return True
    return False


def _span_error(one: ClockReading, other: ClockReading) -> float:
    """Return how far the clocks of two readings may be apart because they were not read at the same instant."""
    return (one.span_seconds + other.span_seconds) / 2


_SOURCES: dict[ClockSource, Callable[[Sequence[ClockReading], Sequence[ClockReading]], _Offset | str]] = {
    ClockSource.tsc: _by_tsc,
    ClockSource.ptp: _by_ptp,
    ClockSource.wall: _by_wall,
}
NAMES = {ClockSource.tsc: "The TSC", ClockSource.ptp: "The PTP clock", ClockSource.wall: "The wall clock"}
