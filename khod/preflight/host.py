"""Checks of the host around the kernel."""

from khod.errors import RecordError
from khod.kernel import host
from khod.preflight.facts import Facts, Finding
from khod.record import RESERVE


def watchdog(facts: Facts) -> Finding:
    """No hardware watchdog bites while the next kernel starts."""
    found = host.watchdogs(facts.kexec.calls)
    armed = [one for one in found if one.armed]
    if not found:
        return Finding.passed("This host has no hardware watchdog")
    names = ", ".join(
        f"{one.name}{f' ({one.identity})' if one.identity else ''}"
        f"{f', {one.timeout} s' if one.timeout is not None else ''}"
        for one in armed or found
    )
    if not armed:
        return Finding.passed(f"No watchdog is armed: {names}")
    return Finding.warn(
        f"A watchdog is armed and keeps running through the jump: {names}",
        "Be sure that the next kernel takes it over in that time; systemd.conf's RebootWatchdogSec= and "
        "KExecWatchdogSec= set what it is left with.",
    )


def inhibitors(facts: Facts) -> Finding:
    """Nobody blocks a shutdown: systemctl kexec would refuse."""
    if facts.inhibitors is None:
        return Finding.skipped("systemd-logind cannot be asked who blocks a shutdown")
    if facts.inhibitors:
        held = "; ".join(f"{one.who} ({one.why})" for one in facts.inhibitors)
        return Finding.warn(
            f"A shutdown is blocked, and systemctl kexec would wait or refuse: {held}",
            "End that first (systemd-inhibit --list), or jump at once with --now.",
        )
    return Finding.passed("Nobody blocks a shutdown")


def disk(facts: Facts) -> Finding:
    """The record and the snapshot have room."""
    free = facts.store.free()
    if free < RESERVE:
        return Finding.fail(
            f"{free >> 10} KiB are free in {facts.store.directory}, the record and the "
            f"snapshot may need {RESERVE >> 10}",
            "Make room there.",
        )
    return Finding.passed(f"{free >> 20} MiB are free in {facts.store.directory}")


def record(facts: Facts) -> Finding | None:
    """The record can be read."""
    try:
        facts.store.read()
    except RecordError as error:
        return Finding.of(error)
    return None
