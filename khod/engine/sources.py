# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where the recorder has the facts of a run from, on a host that systemd runs."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from khod.abi.calls import Calls
from khod.abi.proc import BOOT_ID
from khod.concurrency.worker import Worker
from khod.deferred import defer_module
from khod.engine.recorder import Sources

if TYPE_CHECKING:
    from khod.history import log as history_log
    from khod.history import model as history
    from khod.history.model import Departure, KernelFacts
    from khod.kernel import clocks
    from khod.preflight import minimum_uptime
    from khod.systemd import boot_times, departure
    from khod.systemd import manager as systemd_manager
else:
    history_log = defer_module("khod.history.log")
    history = defer_module("khod.history.model")
    clocks = defer_module("khod.kernel.clocks")
    minimum_uptime = defer_module("khod.preflight.minimum_uptime")
    boot_times = defer_module("khod.systemd.boot_times")
    departure = defer_module("khod.systemd.departure")
    systemd_manager = defer_module("khod.systemd.manager")

LOG_SECONDS = 60.0


def host_sources(calls: Calls) -> Sources:
    """Return the sources of a real host."""
    journal = Worker("journal", "The disk with the journal")
    return Sources(
        read_clocks=partial(_read_clocks, calls),
        read_departure=partial(_read_departure, calls, journal),
        read_arrival=_read_arrival,
    )


def simulated_sources(calls: Calls) -> Sources:
    """Return the sources of the simulated kernel: it has the clocks of the host it runs on, which its jump keeps."""

    def read_begin() -> float:
        return time.monotonic() - (time.time() - calls.modified_at(BOOT_ID))

    async def read_arrival(kernel: KernelFacts) -> history.Arrival:
        return history.Arrival(kernel, began_monotonic=read_begin())

    return Sources(read_clocks=partial(_read_clocks, calls), read_arrival=read_arrival, read_begin=read_begin)


def _read_clocks(calls: Calls, moment: history.Moment) -> history.ClockReading:
    return clocks.read_clocks(calls, moment)


async def _read_arrival(kernel: KernelFacts) -> history.Arrival:
    return await boot_times.read_arrival(kernel)


async def _read_departure(calls: Calls, journal: Worker, path: Path) -> Departure:
    """Return how the kernel in which a run began went down, with what the log of the run says of that kernel.

    Raises OSError or Failed where the log cannot be read.
    """
    log = await journal.call_within(partial(history_log.read_log, path), "reading the log", LOG_SECONDS)
    boot_id = log.begun.origin.boot_id if log.begun else ""
    before = [one for one in log.readings if one.boot_id == boot_id]
    suspended = before[-1].boottime - before[-1].monotonic if before else 0.0
    minimum = await _minimum_uptime(calls)
    return await departure.read_departure(boot_id, journal, minimum_uptime=minimum, suspended=suspended)


async def _minimum_uptime(calls: Calls) -> float:
    """Return the seconds of MinimumUptimeSec= of this boot; a file that sets it was there before the jump too."""
    if (found := minimum_uptime.read_setting(calls)) is not None:
        return found.seconds
    manager = await systemd_manager.ask_systemd(lambda systemd: systemd.describe_manager(), systemd_manager.ASK_SECONDS)
    bare_metal = manager is not None and not manager.machine and manager.version >= minimum_uptime.SINCE_VERSION
    return minimum_uptime.DEFAULT_SECONDS if bare_metal else 0.0
