"""What stands around KHO on this host and may be in the way: lockdown, watchdogs, memory, the crash kernel, rights.

Each function answers None where the kernel does not say.
"""

from dataclasses import dataclass

from khod.abi.calls import Calls

LOCKDOWN = "/sys/kernel/security/lockdown"
SECURE_BOOT = "/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
STATUS = "/proc/self/status"
WATCHDOGS = "/sys/class/watchdog"
CRASH = ("/sys/kernel/kexec/crash_loaded", "/sys/kernel/kexec_crash_loaded")  # the first from 6.19
CAP_SYS_BOOT = 22  # include/uapi/linux/capability.h
KIB = 1024


@dataclass(frozen=True)
class Watchdog:
    """A hardware watchdog; `timeout` in seconds, None where the driver does not say."""

    name: str
    identity: str
    armed: bool
    timeout: int | None


def lockdown(calls: Calls) -> str | None:
    """The level: none, integrity or confidentiality."""
    if (text := _text(calls, LOCKDOWN)) is None:
        return None
    return text.partition("[")[2].partition("]")[0]


def secure_boot(calls: Calls) -> bool | None:
    """Whether the firmware booted with Secure Boot on: an EFI variable is four bytes of attributes, then its value."""
    if not calls.exists(SECURE_BOOT):
        return None
    return calls.read(SECURE_BOOT)[4:5] == b"\x01"


def may_boot(calls: Calls) -> bool | None:
    """Whether this process has CAP_SYS_BOOT in effect, which kexec_file_load(2) and reboot(2) ask for."""
    found = _field(calls, STATUS, "CapEff")
    return None if found is None else bool(int(found, 16) >> CAP_SYS_BOOT & 1)


def five_level_paging(calls: Calls) -> bool | None:
    """Whether this x86 kernel runs with five levels of page tables: where it does not it clears the flag."""
    if (found := _field(calls, "/proc/cpuinfo", "flags")) is None:
        return None
    return "la57" in found.split(" ")


def available(calls: Calls) -> int | None:
    """Bytes of memory that can be had without swapping."""
    found = _field(calls, "/proc/meminfo", "MemAvailable")
    return None if found is None else int(found.split()[0]) * KIB


def crash_loaded(calls: Calls) -> bool | None:
    """Whether a crash kernel waits in its own slot."""
    for path in CRASH:
        if (text := _text(calls, path)) is not None:
            return text == "1"
    return None


def watchdogs(calls: Calls) -> list[Watchdog]:
    """Every watchdog device there is; without CONFIG_WATCHDOG_SYSFS none says whether it is armed."""
    found = []
    for name in calls.listdir(WATCHDOGS):
        state, timeout = (_text(calls, f"{WATCHDOGS}/{name}/{what}") for what in ("state", "timeout"))
        identity = _text(calls, f"{WATCHDOGS}/{name}/identity") or ""
        seconds = int(timeout) if timeout and timeout.isdecimal() else None
        found.append(Watchdog(name, identity, state == "active", seconds))
    return found


def _text(calls: Calls, path: str) -> str | None:
    return calls.read(path).decode(errors="replace").strip() if calls.exists(path) else None


def _field(calls: Calls, path: str, name: str) -> str | None:
    """A `Name: value` line of a file in /proc."""
    for line in (_text(calls, path) or "").splitlines():
        key, _, value = line.partition(":")
        if key.rstrip("\t ") == name:
            return value.strip()
    return None
