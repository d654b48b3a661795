# SPDX-License-Identifier: LGPL-2.1-or-later
"""The table `[service]` of a hook's file: what systemd gets for each setting, and what is refused, with its line."""

import re
import tomllib
from contextlib import closing
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from jeepney import DBusAddress, new_method_call

from khod.errors import ConfigError
from khod.producers import directory
from khod.producers.barrier import ParticipantVeto, ProducerCall, Verb
from khod.producers.children import Children
from khod.producers.commands import Command, RunningCommand
from khod.producers.hooks import Hook
from khod.producers.service_settings import REFUSED, SETTINGS
from khod.producers.transient import TransientUnits, _properties
from khod.producers.waiting import Gate
from tests.unit.khods import REPOSITORY

MAX = 2**64 - 1
FREEZE = 'freeze = ["/usr/local/lib/x", "freeze"]\n'


def one(name: str, signature: str, value: Any) -> dict[str, tuple[str, Any]]:
    return {name: (signature, value)}


def rlimit(name: str, soft: int, hard: int) -> dict[str, tuple[str, Any]]:
    return {f"Limit{name}": ("t", hard), f"Limit{name}Soft": ("t", soft)}


GIVEN: list[tuple[str, dict[str, tuple[str, Any]]]] = [
    ('User = "kvm"', one("User", "s", "kvm")),
    ("User = 65534", one("User", "s", "65534")),
    ('Group = "disk"', one("Group", "s", "disk")),
    ('SupplementaryGroups = "kvm disk"', one("SupplementaryGroups", "as", ["kvm", "disk"])),
    ('SupplementaryGroups = ["kvm"]', one("SupplementaryGroups", "as", ["kvm"])),
    ('WorkingDirectory = "/srv"', one("WorkingDirectory", "s", "/srv")),
    ('WorkingDirectory = "-/srv"', one("WorkingDirectory", "s", "-/srv")),
    ('WorkingDirectory = "~"', one("WorkingDirectory", "s", "~")),
    ('UMask = "0027"', one("UMask", "u", 0o27)),
    ('Environment = ["A=1", "B=two words", "C="]', one("Environment", "as", ["A=1", "B=two words", "C="])),
    ("""Environment = 'A=1 "B=two words"'""", one("Environment", "as", ["A=1", "B=two words"])),
    ("Environment = ['A=\\x2d']", one("Environment", "as", ["A=\\x2d"])),
    ('KeyringMode = "private"', one("KeyringMode", "s", "private")),
    ("Nice = -5", one("Nice", "i", -5)),
    ('Nice = "+5"', one("Nice", "i", 5)),
    ("OOMScoreAdjust = -900", one("OOMScoreAdjust", "i", -900)),
    ('CPUSchedulingPolicy = "other"', one("CPUSchedulingPolicy", "i", 0)),
    ('CPUSchedulingPolicy = "batch"', one("CPUSchedulingPolicy", "i", 3)),
    ('CPUSchedulingPolicy = "idle"', one("CPUSchedulingPolicy", "i", 5)),
    ('CPUSchedulingPolicy = "fifo"', one("CPUSchedulingPolicy", "i", 1)),
    ('CPUSchedulingPolicy = "rr"', one("CPUSchedulingPolicy", "i", 2)),
    ("CPUSchedulingPriority = 1", one("CPUSchedulingPriority", "i", 1)),
    ('CPUAffinity = "0-3,9 11"', one("CPUAffinity", "ay", b"\x0f\x0a")),
    ("CPUAffinity = [0, 1]", one("CPUAffinity", "ay", b"\x03")),
    ("CPUAffinity = 8", one("CPUAffinity", "ay", b"\x00\x01")),
    ('CPUAffinity = "numa"', one("CPUAffinityFromNUMA", "b", True)),
    ('IOSchedulingClass = "realtime"', one("IOSchedulingClass", "i", 1)),
    ('IOSchedulingClass = "best-effort"', one("IOSchedulingClass", "i", 2)),
    ('IOSchedulingClass = "idle"', one("IOSchedulingClass", "i", 3)),
    ("IOSchedulingPriority = 7", one("IOSchedulingPriority", "i", 7)),
    ("LimitNOFILE = 4096", rlimit("NOFILE", 4096, 4096)),
    ('LimitNOFILE = "1024:4096"', rlimit("NOFILE", 1024, 4096)),
    ('LimitNOFILE = "1024:infinity"', rlimit("NOFILE", 1024, MAX)),
    ('LimitCORE = "infinity"', rlimit("CORE", MAX, MAX)),
    ("LimitCORE = 0", rlimit("CORE", 0, 0)),
    ('LimitMEMLOCK = "64M:1G"', rlimit("MEMLOCK", 64 << 20, 1 << 30)),
    ('LimitCPU = "1min 500ms"', rlimit("CPU", 61, 61)),
    ('LimitCPU = "30:60"', rlimit("CPU", 30, 60)),
    ('LimitRTTIME = "500"', rlimit("RTTIME", 500, 500)),
    ('LimitRTTIME = "1ms:1s"', rlimit("RTTIME", 1000, 1_000_000)),
    ('LimitNICE = "-5"', rlimit("NICE", 25, 25)),
    ('LimitNICE = "+5"', rlimit("NICE", 15, 15)),
    ("LimitNICE = 40", rlimit("NICE", 40, 40)),
    *(
        (f"Limit{name} = 7", rlimit(name, 7, 7))
        for name in ("FSIZE", "DATA", "STACK", "RSS", "AS", "NPROC", "LOCKS", "SIGPENDING", "MSGQUEUE", "RTPRIO")
    ),
    *(
        (f"{name} = true", one(name, "b", True))
        for name in (
            *("NoNewPrivileges", "PrivateTmp", "PrivateDevices", "PrivateNetwork", "PrivateMounts", "PrivateUsers"),
            *("PrivateIPC", "ProtectKernelTunables", "ProtectKernelModules", "ProtectKernelLogs"),
            *("ProtectControlGroups", "ProtectClock", "ProtectHostname", "RestrictRealtime", "RestrictSUIDSGID"),
            *("LockPersonality", "MemoryDenyWriteExecute"),
        )
    ),
    ('PrivateNetwork = "Yes"', one("PrivateNetwork", "b", True)),
    ('PrivateNetwork = "off"', one("PrivateNetwork", "b", False)),
    ('PrivateTmp = "disconnected"', one("PrivateTmpEx", "s", "disconnected")),
    ('PrivateUsers = "identity"', one("PrivateUsersEx", "s", "identity")),
    ('ProtectControlGroups = "strict"', one("ProtectControlGroupsEx", "s", "strict")),
    ("ProtectSystem = true", one("ProtectSystem", "s", "yes")),
    ('ProtectSystem = "strict"', one("ProtectSystem", "s", "strict")),
    ('ProtectHome = "no"', one("ProtectHome", "s", "no")),
    ('ProtectHome = "read-only"', one("ProtectHome", "s", "read-only")),
    ('ProtectProc = "invisible"', one("ProtectProc", "s", "invisible")),
    ('ProcSubset = "pid"', one("ProcSubset", "s", "pid")),
    ('CapabilityBoundingSet = "CAP_CHOWN cap_kill"', one("CapabilityBoundingSet", "t", 0x21)),
    ('CapabilityBoundingSet = ["~CAP_SYS_BOOT"]', one("CapabilityBoundingSet", "t", MAX ^ 1 << 22)),
    ('CapabilityBoundingSet = ""', one("CapabilityBoundingSet", "t", 0)),
    ('CapabilityBoundingSet = "CAP_CHECKPOINT_RESTORE"', one("CapabilityBoundingSet", "t", 1 << 40)),
    ('AmbientCapabilities = ["CAP_NET_ADMIN"]', one("AmbientCapabilities", "t", 1 << 12)),
    ("RestrictNamespaces = true", one("RestrictNamespaces", "t", 0)),
    ("RestrictNamespaces = false", {}),
    ('RestrictNamespaces = "net mnt"', one("RestrictNamespaces", "t", 0x40020000)),
    ('RestrictNamespaces = ["cgroup", "ipc"]', one("RestrictNamespaces", "t", 0x0A000000)),
    ('RestrictNamespaces = ["pid", "user", "uts"]', one("RestrictNamespaces", "t", 0x34000000)),
    (
        'RestrictAddressFamilies = ["AF_UNIX", "AF_INET"]',
        one("RestrictAddressFamilies", "(bas)", (True, ["AF_UNIX", "AF_INET"])),
    ),
    ('RestrictAddressFamilies = "~AF_PACKET"', one("RestrictAddressFamilies", "(bas)", (False, ["AF_PACKET"]))),
    ('RestrictAddressFamilies = "none"', one("RestrictAddressFamilies", "(bas)", (True, []))),
    ('SystemCallFilter = "@system-service"', one("SystemCallFilter", "(bas)", (True, ["@system-service"]))),
    (
        'SystemCallFilter = ["~@mount", "swapon:EPERM"]',
        one("SystemCallFilter", "(bas)", (False, ["@mount", "swapon:EPERM"])),
    ),
    ('SystemCallArchitectures = "native x86"', one("SystemCallArchitectures", "as", ["native", "x86"])),
    ('SystemCallErrorNumber = "EPERM"', one("SystemCallErrorNumber", "i", 1)),
    ("SystemCallErrorNumber = 38", one("SystemCallErrorNumber", "i", 38)),
    ('SystemCallErrorNumber = "kill"', one("SystemCallErrorNumber", "i", 2147483646)),
    ('ReadWritePaths = "/run/lock -/srv -+/x"', one("ReadWritePaths", "as", ["/run/lock", "-/srv", "-+/x"])),
    ('ReadOnlyPaths = ["/a b"]', one("ReadOnlyPaths", "as", ["/a b"])),
    ('InaccessiblePaths = "/home"', one("InaccessiblePaths", "as", ["/home"])),
    ('BindPaths = "/a"', one("BindPaths", "a(ssbt)", [("/a", "/a", False, 16384)])),
    (
        'BindReadOnlyPaths = ["-/a:/b:norbind", "/c:/d", "/e:/f:rbind"]',
        one(
            "BindReadOnlyPaths",
            "a(ssbt)",
            [("/a", "/b", True, 0), ("/c", "/d", False, 16384), ("/e", "/f", False, 16384)],
        ),
    ),
    ('NetworkNamespacePath = "/run/netns/vm"', one("NetworkNamespacePath", "s", "/run/netns/vm")),
    ('AppArmorProfile = "hook"', one("AppArmorProfile", "(bs)", (False, "hook"))),
    ('AppArmorProfile = "-hook"', one("AppArmorProfile", "(bs)", (True, "hook"))),
    ('SELinuxContext = "a_u:b_r:c_t:s0"', one("SELinuxContext", "s", "a_u:b_r:c_t:s0")),
    ("CPUWeight = 200", one("CPUWeight", "t", 200)),
    ('CPUWeight = "idle"', one("CPUWeight", "t", 0)),
    ("IOWeight = 10", one("IOWeight", "t", 10)),
    ('CPUQuota = "50%"', one("CPUQuotaPerSecUSec", "t", 500_000)),
    ('CPUQuota = "250.25%"', one("CPUQuotaPerSecUSec", "t", 2_502_500)),
    ('MemoryMax = "64M"', one("MemoryMax", "t", 64 << 20)),
    ('MemoryMax = "1.5G"', one("MemoryMax", "t", 3 << 29)),
    ("MemoryMax = 4096", one("MemoryMax", "t", 4096)),
    ('MemoryHigh = "infinity"', one("MemoryHigh", "t", MAX)),
    ('MemoryHigh = "100%"', one("MemoryHighScale", "u", 2**32 - 1)),
    ('MemoryMin = "12.5%"', one("MemoryMinScale", "u", 536870912)),
    ("MemoryLow = 0", one("MemoryLow", "t", 0)),
    ("MemorySwapMax = 0", one("MemorySwapMax", "t", 0)),
    ("TasksMax = 16", one("TasksMax", "t", 16)),
    ('TasksMax = "infinity"', one("TasksMax", "t", MAX)),
    ('TasksMax = "33.33%"', one("TasksMaxScale", "u", 1431512599)),
    ('DevicePolicy = "closed"', one("DevicePolicy", "s", "closed")),
    ('DeviceAllow = "/dev/null rw"', one("DeviceAllow", "a(ss)", [("/dev/null", "rw")])),
    ('DeviceAllow = ["/dev/kvm", "char-pts r"]', one("DeviceAllow", "a(ss)", [("/dev/kvm", "rwm"), ("char-pts", "r")])),
    ('RuntimeMaxSec = "1min 30s"', one("RuntimeMaxUSec", "t", 90_000_000)),
    ("RuntimeMaxSec = 5", one("RuntimeMaxUSec", "t", 5_000_000)),
    ('RuntimeMaxSec = "infinity"', one("RuntimeMaxUSec", "t", MAX)),
]
"""A line of the table, and the properties that systemd gets.

systemd-run(1) of 252 sends the same, but for what it does not know (the properties named *Ex), for no restriction of
namespaces, which it sends as the mask of those it knows, and for `none`, which only the file of a unit may have there.
"""

