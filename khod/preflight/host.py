# SPDX-License-Identifier: LGPL-2.1-or-later
"""Checks of the host around the kernel."""

import math

from khod.errors import RecordError
from khod.handover.record import RESERVED_BYTES
from khod.kernel import host
from khod.preflight import minimum_uptime
from khod.preflight.facts import CheckFinding, Facts
from khod.preflight.watchdog import check_jump_watchdog
from khod.systemd import facts as systemd
from khod.systemd.logind import describe_inhibitors
from khod.text import format_size


def check_watchdog(facts: Facts) -> CheckFinding:
    """No hardware watchdog resets the host while the next kernel starts, but for the one that is to watch over it."""
    if facts.config.watchdog.device:
        return check_jump_watchdog(facts)
    found = host.list_watchdogs(facts.kexec.calls)
    armed = [one for one in found if one.armed]
    if not found:
        return CheckFinding.pass_with("This host has no hardware watchdog")
    names = ", ".join(
        f"{one.name}{f' ({one.identity})' if one.identity else ''}"
        f"{f', {one.timeout} s' if one.timeout is not None else ''}"
        for one in armed or found
    )
    if not armed:
        return CheckFinding.pass_with(f"No watchdog is armed: {names}")
    return CheckFinding.warn_with(
        f"A watchdog is armed and keeps running through the jump: {names}",
        "Be sure that the next kernel takes it over in that time; systemd.conf's RebootWatchdogSec= and "
        "KExecWatchdogSec= set what it is left with.",
    )


def check_uptime(facts: Facts) -> CheckFinding:
    """An orderly jump does not wait in the blackout until the host has been up for MinimumUptimeSec=."""
    calls = facts.kexec.calls
    up, found = facts.kexec.uptime(), minimum_uptime.read_setting(calls)
    if up is None or not calls.path_exists(systemd.BOOTED):
        return CheckFinding.skip_with(
            "The kernel does not say how long it has been up, or systemd does not run this host"
        )
    if facts.jumps_itself:
        return CheckFinding.pass_with("khod calls reboot(2) itself: systemd's MinimumUptimeSec= does not apply")
    wanted = minimum_uptime.DEFAULT_SECONDS if found is None else found.seconds
    if up >= wanted:
        return CheckFinding.pass_with(
            f"systemd would not wait: it asks for {wanted:g} s of uptime, this host has {up:.0f} s"
        )
    manager = systemd.SystemdFacts().describe_manager()
    if manager is not None and manager.version < minimum_uptime.SINCE_VERSION:
        return CheckFinding.pass_with(f"systemd {manager.version} asks for no uptime before a shutdown")
    if manager is not None and manager.machine and found is None:
        return CheckFinding.pass_with(f"systemd asks for no uptime in a virtual machine ({manager.machine})")
    return _too_early(up, wanted, found.where if found else "", certain=manager is not None)


def _too_early(up: float, wanted: float, where: str, *, certain: bool) -> CheckFinding:
    """Return the warning with the time left to wait; `where` is the place of the setting, "" for systemd's default."""
    left = "for ever" if math.isinf(wanted) else f"for {math.ceil(wanted - up)} s"
    source = f"set in {where}" if where else "its default on bare metal"
    wait = "" if math.isinf(wanted) else f"Wait {math.ceil(wanted - up)} s, or j"
    return CheckFinding.warn_with(
        f"This host has been up for {up:.0f} s, and systemd {'wants' if certain else 'may want'} {wanted:g} "
        f"(MinimumUptimeSec=, {source}): an orderly jump now would sleep {left} within the blackout, right before "
        "reboot(2). `now` does not wait",
        f"{wait or 'J'}ump with `now`, or set MinimumUptimeSec=0 in /etc/systemd/system.conf.d/kho.conf and run: "
        "systemctl daemon-reexec",
    )


def check_inhibitors(facts: Facts) -> CheckFinding:
    """No inhibitor blocks a shutdown."""
    if facts.inhibitors is None:
        return CheckFinding.skip_with("systemd-logind cannot be asked who blocks a shutdown")
    if facts.inhibitors:
        held = describe_inhibitors(facts.inhibitors)
        remedy = "End that first (systemd-inhibit --list), or jump at once with `now`."
        if facts.jumps_itself:  # nobody else would ask
            return CheckFinding.fail_with(held, remedy)
        return CheckFinding.warn_with(f"{held}; systemctl kexec would wait or refuse", remedy)
    return CheckFinding.pass_with("Nobody blocks a shutdown")


def check_disk(facts: Facts) -> CheckFinding:
    """The record and the snapshot can be written, and have enough space."""
    free = facts.store.free_bytes()
    if free < RESERVED_BYTES:
        return CheckFinding.fail_with(
            f"{format_size(free)} free in {facts.store.directory}; the record and the snapshot may need "
            f"{format_size(RESERVED_BYTES)}",
            "Free some space on that file system.",
        )
    return CheckFinding.pass_with(f"{format_size(free)} free in {facts.store.directory}")


def check_record(facts: Facts) -> CheckFinding | None:
    """The record can be read."""
    try:
        facts.store.read()
    except RecordError as error:
        return CheckFinding.from_error(error)
    return None
