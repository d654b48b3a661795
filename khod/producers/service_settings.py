# SPDX-License-Identifier: LGPL-2.1-or-later
"""The table `[service]` of a hook's file: settings of the unit that its commands run in, with systemd's own names.

What systemd would refuse at the start is refused when the file is read, as far as that can be known: a hook that cannot
start is found while nothing is frozen. So is what would break khod's own rules for these units. Names and types of the
properties are those of systemd-run(1), which makes the same call (src/shared/bus-unit-util.c; looked at on 252 and on a
release after 258).
"""

import re
from collections.abc import Callable
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from khod.dataclass import dataclass
from khod.errors import ConfigError
from khod.files import Fragment
from khod.producers.commands import TABLE
from khod.systemd import setting_values as values
from khod.systemd.setting_values import Property, Suffixed
from khod.text import printable, shorten

MAX_SHOWN = 80
"""Characters of a value or a name that are shown."""
MIN_SIMILARITY = 0.7
"""How similar a name must be to be shown for one that is not known, from 0 to 1."""
OWN_VARIABLES = re.compile(r"(PATH|KHO_[^=]*)=")
"""What khod itself gives a command in its environment."""


@dataclass(frozen=True)
class ServiceSetting:
    """One setting: the property it becomes, its D-Bus signature, how its value is read, and what that is in words."""

    name: str
    signature: str
    parse: Callable[[Any], Any]
    must_be: str

    def make_properties(self, value: Any) -> dict[str, Property]:
        """Return the properties for a value of the file, mostly one; ValueError where it is not one of the setting."""
        parsed = self.parse(value)
        found = parsed if isinstance(parsed, Suffixed) else {"": (self.signature, parsed)}
        return {f"{self.name}{suffix}": one for suffix, one in found.items()}


def parse_environment(value: Any) -> list[str]:
    """Return the assignments of variables that are not khod's own."""
    words = values.parse_assignments(value)
    if any(OWN_VARIABLES.match(word) for word in words):
        raise ValueError
    return words


def _make_all(names: str, signature: str, parse: Callable[[Any], Any], must_be: str) -> dict[str, ServiceSetting]:
    """Make settings that differ in their names only, which are also those of the properties."""
    return {name: ServiceSetting(name, signature, parse, must_be) for name in names.split()}


BOOLEAN = "true or false"
PATHS = 'a list of absolute paths, for example ["/run/lock", "-/may/be/missing"]'
CAPABILITIES = 'a list of capabilities, for example ["CAP_KILL"] or, for all others, ["~CAP_SYS_BOOT"]'
BINDS = 'a list of absolute paths, for example ["/from", "/from:/to", "-/may/be/missing:/to:norbind"]'
RLIMIT = 'a number, for example 4096, "1024:4096" (soft:hard) or "infinity"'
MEMORY = 'a size, for example "64M", "10%" or "infinity"'
WEIGHT = f"a whole number from 1 to {values.MAX_WEIGHT}"
ACCOUNT = "a name, or a number"