NOT_A_VALUE = [
    *("User = true", 'User = ""', 'User = "a b"', 'User = "-x"', "SupplementaryGroups = []"),
    *("UMask = 22", 'UMask = "8"', 'UMask = "010000"', 'WorkingDirectory = "srv"', 'WorkingDirectory = "/srv/../x"'),
    *('Environment = "A"', "Environment = []", 'Environment = ["A=1", 2]', """Environment = 'A="1'"""),
    *('Environment = ["PATH=/bin"]', 'Environment = "KHO_VERB=thaw"', 'Environment = ["A=1\\n2"]'),
    *("Environment = 'A=\\x2d'", 'Environment = ["1A=2"]', 'KeyringMode = "mine"'),
    *("Nice = 20", 'Nice = "high"', "Nice = 1.5", "Nice = true", "OOMScoreAdjust = -1001"),
    *('CPUSchedulingPolicy = "fair"', "CPUSchedulingPolicy = 0", "CPUSchedulingPriority = 100"),
    *('CPUAffinity = ""', 'CPUAffinity = "3-1"', "CPUAffinity = 8192", "CPUAffinity = []", "CPUAffinity = true"),
    *('IOSchedulingClass = "fast"', "IOSchedulingPriority = 8"),
    *(
        'LimitNOFILE = "4096:1024"',
        'LimitNOFILE = "1:"',
        "LimitNOFILE = -1",
        'LimitNOFILE = "64K"',
        'LimitCPU = "soon"',
    ),
    *("LimitNICE = 41", 'LimitNICE = "+20"', 'LimitNICE = "-21"', 'LimitCPU = "infinity ms"'),
    *('PrivateNetwork = "maybe"', "PrivateNetwork = 1", "PrivateNetwork = []", 'PrivateTmp = "connected "'),
    *('PrivateUsers = "some"', 'ProtectSystem = "most"', 'ProtectHome = ["read-only"]', "ProtectProc = true"),
    *('CapabilityBoundingSet = "SYS_BOOT"', 'CapabilityBoundingSet = ["CAP_KILL", "~CAP_CHOWN"]'),
    *('CapabilityBoundingSet = "CAP_FLY"', 'AmbientCapabilities = "~"'),
    *('RestrictNamespaces = "~net"', 'RestrictNamespaces = "disk"', "RestrictNamespaces = []"),
    *('RestrictAddressFamilies = "UNIX"', "RestrictAddressFamilies = []", 'RestrictAddressFamilies = ["none"]'),
    *('SystemCallFilter = ["swapon:EPERM"]', 'SystemCallFilter = ""', 'SystemCallFilter = "@mount ~@swap"'),
    *('SystemCallArchitectures = "~native"', 'SystemCallErrorNumber = "ENOTHING"', "SystemCallErrorNumber = 4096"),
    *("SystemCallErrorNumber = 0", 'ReadWritePaths = "run"', 'ReadWritePaths = "+-/x"', "ReadOnlyPaths = []"),
    *('BindPaths = "/a:b"', 'BindPaths = "/a:/b:shared"', 'BindPaths = "/a:/b:rbind:x"', 'BindPaths = "/a:"'),
    *('NetworkNamespacePath = "vm"', 'AppArmorProfile = "-"', 'SELinuxContext = "-a:b:c"', 'SELinuxContext = "a b"'),
    *("CPUWeight = 0", "CPUWeight = 10001", 'IOWeight = "idle"', "CPUQuota = 50", 'CPUQuota = "0%"', 'CPUQuota = "%"'),
    *(
        'MemoryMax = "64Q"',
        'MemoryMax = "64MB"',
        "MemoryMax = 0",
        'MemoryMax = "101%"',
        "MemoryMax = 1.5",
        "MemoryMax = -1",
    ),
    *('MemoryMax = "99999999999999999999"', "MemoryMax = true", 'MemoryHigh = "0%"', "TasksMax = 0", 'TasksMax = "1K"'),
    *('DevicePolicy = "open"', 'DeviceAllow = "/dev/null x"', 'DeviceAllow = "null"', 'DeviceAllow = "/dev/../x"'),
    *("DeviceAllow = []", "RuntimeMaxSec = 0", 'RuntimeMaxSec = "soon"', "RuntimeMaxSec = -1", "RuntimeMaxSec = [1]"),
]

