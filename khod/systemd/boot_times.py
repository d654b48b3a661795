# SPDX-License-Identifier: LGPL-2.1-or-later
"""How this boot came up, by systemd's time stamps, and what `systemd-analyze time` says of them.

The manager's properties are described in org.freedesktop.systemd1(5); 0 is a time stamp that was not taken. Those of
the shutdown before (`PreviousShutdown*`) came with systemd 262, and arrive only with LUO.
"""

import asyncio
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from khod.history.model import Arrival, KernelFacts
from khod.systemd.dbus import BusError, systemd_bus
from khod.systemd.manager import ASK_SECONDS, Systemd
from khod.systemd.time_span import USEC_INFINITY, format_span

KHOD = "kho-handover.service"
DEFAULT_TARGET = "default.target"
RECHECK_SECONDS = 1.0
FINISH_SECONDS = 60.0
"""How long a boot that is verified may take until systemd calls it finished, before its times are read all the same."""
MILLISECOND = 1000
"""In microseconds, as every time stamp: the accuracy of systemd-analyze."""


def stamp_seconds(properties: Mapping[str, Any], name: str) -> float | None:
    """Return a time stamp in seconds; None if it was not taken, or this systemd has none of that name."""
    found = properties.get(name)
    if not isinstance(found, int) or found in (0, USEC_INFINITY):
        return None
    return found / 10**6


async def read_arrival(
    kernel: KernelFacts, ready_monotonic: float | None = None, *, finish_seconds: float = FINISH_SECONDS
) -> Arrival:
    """Return how this boot came up; where systemd does not answer, only what was given. It raises nothing.

    systemd-analyze has no times of a boot that is not finished: this waits for that, for `finish_seconds` at most.
    """
    arrival = Arrival(kernel, ready_monotonic=ready_monotonic)
    try:
        async with asyncio.timeout(finish_seconds + ASK_SECONDS), systemd_bus() as bus:
            systemd = Systemd(bus)
            manager = await _read_finished(systemd, finish_seconds)
            service = await systemd.read_properties(KHOD, "Service")
            target = await systemd.read_properties(DEFAULT_TARGET, "Unit")
    except (BusError, TimeoutError):
        return arrival
    ours = service if service.get("MainPID") == os.getpid() else {}
    return replace(
        arrival,
        initrd_monotonic=stamp_seconds(manager, "InitRDTimestampMonotonic"),
        userspace_monotonic=stamp_seconds(manager, "UserspaceTimestampMonotonic"),
        khod_monotonic=stamp_seconds(ours, "ExecMainStartTimestampMonotonic"),
        analyze=describe_boot(manager, target),
    )


async def _read_finished(systemd: Systemd, seconds: float) -> dict[str, Any]:
    """Return the manager's properties when the boot is finished, or after so many seconds."""
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    while True:
        manager = await systemd.read_manager()
        if stamp_seconds(manager, "FinishTimestampMonotonic") is not None or loop.time() >= until:
            return manager
        await asyncio.sleep(min(RECHECK_SECONDS, max(0.0, until - loop.time())))


def describe_boot(manager: Mapping[str, Any], target: Mapping[str, Any]) -> str:
    """Return what `systemd-analyze time` of systemd 262 prints; "" of a boot that is not finished, or in a container.

    As pretty_boot_time() in src/analyze/analyze-time-data.c does; `target` has the properties of default.target.
    """

    def stamp(name: str, properties: Mapping[str, Any] = manager) -> int:
        found = properties.get(f"{name}TimestampMonotonic")
        return found if isinstance(found, int) and found != USEC_INFINITY else 0

    initrd, userspace, finish = stamp("InitRD"), stamp("Userspace"), stamp("Finish")
    if not finish or not stamp("SecurityStart") or manager.get("SoftRebootsCount"):
        return ""
    firmware, loader = stamp("Firmware"), stamp("Loader")
    stopping = _shutdown_spans(
        [stamp(f"PreviousShutdown{name}") for name in ("Start", "Finish", "LateStart", "LateFinish")]
    )
    spans = [*stopping]
    spans += [(firmware - loader, "firmware")] if firmware else []
    spans += [(loader, "loader")] if loader else []
    spans.append((initrd or userspace, "kernel"))
    spans += [(userspace - initrd, "initrd")] if initrd else []
    spans.append((finish - userspace, "userspace"))
    total = firmware + finish + sum(span for span, _ in stopping)
    text = " + ".join(f"{format_span(span, MILLISECOND)} ({name})" for span, name in spans)
    reached = _describe_target(target.get("Id"), stamp("ActiveEnter", target), userspace)
    return f"Startup finished in {text} = {format_span(total, MILLISECOND)}{reached}"


def _shutdown_spans(stamps: list[int]) -> list[tuple[int, str]]:
    """Return the durations that systemd-analyze shows of the shutdown before: only where all four stamps are there."""
    if not all(stamps):
        return []
    start, finish, late_start, late_finish = stamps
    names = ("stopping", "exit", "systemd-shutdown")
    spans = (finish - start, late_start - finish, late_finish - late_start)
    return [(max(0, span), name) for span, name in zip(spans, names, strict=True)]


def _describe_target(name: object, reached: int, userspace: int) -> str:
    if not isinstance(name, str):
        return ""
    if not reached:
        return f"\n{name} was never reached."
    return f"\n{name} reached after {format_span(reached - userspace, MILLISECOND)} in userspace."