SETTINGS: dict[str, ServiceSetting] = {
    # systemd.exec(5): who and where
    **_make_all("User Group", "s", values.parse_account, ACCOUNT),
    **_make_all("SupplementaryGroups", "as", values.parse_accounts, 'a list of groups, for example ["kvm", "disk"]'),
    **_make_all(
        "WorkingDirectory", "s", values.parse_working_directory, 'an absolute path, with "-" before it, or "~"'
    ),
    **_make_all("UMask", "u", values.parse_mode, 'octal digits in quotes, for example "0022"'),
    **_make_all(
        "Environment",
        "as",
        parse_environment,
        'a list as ["NAME=value"], without PATH and without names that begin with KHO_, which khod sets',
    ),
    **_make_all("KeyringMode", "s", values.parse_choice("inherit", "private", "shared"), "inherit, private or shared"),
    # systemd.exec(5): share of the host
    **_make_all("Nice", "i", values.parse_number(-20, 19), "a whole number from -20 to 19"),
    **_make_all("OOMScoreAdjust", "i", values.parse_number(-1000, 1000), "a whole number from -1000 to 1000"),
    **_make_all(
        "CPUSchedulingPolicy", "i", values.parse_code(values.SCHEDULING_POLICIES), "other, batch, idle, fifo or rr"
    ),
    **_make_all("CPUSchedulingPriority", "i", values.parse_number(0, 99), "a whole number from 0 to 99"),
    **_make_all("CPUAffinity", "ay", values.parse_cpus, 'processors, for example "0-3,8", [0, 1] or "numa"'),
    **_make_all("IOSchedulingClass", "i", values.parse_code(values.IO_CLASSES), "none, realtime, best-effort or idle"),
    **_make_all("IOSchedulingPriority", "i", values.parse_number(0, 7), "a whole number from 0 to 7"),
    **_make_all(
        "LimitFSIZE LimitDATA LimitSTACK LimitCORE LimitRSS LimitAS LimitMEMLOCK LimitMSGQUEUE",
        "",
        values.parse_rlimit(values.parse_size),
        'a size, for example "64M", "64M:1G" (soft:hard) or "infinity"',
    ),
    **_make_all(
        "LimitNOFILE LimitNPROC LimitLOCKS LimitSIGPENDING LimitRTPRIO",
        "",
        values.parse_rlimit(values.parse_number(0, values.UINT64_MAX - 1)),
        RLIMIT,
    ),
    **_make_all(
        "LimitCPU", "", values.parse_rlimit(values.parse_rlimit_seconds), 'a time, for example "1min" or "1min:2min"'
    ),
    **_make_all(
        "LimitRTTIME",
        "",
        values.parse_rlimit(values.parse_rlimit_microseconds),
        'a time, for example "500ms" or "1s:2s"',
    ),
    **_make_all(
        "LimitNICE",
        "",
        values.parse_rlimit(values.parse_rlimit_nice),
        'a number from 0 to 40, or a level as "-5" or "+5"',
    ),
    # systemd.exec(5): what it may do
    **_make_all(
        "NoNewPrivileges PrivateDevices PrivateNetwork PrivateMounts PrivateIPC ProtectKernelTunables"
        " ProtectKernelModules ProtectKernelLogs ProtectClock ProtectHostname RestrictRealtime RestrictSUIDSGID"
        " LockPersonality MemoryDenyWriteExecute",
        "b",
        values.parse_boolean,
        BOOLEAN,
    ),
    **_make_all("PrivateTmp", "b", values.parse_boolean_ex("disconnected"), f'{BOOLEAN}, or "disconnected"'),
    **_make_all(
        "PrivateUsers",
        "b",
        values.parse_boolean_ex("self", "identity", "full", "managed"),
        f'{BOOLEAN}, or "self", "identity", "full" or "managed"',
    ),
    **_make_all(
        "ProtectControlGroups",
        "b",
        values.parse_boolean_ex("private", "strict"),
        f'{BOOLEAN}, or "private" or "strict"',
    ),
    **_make_all("ProtectSystem", "s", values.parse_boolean_text("full", "strict"), f'{BOOLEAN}, or "full" or "strict"'),
    **_make_all(
        "ProtectHome", "s", values.parse_boolean_text("read-only", "tmpfs"), f'{BOOLEAN}, or "read-only" or "tmpfs"'
    ),
    **_make_all(
        "ProtectProc",
        "s",
        values.parse_choice("noaccess", "invisible", "ptraceable", "default"),
        "noaccess, invisible, ptraceable or default",
    ),
    **_make_all("ProcSubset", "s", values.parse_choice("all", "pid"), "all or pid"),
    **_make_all("CapabilityBoundingSet AmbientCapabilities", "t", values.parse_capabilities, CAPABILITIES),
    **_make_all(
        "RestrictNamespaces",
        "t",
        values.parse_namespaces,
        'true, false, or a list of those that may be made, for example ["net", "mnt"]; khod does not take "~" here',
    ),
    **_make_all(
        "RestrictAddressFamilies",
        "(bas)",
        values.parse_address_families,
        'a list of families, for example ["AF_UNIX"] or, for all others, ["~AF_PACKET"], or "none"',
    ),
    **_make_all(
        "SystemCallFilter",
        "(bas)",
        values.parse_system_calls,
        'a list of calls and groups, for example ["@system-service"] or, for all others, ["~@mount"]',
    ),
    **_make_all(
        "SystemCallArchitectures",
        "as",
        values.parse_architectures,
        'a list of architectures, for example ["native"]',
    ),
    **_make_all(
        "SystemCallErrorNumber", "i", values.parse_errno, 'the name or the number of an error, as "EPERM", or "kill"'
    ),
    **_make_all("ReadWritePaths ReadOnlyPaths InaccessiblePaths", "as", values.parse_paths, PATHS),
    **_make_all("BindPaths BindReadOnlyPaths", "a(ssbt)", values.parse_binds, BINDS),
    **_make_all("NetworkNamespacePath", "s", values.parse_path, "an absolute path"),
    **_make_all("AppArmorProfile", "(bs)", values.parse_profile, 'the name of a profile, with "-" before it or not'),
    **_make_all("SELinuxContext", "s", values.parse_context, 'a context, without "-" before it'),
    # systemd.resource-control(5)
    **_make_all("CPUWeight", "t", values.parse_number(1, values.MAX_WEIGHT, idle=0), f'{WEIGHT}, or "idle"'),
    **_make_all("IOWeight", "t", values.parse_number(1, values.MAX_WEIGHT), WEIGHT),
    "CPUQuota": ServiceSetting("CPUQuotaPerSecUSec", "t", values.parse_quota, 'a percentage, for example "50%"'),
    **_make_all("MemoryMin MemoryLow MemorySwapMax", "t", values.parse_limit(values.parse_size), MEMORY),
    **_make_all("MemoryHigh MemoryMax", "t", values.parse_limit(values.parse_size, low=1), f"{MEMORY}, and not 0"),
    **_make_all(
        "TasksMax",
        "t",
        values.parse_limit(values.parse_number(1, values.UINT64_MAX - 1), low=1),
        'a number from 1 on, for example 16, "10%" or "infinity"',
    ),
    **_make_all("DevicePolicy", "s", values.parse_choice("auto", "closed", "strict"), "auto, closed or strict"),
    **_make_all("DeviceAllow", "a(ss)", values.parse_devices, 'a list of devices, for example ["/dev/null rw"]'),
    # systemd.service(5)
    "RuntimeMaxSec": ServiceSetting(
        "RuntimeMaxUSec", "t", values.parse_microseconds_setting, 'a time of more than 0, for example "1min 30s"'
    ),
}
"""What an administrator may set, by its name in systemd's manuals."""