AGAINST_THE_RULES = [
    *("Type", "Slice", "DefaultDependencies", "KillMode", "KillSignal", "SendSIGKILL", "SendSIGHUP", "FinalKillSignal"),
    *("RestartKillSignal", "WatchdogSignal", "TimeoutStopSec", "TimeoutAbortSec", "TimeoutSec", "TimeoutStartSec"),
    *(
        "CollectMode",
        "StandardInput",
        "StandardOutput",
        "StandardError",
        "StandardInputText",
        "ExecStart",
        "ExecStartPre",
    ),
    *("ExecStartPost", "ExecStop", "ExecStopPost", "ExecReload", "ExecCondition", "Restart", "RestartSec", "OOMPolicy"),
    *("RestartPreventExitStatus", "RemainAfterExit", "Delegate", "DelegateSubgroup", "After", "Before", "Conflicts"),
    *("Requires", "Wants", "BindsTo", "PartOf", "RequiresMountsFor", "JoinsNamespaceOf", "OnFailure", "FailureAction"),
    *("ConditionPathExists", "AssertPathExists", "StartLimitBurst", "JobTimeoutSec", "Description", "WantedBy"),
    *("PIDFile", "BusName", "NotifyAccess", "WatchdogSec", "SuccessExitStatus", "GuessMainPID", "ExitType"),
    *("RootDirectory", "RootImage", "EnvironmentFile", "UnsetEnvironment"),
]


