# SPDX-License-Identifier: LGPL-2.1-or-later
"""How the kernel before went down, as systemd tells after the jump: its time stamps, and its journal."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from khod.concurrency.worker import Worker
from khod.errors import KhoError
from khod.history.model import Departure
from khod.systemd.boot_times import stamp_seconds
from khod.systemd.manager import ASK_SECONDS, ask_systemd
from khod.systemd.stops import READ_SECONDS, Stops, read_stops
from khod.text import one_line

SLEPT_SECONDS = 0.5
"""Within this time after it had slept for the minimum uptime, systemd-shutdown of 262 takes its last time stamp."""
NO_ANSWER = "How the kernel before went down is not known: systemd did not answer."


async def read_departure(
    boot_id: str, worker: Worker, *, minimum_uptime: float = 0.0, suspended: float = 0.0
) -> Departure:
    """Return how the boot `boot_id`, the one before this one, went down. It raises nothing; `unknown` says what failed.

    `minimum_uptime` is that boot's MinimumUptimeSec= in seconds, `suspended` how far its CLOCK_BOOTTIME was ahead of
    its CLOCK_MONOTONIC. The journal is read in `worker`.
    """
    manager = await ask_systemd(lambda systemd: systemd.read_manager(), ASK_SECONDS)
    if manager is None:
        return Departure(unknown=[NO_ANSWER])
    found = _read_stamps(manager)
    found = replace(found, sleep_seconds=_find_sleep(found, minimum_uptime, suspended))
    if found.start_monotonic is None or found.finish_monotonic is None:
        return found
    stops = await _read_stops(worker, boot_id, found.start_monotonic, found.finish_monotonic)
    return replace(found, stops=stops.stops, unknown=stops.unknown)


def _read_stamps(manager: Mapping[str, Any]) -> Departure:
    def stamp(name: str) -> float | None:
        return stamp_seconds(manager, f"PreviousShutdown{name}TimestampMonotonic")

    return Departure(stamp("Start"), stamp("Finish"), stamp("LateStart"), stamp("LateFinish"))


def _find_sleep(found: Departure, minimum_uptime: float, suspended: float) -> float | None:
    """Return how long systemd-shutdown may have slept; None if it did not.

    It sleeps until CLOCK_BOOTTIME has reached the minimum, and then takes its last time stamp. Nothing says when it
    began, so the whole time of systemd-shutdown is the most.
    """
    if not minimum_uptime or found.late_start_monotonic is None or found.late_finish_monotonic is None:
        return None
    passed = found.late_finish_monotonic + suspended - minimum_uptime
    if not 0 <= passed <= SLEPT_SECONDS:
        return None
    return max(0.0, min(minimum_uptime - suspended, found.late_finish_monotonic) - found.late_start_monotonic) or None


async def _read_stops(worker: Worker, boot_id: str, since: float, until: float) -> Stops:
    try:
        reading = partial(read_stops, boot_id, since, until)
        return await worker.call_within(reading, "reading the journal", READ_SECONDS + ASK_SECONDS)
    except (KhoError, OSError) as error:
        return Stops(unknown=[f"How long each unit took to stop is not known: {one_line(str(error))}."])
    except Exception as error:  # noqa: BLE001 - the journal's files may be anything, and a handover is not to fail by them
        return Stops(unknown=[f"How long each unit took to stop is not known: the journal reader failed: {error!r}."])