REFUSED: dict[str, str] = {
    "ExecStart* ExecStop* ExecReload* ExecCondition*": "the commands are those that the file has for each verb",
    "Type ExitType RemainAfterExit GuessMainPID PIDFile BusName NotifyAccess SuccessExitStatus": (
        "the answer of a hook is the end of its command, and its unit ends with it"
    ),
    "Restart RestartSec RestartMode RestartSteps RestartMaxDelaySec Restart*Status": (
        "khod itself decides whether a verb is sent again"
    ),
    "*KillSignal KillMode SendSIG* TimeoutStop* TimeoutAbort*": (
        "khod ends a hook at once, together with everything it started"
    ),
    "TimeoutSec TimeoutStart* Watchdog*": "the time that a hook has is the key `timeout`, for each verb",
    "OOMPolicy": "khod waits for the end of the command, also where the kernel killed another process of the hook",
    "CollectMode": "the unit must be unloaded when it has ended, since the next verb has a unit of the same name",
    "Standard* TTY*": "khod reads the outputs, for the reason of a no and for the journal; standard input is empty",
    "EnvironmentFile PassEnvironment UnsetEnvironment": "the environment of a hook is khod's own and `Environment`",
    "Slice": "a slice can be stopped or frozen during a handover, and the hook with it",
    "Delegate*": "khod ends a hook by its control group, which must be systemd's",
    "Root*": ("khod looks for the commands in the file system of the host, and starts them from there"),
    "DefaultDependencies After Before Conflicts Requires Requisite Wants BindsTo PartOf Upholds Requires* Wants*"
    " Joins* Propagates* StopPropagated* ReloadPropagated* On* Condition* Assert* StartLimit* Job* FailureAction*"
    " SuccessAction* RebootArgument Refuse* AllowIsolate IgnoreOnIsolate StopWhenUnneeded SurviveFinalKillSignal"
    " SourcePath Description Documentation Alias Also WantedBy RequiredBy UpheldBy DefaultInstance": (
        "its unit depends on no other unit, so that it can start during a shutdown too"
    ),
}
"""Why others may not be set, by patterns of their names."""


def read_settings(table: Any, fragment: Fragment) -> dict[str, Property]:
    """Return the properties of systemd for the table `[service]` of a hook's file.

    Raises ConfigError with file and line for what is not a setting that a hook can be given, and for a wrong value.
    """
    if not isinstance(table, dict):
        raise ConfigError(
            f"`{TABLE}` is a table",
            where=fragment.locate_key(TABLE),
            remedy=f"Write [{TABLE}] on a line of its own, with the settings below it.",
        )
    found: dict[str, Property] = {}
    for name, value in table.items():
        fail = partial(ConfigError, where=_locate_setting(fragment, name))
        if name not in SETTINGS:
            raise _describe_unknown(name, fail)
        try:
            found |= SETTINGS[name].make_properties(value)
        except ValueError:
            shown = printable(shorten(repr(value), MAX_SHOWN))
            raise fail(f"`{name}` is {shown}", remedy=f"It must be {SETTINGS[name].must_be}.") from None
    return found


def _describe_unknown(name: str, fail: Callable[..., ConfigError]) -> ConfigError:
    """Say why a setting cannot be given, or which ones have a similar name."""
    for patterns, why in REFUSED.items():
        if any(fnmatchcase(name, pattern) for pattern in patterns.split()):
            return fail(f"`{name}` cannot be set for a hook: {why}", remedy="Remove it from the file.")
    known = {setting.lower(): setting for setting in SETTINGS}
    near = [known[one] for one in get_close_matches(name.lower(), known, cutoff=MIN_SIMILARITY)]
    shown = printable(shorten(name, MAX_SHOWN))
    similar = f"Similar: {', '.join(near)}. " if near else ""
    return fail(
        f"`{shown}` is not a setting that khod can give a hook's unit",
        remedy=f"{similar}kho-producers(7) lists all of them.",
    )


def _locate_setting(fragment: Fragment, name: str) -> str:
    """Return FILE:LINE of a setting, or of the table where its line is not found."""
    found = fragment.locate_key(f"{TABLE}.{name}")
    return fragment.locate_key(TABLE) if found == str(fragment.path) else found