def write_hook(root: Path, text: str) -> Path:
    path = root / directory.DIRECTORY / "vm.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def read_hook(root: Path, text: str) -> Hook:
    write_hook(root, text)
    (hook,) = directory.load_directory(root, TransientUnits())
    assert isinstance(hook, Hook)
    return hook


def refused(root: Path, text: str) -> ConfigError:
    """The refusal of a file, without its directory in `where`."""
    path = write_hook(root, text)
    with pytest.raises(ConfigError) as raised:
        directory.load_directory(root, TransientUnits())
    raised.value.where = raised.value.where.removeprefix(f"{path.parent}/")
    return raised.value


@pytest.mark.parametrize(("line", "properties"), GIVEN, ids=[line for line, _ in GIVEN])
def test_a_setting_becomes_a_property_of_the_unit(
    tmp_path: Path, line: str, properties: dict[str, tuple[str, Any]]
) -> None:
    settings = read_hook(tmp_path, f"{FREEZE}[service]\n{line}\n").settings
    assert settings == properties
    new_method_call(DBusAddress("/", "a.b"), "M", "a(sv)", (list(settings.items()),)).serialise(serial=1)


def test_every_setting_has_its_line_here() -> None:
    assert {line.partition(" ")[0] for line, _ in GIVEN} == SETTINGS.keys()


