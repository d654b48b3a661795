# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host around KHO: lockdown, watchdogs, memory, the crash kernel, rights.

Each function that returns an optional value returns None if the kernel does not say.
"""

from contextlib import suppress

from khod.abi.calls import Calls
from khod.dataclass import dataclass

LOCKDOWN = "/sys/kernel/security/lockdown"
SECURE_BOOT = "/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
STATUS = "/proc/self/status"
WATCHDOGS = "/sys/class/watchdog"
CRASH = ("/sys/kernel/kexec/crash_loaded", "/sys/kernel/kexec_crash_loaded")  # the first since 6.19
CAP_SYS_BOOT = 22  # include/uapi/linux/capability.h
# The inodes of the initial namespaces: PROC_PID_INIT_INO, PROC_USER_INIT_INO (include/linux/proc_ns.h; in the uapi
# since 6.18)
INITIAL_NAMESPACES = {"pid": 0xEFFFFFFC, "user": 0xEFFFFFFD}
PROCESSORS = "/sys/devices/system/cpu"
STOP_ON_REBOOT = "/sys/module/watchdog/parameters/stop_on_reboot"  # since 5.12
WDIOF_CARDRESET = 0x20  # include/uapi/linux/watchdog.h
KIB = 1024


@dataclass(frozen=True)
class Watchdog:
    """A hardware watchdog; `timeout` is in seconds, None if the driver does not say.

    `max_timeout` is the longest one in seconds, 0 if the driver names none. With `nowayout` nobody can disarm it.
    """

    name: str
    identity: str
    armed: bool
    timeout: int | None
    max_timeout: int = 0
    nowayout: bool = False


def lockdown_level(calls: Calls) -> str | None:
    """Return the lockdown level: none, integrity or confidentiality."""
    if (text := _read_text(calls, LOCKDOWN)) is None:
        return None
    return text.partition("[")[2].partition("]")[0]


def secure_boot(calls: Calls) -> bool | None:
    """Whether the firmware booted with Secure Boot on: the EFI variable is four bytes of attributes, then its value."""
    if not calls.path_exists(SECURE_BOOT):
        return None
    return calls.read_file(SECURE_BOOT)[4:5] == b"\x01"


def may_boot(calls: Calls) -> bool | None:
    """Whether this process has CAP_SYS_BOOT in effect, which kexec_file_load(2) and reboot(2) require."""
    found = _read_field(calls, STATUS, "CapEff")
    return None if found is None else bool(int(found, 16) >> CAP_SYS_BOOT & 1)


def own_namespaces(calls: Calls) -> dict[str, bool]:
    """Return by kind whether this process is in the host's own namespace, without kinds the kernel does not show."""
    found = {}
    for kind, inode in INITIAL_NAMESPACES.items():
        with suppress(OSError):
            found[kind] = calls.read_link(f"/proc/self/ns/{kind}") == f"{kind}:[{inode}]"
    return found


def possible_processors(calls: Calls) -> int | None:
    """Return how many processors this host may ever have: num_possible_cpus()."""
    if not (text := _read_text(calls, f"{PROCESSORS}/possible")):
        return None
    ranges = (part.partition("-") for part in text.split(","))
    return sum(int(last or first) - int(first) + 1 for first, _, last in ranges)


def has_cpu_hotplug(calls: Calls) -> bool:
    """Whether this kernel can switch processors off (CONFIG_HOTPLUG_CPU): kernel/cpu.c then shows their states."""
    return calls.path_exists(f"{PROCESSORS}/hotplug")


def spinning_processors(calls: Calls) -> list[str]:
    """Return the processors that spin in memory by the firmware (arm64's `spin-table`): nothing can switch them off."""
    tree = "/proc/device-tree/cpus"
    methods = {name: _read_text(calls, f"{tree}/{name}/enable-method") for name in calls.list_directory(tree)}
    return [name for name, method in methods.items() if method and method.rstrip("\0") == "spin-table"]


def processor_bugs(calls: Calls) -> list[str]:
    """Return the bugs of these x86 processors that the kernel works around, by their names in /proc/cpuinfo."""
    return (_read_field(calls, "/proc/cpuinfo", "bugs") or "").split(" ")


def five_level_paging(calls: Calls) -> bool | None:
    """Whether this x86 kernel runs with five levels of page tables; without them it clears the flag."""
    if (found := _read_field(calls, "/proc/cpuinfo", "flags")) is None:
        return None
    return "la57" in found.split(" ")


def available_memory(calls: Calls) -> int | None:
    """Return the bytes of memory available without swapping."""
    found = _read_field(calls, "/proc/meminfo", "MemAvailable")
    return None if found is None else int(found.split()[0]) * KIB


def crash_loaded(calls: Calls) -> bool | None:
    """Whether a crash kernel is loaded in its own slot."""
    for path in CRASH:
        if (text := _read_text(calls, path)) is not None:
            return text == "1"
    return None


def list_watchdogs(calls: Calls) -> list[Watchdog]:
    """Return every watchdog device; without CONFIG_WATCHDOG_SYSFS none is shown as armed."""
    found = []
    for name in calls.list_directory(WATCHDOGS):
        words = ("state", "timeout", "max_timeout", "nowayout", "identity")
        state, timeout, longest, stays, identity = (_read_text(calls, f"{WATCHDOGS}/{name}/{what}") for what in words)
        seconds, most = (int(text) if text and text.isdecimal() else None for text in (timeout, longest))
        found.append(Watchdog(name, identity or "", state == "active", seconds, most or 0, stays == "1"))
    return found


def keeps_watchdogs(calls: Calls) -> bool:
    """Whether the kernel keeps every watchdog running through a reboot, as watchdog.stop_on_reboot=0 has it do.

    Without it that is the driver's choice, and a kexec is a reboot for it: kernel_restart_prepare() calls the notifier
    with SYS_RESTART. i6300esb and iTCO_wdt stop.
    """
    return _read_text(calls, STOP_ON_REBOOT) == "0"


def reset_by_watchdog(calls: Calls) -> bool | None:
    """Whether a watchdog reset the host before this boot, by the drivers' WDIOF_CARDRESET (i6300esb and others).

    A driver that does not look says the same as one that saw nothing, so False means only that none claims it.
    """
    found = [
        int(text)
        for name in calls.list_directory(WATCHDOGS)
        if (text := _read_text(calls, f"{WATCHDOGS}/{name}/bootstatus")) and text.isdecimal()
    ]
    return any(status & WDIOF_CARDRESET for status in found) if found else None


def _read_text(calls: Calls, path: str) -> str | None:
    return calls.read_file(path).decode(errors="replace").strip() if calls.path_exists(path) else None


def _read_field(calls: Calls, path: str, name: str) -> str | None:
    """Return the value of a `Name: value` line of a file in /proc."""
    for line in (_read_text(calls, path) or "").splitlines():
        key, _, value = line.partition(":")
        if key.rstrip("\t ") == name:
            return value.strip()
    return None
