# SPDX-License-Identifier: LGPL-2.1-or-later
"""Find the kernel log's own lines about a failed call: often they are the only place with the cause.

Records are read as in Documentation/ABI/testing/dev-kmsg. The caller opens the log before the call, which positions it
behind the last record; a call that succeeds costs no more than that. The records are read after a failure.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import field, replace

from khod.abi.calls import Log
from khod.dataclass import dataclass
from khod.model import Step
from khod.text import printable, shorten

RECORD_BYTES = 8192  # bytes; CONSOLE_EXT_LOG_MAX, since 6.3 PRINTK_MESSAGE_MAX (2048); EINVAL for a smaller buffer
MAX_RECORDS = 1000  # a failed call logs a few; a flood of other records is not followed for ever
MAX_LINES = 2
MAX_CHARACTERS = 200
LOG_KERN = 0  # the facility of the kernel itself; a process that writes to /dev/kmsg has another one
LOGLEVEL_NOTICE = 5  # include/linux/kern_levels.h; KHO, kexec and LUO log their failures there or above

SIGNATURES = r"PEFILE|MSCODE|PKCS#?7|X\.?509|[Ss]ignature|[Bb]lacklist|Sig \d+: |Message signed|Unsupported Signe"
ABOUT: Mapping[Step, re.Pattern[str]] = {
    Step.activate: re.compile(r"\b(kho|KHO|kexec_kho_out|Lockdown|debugfs)\b"),
    Step.load: re.compile(
        rf"\b(kexec[\w-]*|kho|KHO|Lockdown|LoadPin|integrity|ima|purgatory)\b|{SIGNATURES}"
        r"|op=appraise|Can't kexec|Command line not included|Device tree not included|new device tree|Undefined symbol"
    ),
    Step.execute: re.compile(r"\b(kexec\w*|kho|KHO|kho_finalize|luo\w*|memfd_luo|liveupdate|PM)\b|Freezing"),
}
"""What a line must mention to be about the step's call."""
LUO = re.compile(r"\b(luo\w*|kho\w*|KHO|memfd_luo|liveupdate)\b")
"""The same for the calls of /dev/liveupdate."""

OUTCOMES = re.compile(
    r"signature verification failed|Loading purgatory failed|Error loading purgatory|Error add kernel image"
    r"|Could not find any suitable kernel location"
)
"""Lines that say no more than the errno; an earlier line has the cause."""

HEADER = re.compile(rb"(?P<priority>\d+),(?P<sequence>\d+),\d+,(?P<flags>[^,;]*)[^;]*;(?P<text>[^\n]*)")
ESCAPED = re.compile(rb"\\x([0-9a-fA-F]{2})")


@dataclass(frozen=True)
class LogRecord:
    """One record: its level (0 to 7), its facility (0: the kernel), its text, and whether it continues the last one.

    `sequence` counts the records of a boot from 0.
    """

    level: int
    facility: int
    text: str
    fragment: bool = False
    sequence: int = field(default=0, compare=False)


def parse_record(raw: bytes) -> LogRecord | None:
    """Parse a record of /dev/kmsg, without its dictionary; None if it is not a record."""
    if (found := HEADER.match(raw)) is None:
        return None
    priority = int(found["priority"])
    text = ESCAPED.sub(lambda escaped: bytes.fromhex(escaped[1].decode()), found["text"])
    fragment, sequence = found["flags"].startswith(b"c"), int(found["sequence"])
    return LogRecord(priority & 7, priority >> 3, text.decode(errors="replace"), fragment, sequence)


def records_since(log: Log) -> list[LogRecord]:
    """Read the records since `log` was opened, at most MAX_RECORDS; raise OSError if it cannot be read.

    A line that the kernel wrote without a newline is shown only when another record follows. v3's only line about a
    failed activation is such a line, so write something to the log first.
    """
    found: list[LogRecord] = []
    for _ in range(MAX_RECORDS):
        try:
            raw = log.read(RECORD_BYTES)
        except BrokenPipeError:  # overwritten; the next read gives the oldest that is left
            continue
        if not raw:
            break
        if (record := parse_record(raw)) is None:
            continue
        if record.fragment and found:
            found[-1] = replace(found[-1], text=found[-1].text + record.text)
        else:
            found.append(record)
    return found


def relevant_lines(records: Sequence[LogRecord], about: re.Pattern[str]) -> str:
    """Return the last of the kernel's own lines about a call, joined; "" if there is none.

    If one of them names the cause, those that only report the failure are left out. Lines below level notice are always
    left out.
    """
    said = (record for record in records if record.facility == LOG_KERN and record.level <= LOGLEVEL_NOTICE)
    lines = list(dict.fromkeys(record.text.strip() for record in said if about.search(record.text)))
    causes = [line for line in lines if not OUTCOMES.search(line)]
    return "; ".join(shorten(printable(line), MAX_CHARACTERS) for line in (causes or lines)[-MAX_LINES:])