@pytest.mark.parametrize("line", NOT_A_VALUE)
def test_a_wrong_value_is_refused_with_its_line(tmp_path: Path, line: str) -> None:
    error = refused(tmp_path, f"{FREEZE}\n[service]\n# a comment\n{line}\n")
    ((name, value),) = tomllib.loads(line).items()
    assert error.where == "vm.toml:5"
    assert error.what == f"`{name}` is {value!r}"
    assert error.remedy == f"It must be {SETTINGS[name].must_be}."


@pytest.mark.parametrize("name", AGAINST_THE_RULES)
def test_what_would_break_the_rules_is_refused_with_its_reason(tmp_path: Path, name: str) -> None:
    error = refused(tmp_path, f'{FREEZE}[service]\n{name} = "x"\n')
    assert error.where == "vm.toml:3"
    assert error.what.startswith(f"`{name}` cannot be set for a hook: ")


def test_nothing_that_may_be_set_is_among_what_is_refused() -> None:
    patterns = " ".join(REFUSED).split()
    assert [(name, pattern) for name in SETTINGS for pattern in patterns if fnmatchcase(name, pattern)] == []


@pytest.mark.parametrize(
    ("name", "similar"),
    [
        ("MemoryMx", "MemoryMax"),
        ("memorymax", "MemoryMax"),
        ("CPUQuotaPerSecUSec", ""),
        ("PrivateNetworks", "PrivateNetwork"),
    ],
)
def test_an_unknown_setting_is_refused_with_what_is_similar(tmp_path: Path, name: str, similar: str) -> None:
    error = refused(tmp_path, f"{FREEZE}\n[service]\n# a comment\n{name} = 1\n")
    assert error.where == "vm.toml:5"
    assert error.what == f"`{name}` is not a setting that khod can give a hook's unit"
    assert similar in error.remedy
    assert "kho-producers(7)" in error.remedy


