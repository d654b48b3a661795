# SPDX-License-Identifier: LGPL-2.1-or-later
"""The watchdog that is to watch over the jump: whether it would be armed, and would run long enough."""

from khod.config import Config, WatchdogSettings
from khod.dataclass import dataclass
from khod.kernel.host import Watchdog, keeps_watchdogs, list_watchdogs
from khod.preflight.facts import CheckFinding, Facts
from khod.systemd import facts as systemd
from khod.systemd.watchdog import ManagerWatchdog

SECTION = "[watchdog] in /etc/kho/khod.toml"


@dataclass(frozen=True)
class Obstacle:
    """Why the watchdog is not armed for a jump, and what to do."""

    why: str
    remedy: str


def find_obstacle(
    settings: WatchdogSettings, watchdogs: list[Watchdog], manager: ManagerWatchdog | None
) -> Obstacle | None:
    """Return why the configured watchdog cannot be armed, or could not be disarmed again; None if it can.

    `watchdogs` are those of the kernel, `manager` is what systemd says, None if it cannot be asked.
    """
    name = device_name(settings.device)
    found = next((one for one in watchdogs if one.name == name), None)
    if found is None:
        here = ", ".join(one.name for one in watchdogs) or "none"
        return Obstacle(f"There is no watchdog {settings.device}; this host has: {here}", f"Correct {SECTION}.")
    if manager is None:
        return Obstacle("systemd, which arms the watchdog, cannot be asked", "Look at systemctl status.")
    if device_name(manager.device) != name:
        return Obstacle(
            f"systemd's watchdog is {manager.device}, and khod is to arm {settings.device}",
            f"Name the same device in {SECTION} and in WatchdogDevice= of /etc/systemd/system.conf.",
        )
    if found.max_timeout and found.max_timeout < settings.seconds:
        return Obstacle(
            f"{settings.device} takes at most {found.max_timeout} s, and is to run for {settings.seconds} s",
            f"Set `seconds` of {SECTION} to what it takes.",
        )
    if found.nowayout and not manager.runtime_seconds:
        return Obstacle(
            f"{settings.device} can never be disarmed (nowayout), and nobody would feed it after the jump",
            "Set RuntimeWatchdogSec= in /etc/systemd/system.conf, here and for the next kernel.",
        )
    return None


def device_name(device: str) -> str:
    """Return the kernel's name of a device: /dev/watchdog is the first one."""
    name = device.removeprefix("/dev/")
    return "watchdog0" if name == "watchdog" else name


def check_jump_watchdog(facts: Facts) -> CheckFinding:
    """The watchdog of the configuration can be armed for the jump, and is not stopped by the kernel on the way."""
    config, calls = facts.config, facts.kexec.calls
    manager = systemd.SystemdFacts().describe_watchdog() if calls.path_exists(systemd.BOOTED) else None
    obstacle = find_obstacle(config.watchdog, list_watchdogs(calls), manager)
    if obstacle is not None:
        return CheckFinding.warn_with(f"No watchdog would watch over the jump: {obstacle.why}", obstacle.remedy)
    if not keeps_watchdogs(calls):
        return CheckFinding.warn_with(
            f"The driver of {config.watchdog.device} may stop it at the jump, as some do at every reboot",
            "Boot with watchdog.stop_on_reboot=0, now and in the next kernel.",
        )
    return _check_seconds(config)


def _check_seconds(config: Config) -> CheckFinding:
    watchdog, restore = config.watchdog, config.deadlines.restore
    if watchdog.seconds < restore:
        return CheckFinding.warn_with(
            f"{watchdog.device} would run for {watchdog.seconds} s, less than deadlines.restore ({restore:g} s): it "
            "may reset a next kernel that is still starting",
            f"Set `seconds` of {SECTION} to the time of a jump, a boot and a restore.",
        )
    return CheckFinding.pass_with(f"{watchdog.device} is armed for the jump, with {watchdog.seconds} s")
