# SPDX-License-Identifier: LGPL-2.1-or-later
"""Read the clocks of this kernel at one moment, so that `khod.history.bridge` can compare them with another kernel's.

CLOCK_MONOTONIC of a kernel is 0 where it begins to keep time (timekeeping_init()): what it does before, such as taking
over the memory, counts as the jump.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from khod.abi.calls import Calls
from khod.abi.clock_device import read_clock_device
from khod.abi.devices import BOUND_DEVICES
from khod.abi.proc import read_boot_id
from khod.dataclass import dataclass
from khod.deferred import defer_module
from khod.kernel.tracing import read_tsc

if TYPE_CHECKING:
    from khod.history import model as history
    from khod.history.model import Moment
else:
    history = defer_module("khod.history.model")

PTP_CLASS, RTC_CLASS = "/sys/class/ptp", "/sys/class/rtc"
HOST_CLOCK = re.compile(r"KVM virtual PTP|hyperv|ptp_vmw|vmclock\d+")
"""Names of PTP clocks that are the hypervisor's. Drivers of network cards may set theirs from the wall clock when they
start (igb and ixgbe do): it would go on over a kexec no better than the wall clock itself."""
MAX_RTC_SPAN_SECONDS = 0.1
"""A hardware clock that took longer to read is left out."""
SYSTEM_CLOCKS = (time.CLOCK_REALTIME, time.CLOCK_BOOTTIME)
TRIES = 3
"""How often a clock is read; the quickest time counts."""


@dataclass(frozen=True)
class _Bracketed:
    """A clock's value when CLOCK_MONOTONIC was between `before` and `after`."""

    value: float
    before: float
    after: float

    @property
    def span(self) -> float:
        return self.after - self.before

    def at(self, monotonic: float) -> float:
        """Return what the clock shows at another instant, some milliseconds away."""
        return self.value + monotonic - (self.before + self.after) / 2


def read_clocks(
    calls: Calls,
    moment: Moment,
    now: Callable[[], float] = time.monotonic,
    read_device: Callable[[str], float] = read_clock_device,
) -> history.ClockReading:
    """Return what the clocks show at this moment; a clock that cannot be read is None. OSError without a boot id.

    It takes some milliseconds, more on hosts with many processors (see `khod.kernel.tracing`). Call it in a worker.
    """
    boot_id = read_boot_id(calls)
    rtc, ptp = _read_rtc(calls, now), _read_ptp(calls, now, read_device)
    tsc = read_tsc(calls, now)
    real, boot = (_read_bracketed(partial(time.clock_gettime, clock), now) for clock in SYSTEM_CLOCKS)
    instant = tsc.monotonic if tsc else (real.before + real.after) / 2
    spans = [real.span, boot.span, *([tsc.span_seconds] if tsc else []), *([ptp[1].span] if ptp else [])]
    return history.ClockReading(
        moment=moment,
        boot_id=boot_id,
        monotonic=instant,
        boottime=boot.at(instant),
        realtime=real.at(instant),
        span_seconds=max(spans),
        tsc=tsc.cycles if tsc else None,
        ptp=ptp[1].at(instant) if ptp else None,
        ptp_name=ptp[0] if ptp else "",
        rtc=rtc.value + instant - rtc.after if rtc else None,
    )


def _read_bracketed(read: Callable[[], float], now: Callable[[], float]) -> _Bracketed:
    found = []
    for _ in range(TRIES):
        before = now()
        value = read()
        found.append(_Bracketed(value, before, now()))
    return min(found, key=lambda one: one.span)


def _read_ptp(
    calls: Calls, now: Callable[[], float], read_device: Callable[[str], float]
) -> tuple[str, _Bracketed] | None:
    """Return the name and the value of the hypervisor's clock, if there is one that khod may open."""
    for device in calls.list_directory(PTP_CLASS):
        with suppress(OSError):
            name = calls.read_file(f"{PTP_CLASS}/{device}/clock_name").decode(errors="replace").strip()
            if HOST_CLOCK.fullmatch(name):
                bound = f"{BOUND_DEVICES}/{device}"
                path = bound if calls.path_exists(bound) else f"/dev/{device}"
                return name, _read_bracketed(partial(read_device, path), now)
    return None


def _read_rtc(calls: Calls, now: Callable[[], float]) -> _Bracketed | None:
    """Return the seconds of the hardware clock from which the kernel sets its wall clock at boot."""
    for device in calls.list_directory(RTC_CLASS):
        with suppress(OSError, ValueError):
            if calls.read_file(f"{RTC_CLASS}/{device}/hctosys").strip() == b"1":
                before = now()
                seconds = float(int(calls.read_file(f"{RTC_CLASS}/{device}/since_epoch")))
                found = _Bracketed(seconds, before, now())
                return found if found.span < MAX_RTC_SPAN_SECONDS else None
    return None