@pytest.mark.parametrize("kind", ['unit = "a.service"', 'qmp = "/run/qmp"'])
def test_settings_are_for_hooks_only(tmp_path: Path, kind: str) -> None:
    error = refused(tmp_path, f"{kind}\n\n[service]\nNice = 5\n")
    assert (error.what, error.where) == (f"`service` stands beside `{kind.partition(' ')[0]}`", "vm.toml:3")


@pytest.mark.parametrize("text", ["service = 3\n", "[[service]]\nNice = 5\n", 'service = ["Nice=5"]\n'])
def test_the_settings_are_a_table(tmp_path: Path, text: str) -> None:
    error = refused(tmp_path, text)
    assert (error.what, error.where) == ("`service` is a table", "vm.toml:1")


def test_a_table_in_one_line_has_that_line(tmp_path: Path) -> None:
    assert refused(tmp_path, f"{FREEZE}service = {{ Nice = 5, MemoryMx = 1 }}\n").where == "vm.toml:2"


def test_a_key_of_the_producer_below_the_table_is_named(tmp_path: Path) -> None:
    """All that follows `[service]` is in it, which a reader does not see."""
    error = refused(tmp_path, f"{FREEZE}[service]\nNice = 5\ntimeout = 60\n")
    assert (error.what, error.where) == ("`timeout` stands in the table [service]", "vm.toml:4")
    assert "above the line [service]" in error.remedy


