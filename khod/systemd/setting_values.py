# SPDX-License-Identifier: LGPL-2.1-or-later
"""Values of unit settings, from TOML to what systemd takes over D-Bus.

Each function takes a value of a TOML file: a text in systemd's own syntax, or a boolean, a whole number or a list of
texts where that is natural. Each returns what a property of the setting's type has, or `Suffixed`; ValueError where the
value is not one of the setting. The rules are those of systemd-run(1), src/shared/bus-unit-util.c in systemd.
"""

import errno
import re
import shlex
from collections.abc import Callable
from typing import Any

from khod.systemd.time_span import USEC_INFINITY, parse_microseconds
from khod.text import ASCII_SPACE, split_words

Property = tuple[str, Any]
"""The D-Bus signature and the value of a property."""

UINT64_MAX = 2**64 - 1
"""`infinity`, for limits of control groups and of processes."""
UINT32_MAX = 2**32 - 1
SIZE_UNITS = "BKMGTPE"
PERMYRIAD = 10_000
"""100%: systemd reads hundredths of a percent."""
USEC_PER_PERMYRIAD = 100
"""Microseconds of each second that CPUQuota=0.01% is."""
MAX_WEIGHT = 10_000
MAX_CPUS = 8192
"""Processors that a Linux kernel may be built for (CONFIG_NR_CPUS)."""
MAX_ERRNO = 4095
SECCOMP_KILL = 2**31 - 2
"""SystemCallErrorNumber=kill (SECCOMP_ERROR_NUMBER_KILL in src/shared/seccomp-util.h)."""
MS_REC = 1 << 14  # include/uapi/linux/mount.h
MAX_MODE = 0o7777
NICE_LEVELS = 20
"""RLIMIT_NICE is this less the nice level, and 0 has no level."""

TRUE_WORDS = ("1", "yes", "y", "true", "t", "on")
FALSE_WORDS = ("0", "no", "n", "false", "f", "off")
CAPABILITIES = (
    *("chown", "dac_override", "dac_read_search", "fowner", "fsetid", "kill", "setgid", "setuid", "setpcap"),
    *("linux_immutable", "net_bind_service", "net_broadcast", "net_admin", "net_raw", "ipc_lock", "ipc_owner"),
    *("sys_module", "sys_rawio", "sys_chroot", "sys_ptrace", "sys_pacct", "sys_admin", "sys_boot", "sys_nice"),
    *("sys_resource", "sys_time", "sys_tty_config", "mknod", "lease", "audit_write", "audit_control", "setfcap"),
    *("mac_override", "mac_admin", "syslog", "wake_alarm", "block_suspend", "audit_read", "perfmon", "bpf"),
    "checkpoint_restore",
)
"""By number, without CAP_ (include/uapi/linux/capability.h)."""
NAMESPACES = {
    "time": 0x00000080,
    "mnt": 0x00020000,
    "cgroup": 0x02000000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "net": 0x40000000,
}
"""CLONE_NEW* (include/uapi/linux/sched.h) by the names of RestrictNamespaces=."""
SCHEDULING_POLICIES = {"other": 0, "fifo": 1, "rr": 2, "batch": 3, "idle": 5}
IO_CLASSES = {"none": 0, "realtime": 1, "best-effort": 2, "idle": 3}


class Suffixed(dict[str, Property]):
    """Properties of names of their own, by what is added to the setting's name; none where the default is meant."""


# Words


def read_text(value: Any) -> str:
    """Return a text that is not empty, without the white space around it."""
    if not isinstance(value, str) or not (text := value.strip(ASCII_SPACE)):
        raise ValueError
    if any((ord(char) < ord(" ") and char not in "\t\n") or char == "\x7f" for char in text):
        raise ValueError
    return text


def read_number_text(value: Any) -> str:
    """Return a text, or a whole number as text."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else read_text(value)


def read_line(value: Any) -> str:
    """Return a text of one line, which systemd may write into the unit's file as it is."""
    if "\n" in (text := read_text(value)):
        raise ValueError
    return text


def read_words(value: Any) -> list[str]:
    """Return the words of a list, each as it is, or of a text: split at white space outside of quotes.

    A text with a backslash is refused: systemd has several rules for it.
    """
    if isinstance(value, list):
        words = [read_line(word) for word in value]
    elif "\\" in (text := read_text(value)):
        raise ValueError
    else:
        words = [read_line(word) for word in shlex.split(text)]
    if not words:
        raise ValueError
    return words


