# SPDX-License-Identifier: LGPL-2.1-or-later
"""The minimum uptime before a shutdown: MinimumUptimeSec= (since systemd 261), read as systemd reads it.

systemd-shutdown sleeps right before reboot(2) until CLOCK_BOOTTIME has reached that time, which is within the blackout
of an orderly jump. No property on the bus has the setting, so its files are read.
"""

from collections.abc import Iterator
from contextlib import suppress

from khod.abi.calls import Calls
from khod.abi.proc import CMDLINE, read_cmdline
from khod.dataclass import dataclass
from khod.kernel.next_arg import parse_word
from khod.kernel.words import kernel_words
from khod.systemd.time_span import parse_span
from khod.text import ASCII_SPACE

SINCE_VERSION = 261
DEFAULT_SECONDS = 15.0
"""On bare metal; none in a virtual machine."""

DIRECTORIES = ("/etc/systemd", "/run/systemd", "/usr/local/lib/systemd", "/usr/lib/systemd")
"""The first directory with a file of a name is used for that name (systemd-system.conf(5))."""
SECTION, KEY, PARAMETER = "Manager", "MinimumUptimeSec", "systemd.minimum_uptime_sec"


@dataclass(frozen=True)
class Setting:
    """A minimum in seconds (infinity for no end), and where it is set."""

    seconds: float
    where: str


def read_setting(calls: Calls) -> Setting | None:
    """Return the setting from the kernel command line, else from the last file that has it; None if it is not set."""
    found: Setting | None = None
    for path in (*_first_file(calls, "system.conf"), *_drop_ins(calls)):
        for value in _read_values(calls, path):
            if not value:
                found = None
            elif (seconds := parse_span(value)) is not None:
                found = Setting(seconds, path)
    if calls.path_exists(CMDLINE):
        for word in kernel_words(read_cmdline(calls)):
            arg = parse_word(word)
            if arg.is_parameter(PARAMETER) and (seconds := parse_span(arg.value or "")) is not None:
                found = Setting(seconds, "the kernel command line")
    return found


def _first_file(calls: Calls, name: str) -> list[str]:
    """Return the only file of this name that systemd reads, if there is one."""
    return [path for path in (f"{directory}/{name}" for directory in DIRECTORIES) if calls.path_exists(path)][:1]


def _drop_ins(calls: Calls) -> list[str]:
    """Return every drop-in that systemd reads, in order of name; a link to /dev/null hides others of its name."""
    names = set[str]()
    for directory in DIRECTORIES:
        with suppress(OSError):
            names |= set(calls.list_directory(f"{directory}/system.conf.d"))
    conf = sorted(name for name in names if name.endswith(".conf") and not name.startswith("."))
    return [path for name in conf for path in _first_file(calls, f"system.conf.d/{name}")]


def _read_values(calls: Calls, path: str) -> list[str]:
    """Return the values in a file; none if it cannot be read, as in systemd."""
    with suppress(OSError):
        if calls.is_file(path):
            return list(_setting_values(calls.read_file(path).decode(errors="replace")))
    return []


def _setting_values(text: str) -> Iterator[str]:
    """Yield the setting's values, line by line (systemd.syntax(7))."""
    section = ""
    for line in _join_lines(text):
        if line.startswith("[") and line.endswith("]"):
            section = line[1:-1]
            continue
        key, equals, value = line.partition("=")
        if equals and section == SECTION and key.strip(ASCII_SPACE) == KEY:
            yield value.strip(ASCII_SPACE)


def _join_lines(text: str) -> Iterator[str]:
    """Yield the lines without comments; a line that ends in a backslash continues in the next that is not a comment."""
    held = ""
    for raw in text.split("\n"):
        line = raw.strip(ASCII_SPACE)
        if line.startswith(("#", ";")):
            continue
        if line.endswith("\\"):
            held += f"{line[:-1]} "
            continue
        yield f"{held}{line}"
        held = ""
    yield held