def test_an_unknown_key_lists_the_table_among_the_known(tmp_path: Path) -> None:
    assert "service" in refused(tmp_path, "prepair = []\n").remedy


def test_a_khod_without_systemd_does_not_run_a_hook_without_its_settings(tmp_path: Path) -> None:
    path = write_hook(tmp_path, f"{FREEZE}[service]\nPrivateNetwork = true\n")
    with pytest.raises(ConfigError, match="requires systemd") as raised:
        directory.load_directory(tmp_path, Children())
    assert raised.value.where == f"{path}:2"
    path.write_text(f"{FREEZE}[service]\n")
    assert len(directory.load_directory(tmp_path, Children())) == 1


class Noting:
    """A runner that notes commands, and starts none."""

    has_units = True

    def __init__(self) -> None:
        self.commands: list[Command] = []

    async def start_command(self, command: Command, stdout: int, stderr: int) -> RunningCommand:
        self.commands.append(command)
        raise ValueError(f"not with {stdout} and {stderr}")

    async def prepare_command(self, _command: Command, _stdout: int, _stderr: int) -> None:
        raise AssertionError("no prepare here")


async def test_each_command_of_a_hook_has_the_settings(tmp_path: Path) -> None:
    runner = Noting()
    write_hook(tmp_path, f'{FREEZE}thaw = ["true"]\n[service]\nNice = 5\nEnvironment = ["A=1"]\n')
    (hook,) = directory.load_directory(tmp_path, runner)
    for verb in (Verb.freeze, Verb.thaw):
        with pytest.raises(ParticipantVeto):
            await hook.carry_out(ProducerCall(verb, "run-1"))
    wanted = {"Nice": ("i", 5), "Environment": ("as", ["A=1"])}
    assert [command.settings for command in runner.commands] == [wanted, wanted]


@pytest.mark.parametrize("waits", [False, True])
def test_the_unit_has_the_settings_and_what_khod_sets_cannot_be_set(waits: bool) -> None:
    command = Command("vm", ["true"], {"KHO_VERB": "freeze"}, {"Nice": ("i", 5), "Environment": ("as", ["A=1"])})
    with closing(Gate()) as gate:
        properties = list(_properties(command, 1, 2, gate if waits else None))
    assert ("Nice", ("i", 5)) in properties
    assert [value for name, value in properties if name == "Environment"] == [
        ("as", ["KHO_VERB=freeze"]),
        ("as", ["A=1"]),
    ], "systemd puts them together"
    own = {name for name, _ in properties[: -len(command.settings)]}
    assert own & {setting.name for setting in SETTINGS.values()} == {"Environment"}


def test_the_sample_shows_settings_that_load(tmp_path: Path) -> None:
    text = (REPOSITORY / "etc/kho/producers.d/example.toml.sample").read_text()
    before, header, table = text.partition("#[service]\n#")
    assert header
    hook = read_hook(tmp_path, f"{before}[service]\n{table.replace(chr(10) + '#', chr(10))}")
    assert len(hook.settings) == 4


def test_the_manual_page_lists_every_setting_and_its_example_loads(tmp_path: Path) -> None:
    text = (REPOSITORY / "packaging/man/kho-producers.7").read_text()
    section = text.partition('.SS "Settings of a hook')[2].partition(".SS ")[0]
    listed = section.partition("These settings may be used:")[2].partition(".PP")[0]
    words = re.findall(r"^(?!systemd|\.)\w.*", listed, re.MULTILINE)
    assert sorted(re.split(r",\s*|\n", "\n".join(words).replace(",\n", ","))) == sorted(SETTINGS)
    example = section.partition(".nf\n")[2].partition(".fi")[0].replace("\\-", "-")
    assert len(read_hook(tmp_path, example).settings) == 5