def parse_choice(*choices: str) -> Callable[[Any], str]:
    """Return a parser of one of these words."""

    def parse(value: Any) -> str:
        if (text := read_text(value)) not in choices:
            raise ValueError
        return text

    return parse


def parse_boolean(value: Any) -> bool:
    """Return a boolean, also of a word that systemd takes for one."""
    if isinstance(value, bool):
        return value
    word = read_text(value).lower()
    if word not in TRUE_WORDS + FALSE_WORDS:
        raise ValueError
    return word in TRUE_WORDS


def parse_boolean_text(*choices: str) -> Callable[[Any], str]:
    """Return a parser of a boolean, as `yes` or `no`, or of one of these words."""

    def parse(value: Any) -> str:
        return value if value in choices else "yes" if parse_boolean(value) else "no"

    return parse


def parse_boolean_ex(*choices: str) -> Callable[[Any], bool | Suffixed]:
    """Return a parser of a boolean, or of one of these words: for those systemd has a second property."""

    def parse(value: Any) -> bool | Suffixed:
        return Suffixed(Ex=("s", value)) if value in choices else parse_boolean(value)

    return parse


def parse_code(codes: dict[str, int]) -> Callable[[Any], int]:
    """Return a parser of a word that has a number."""

    def parse(value: Any) -> int:
        return codes[parse_choice(*codes)(value)]

    return parse


def parse_account(value: Any) -> str:
    """Return the name or the number of a user or group; whether there is one is seen at the start."""
    text = read_number_text(value)
    if not re.fullmatch(r"[^\s:/,~-][^\s:/,]*", text):
        raise ValueError
    return text


def parse_accounts(value: Any) -> list[str]:
    """Return the names or numbers of groups."""
    return [parse_account(word) for word in read_words(value)]


def parse_assignments(value: Any) -> list[str]:
    """Return NAME=VALUE words of an environment."""
    words = read_words(value)
    if not all(re.match(r"[A-Za-z_][A-Za-z0-9_]*=", word) for word in words):
        raise ValueError
    return words


def parse_profile(value: Any) -> tuple[bool, str]:
    """Return the name of a security profile, and whether it may be missing, which `-` before it says."""
    text = read_line(value)
    if text in ("-", "--"):
        raise ValueError
    return text.startswith("-"), text.removeprefix("-")


def parse_context(value: Any) -> str:
    """Return a security context. systemd takes no `-` before it over D-Bus."""
    if (text := read_line(value)).startswith("-") or len(split_words(text)) != 1:
        raise ValueError
    return text


# Numbers


def parse_number(low: int, high: int, **words: int) -> Callable[[Any], int]:
    """Return a parser of a whole number within these bounds, or of a word that means one."""

    def parse(value: Any) -> int:
        if (text := read_number_text(value)) in words:
            return words[text]
        if not re.fullmatch(r"[+-]?[0-9]{1,20}", text) or not low <= int(text) <= high:
            raise ValueError
        return int(text)

    return parse


def parse_size(value: Any) -> int:
    """Return a number of bytes: `64M` and the like are to the base of 1024."""
    match = re.fullmatch(r"([0-9]{1,20})(?:\.([0-9]{1,9}))?[ \t]*([BKMGTPE]?)", read_number_text(value))
    if match is None:
        raise ValueError
    factor = 1 << 10 * SIZE_UNITS.index(match[3] or "B")
    fraction = match[2] or "0"
    size: int = int(match[1]) * factor + int(fraction) * factor // 10 ** len(fraction)
    if size >= UINT64_MAX:
        raise ValueError
    return size


def parse_permyriad(value: Any) -> int | None:
    """Return a percentage in hundredths of a percent; None where there is no percent sign."""
    if isinstance(value, int) or not (text := read_text(value)).endswith("%"):
        return None
    match = re.fullmatch(r"([0-9]{1,7})(?:\.([0-9]{1,2}))?%", text)
    if match is None:
        raise ValueError
    return int(match[1]) * 100 + int((match[2] or "").ljust(2, "0"))


def parse_limit(parse_amount: Callable[[Any], int], low: int = 0) -> Callable[[Any], int | Suffixed]:
    """Return a parser of a control group's limit: an amount from `low` on, `infinity`, or a share of the host's."""

    def parse(value: Any) -> int | Suffixed:
        if value == "infinity":
            return UINT64_MAX
        share = parse_permyriad(value)
        amount = parse_amount(value) if share is None else share
        if amount < low or (share or 0) > PERMYRIAD:
            raise ValueError
        return amount if share is None else Suffixed(Scale=("u", (share * UINT32_MAX + PERMYRIAD // 2) // PERMYRIAD))

    return parse


def parse_quota(value: Any) -> int:
    """Return the microseconds of processor time for each second, which a percentage gives; it may exceed 100%."""
    if not (share := parse_permyriad(value)):
        raise ValueError
    return share * USEC_PER_PERMYRIAD


def parse_microseconds_setting(value: Any) -> int:
    """Return the microseconds of a time span that is not nothing; a number alone is seconds."""
    if not (span := parse_microseconds(read_number_text(value))):
        raise ValueError
    return span


def parse_mode(value: Any) -> int:
    """Return an access mode, of a text with octal digits. A number would be decimal in TOML."""
    text = read_text(value)
    if not re.fullmatch(r"[0-7]{1,5}", text) or int(text, 8) > MAX_MODE:
        raise ValueError
    return int(text, 8)


# Limits of a process, setrlimit(2)


def parse_rlimit(parse_amount: Callable[[str], int]) -> Callable[[Any], Suffixed]:
    """Return a parser of a hard and a soft limit: one value for both, or `soft:hard`."""

    def parse(value: Any) -> Suffixed:
        soft, colon, hard = read_number_text(value).partition(":")
        limits = [UINT64_MAX if text == "infinity" else parse_amount(text) for text in (hard if colon else soft, soft)]
        if limits[1] > limits[0]:
            raise ValueError
        return Suffixed({"": ("t", limits[0]), "Soft": ("t", limits[1])})

    return parse


def parse_rlimit_seconds(text: str) -> int:
    """Return whole seconds, rounded up."""
    span = parse_microseconds(text)
    if span is None or span == USEC_INFINITY:
        raise ValueError
    return -(-span // 10**6)


def parse_rlimit_microseconds(text: str) -> int:
    """Return microseconds, which a number alone is, too."""
    span = parse_microseconds(text, unit_microseconds=1)
    if span is None or span == USEC_INFINITY:
        raise ValueError
    return span


def parse_rlimit_nice(text: str) -> int:
    """Return RLIMIT_NICE, of its value or, with a sign, of a nice level."""
    if text.startswith("+"):
        return NICE_LEVELS - parse_number(0, NICE_LEVELS - 1)(text)
    if text.startswith("-"):
        return NICE_LEVELS - parse_number(-NICE_LEVELS, 0)(text)
    return parse_number(0, 2 * NICE_LEVELS)(text)


# Sets


def parse_architectures(value: Any) -> list[str]:
    """Return architectures by the names of SystemCallArchitectures=."""
    return _check_words(read_words(value), r"[a-z0-9-]+")


def parse_address_families(value: Any) -> tuple[bool, list[str]]:
    """Return whether these families are allowed, or with `~` before the first denied; `none` allows nothing."""
    if value == "none":
        return True, []
    allow, words = _split_inverted(read_words(value))
    return allow, _check_words(words, r"AF_[A-Z0-9_]+")


def parse_system_calls(value: Any) -> tuple[bool, list[str]]:
    """Return whether these calls and groups are allowed, or with `~` before the first denied, maybe with an errno."""
    allow, words = _split_inverted(read_words(value))
    return allow, _check_words(words, r"@?[a-z0-9_-]+" if allow else r"@?[a-z0-9_-]+(:[A-Za-z0-9]+)?")


def parse_capabilities(value: Any) -> int:
    """Return the mask of capabilities, or with `~` before the first that of all others; empty is none at all."""
    if value in ("", []):
        return 0
    keep, words = _split_inverted(read_words(value))
    mask = 0
    for word in words:
        prefix, name = word[:4].lower(), word[4:].lower()
        if prefix != "cap_" or name not in CAPABILITIES:
            raise ValueError
        mask |= 1 << CAPABILITIES.index(name)
    return mask if keep else mask ^ UINT64_MAX


def parse_namespaces(value: Any) -> int | Suffixed:
    """Return the mask of namespaces that may be made: none with `yes`; no restriction with `no`.

    What `~` inverts depends on the release of systemd, which knows the time namespace or not.
    """
    try:
        return 0 if parse_boolean(value) else Suffixed()
    except ValueError:
        words = read_words(value)
    if not NAMESPACES.keys() >= set(words):
        raise ValueError
    return sum(NAMESPACES[word] for word in set(words))


def parse_cpus(value: Any) -> bytes | Suffixed:
    """Return a set of processors as bits, the lowest first; `numa` are those of the unit's memory nodes."""
    if value == "numa":
        return Suffixed(FromNUMA=("b", True))
    words = [read_number_text(one) for one in (value if isinstance(value, list) else [value])]
    mask = 0
    for word in split_words(" ".join(words).replace(",", " ")):
        match = re.fullmatch(r"([0-9]{1,4})(?:-([0-9]{1,4}))?", word)
        if match is None:
            raise ValueError
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < MAX_CPUS:
            raise ValueError
        mask |= (1 << last + 1) - (1 << first)
    if not mask:
        raise ValueError
    return mask.to_bytes((mask.bit_length() + 7) // 8, "little")


def parse_errno(value: Any) -> int:
    """Return an error number of its name or number; `kill` ends the process instead."""
    text = read_number_text(value)
    if text == "kill":
        return SECCOMP_KILL
    known = {name: number for name, number in vars(errno).items() if name.startswith("E")}
    return known[text] if text in known else parse_number(1, MAX_ERRNO)(text)


def _check_words(words: list[str], pattern: str) -> list[str]:
    if not all(re.fullmatch(pattern, word) for word in words):
        raise ValueError
    return words


def _split_inverted(words: list[str]) -> tuple[bool, list[str]]:
    """Take a `~` off the first word: whether there was none, and the words. One at a later word means nothing."""
    keep = not words[0].startswith("~")
    words = [words[0].removeprefix("~"), *words[1:]]
    if any(not word or word.startswith("~") for word in words):
        raise ValueError
    return keep, words


# Paths


def parse_path(value: Any) -> str:
    """Return an absolute path without `.` and `..`."""
    text = read_line(value)
    if not text.startswith("/") or {".", ".."} & set(text.split("/")):
        raise ValueError
    return text


def parse_working_directory(value: Any) -> str:
    """Return a path, or `~` for the user's home; `-` before it says that it may be missing."""
    text = read_line(value)
    return text if text.removeprefix("-") == "~" else _check_prefixed(text, "-")


def parse_paths(value: Any) -> list[str]:
    """Return paths, each with `-` before it where it may be missing, and `+` where it is below the unit's root."""
    return [_check_prefixed(word, "-", "+") for word in read_words(value)]


def parse_binds(value: Any) -> list[tuple[str, str, bool, int]]:
    """Return what is mounted where, whether it may be missing, and the flags: `source[:destination[:rbind]]`."""
    return [_parse_bind(word) for word in read_words(value)]


def _parse_bind(word: str) -> tuple[str, str, bool, int]:
    source, *rest = word.removeprefix("-").split(":")
    destination, option = (*rest, "", "")[:2]
    if len(rest) > 2 or option not in ("", "rbind", "norbind"):  # noqa: PLR2004 - a destination and an option
        raise ValueError
    where = parse_path(destination) if rest else source
    return parse_path(source), where, word.startswith("-"), 0 if option == "norbind" else MS_REC


def parse_devices(value: Any) -> list[tuple[str, str]]:
    """Return devices, and what may be done to each: `/dev/null rw`, or all of `rwm`. A text is one device."""
    lines = value if isinstance(value, list) else [value]
    if not lines:
        raise ValueError
    return [_parse_device(line) for line in lines]


def _parse_device(line: Any) -> tuple[str, str]:
    device, *rest = split_words(read_line(line))
    access = rest[0] if rest else "rwm"
    known = device.startswith(("/dev/", "char-", "block-"))
    if not known or len(rest) > 1 or not set(access) <= set("rwm"):
        raise ValueError
    return (parse_path(device) if device.startswith("/") else device), access


def _check_prefixed(text: str, *prefixes: str) -> str:
    """Return a path as it is, with the prefixes in their order before it."""
    path = text
    for prefix in prefixes:
        path = path.removeprefix(prefix)
    parse_path(path)
    return text
