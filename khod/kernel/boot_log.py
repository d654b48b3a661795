# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel log of this boot, from its first record: what the kernel complains of that concerns a handover.

Only the kernel's own records count (facility 0), from level warning on. So khod's lines in /dev/kmsg are left out, and
those of systemd-shutdown and systemd, which say `Failed to preserve LUO fd` of every descriptor store with sockets.
"""

import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

from khod.abi.calls import Calls, Log
from khod.dataclass import dataclass
from khod.kernel.log import LOG_KERN, RECORD_BYTES, LogRecord, parse_record
from khod.text import printable, shorten

LOGLEVEL_WARNING = 4  # include/linux/kern_levels.h
MAX_BOOT_RECORDS = 500_000
"""Records that are read: a log of 16 MiB has fewer, and a kernel that logs faster than khod reads must not hold it."""
MAX_COMPLAINTS = 10
MAX_COMPLAINT_CHARACTERS = 200
HANDOVER = re.compile(
    r"(?<![\w-])(?!kho(?:d|ctl|-\w+)\b)(kho\w*|KHO|luo\w*|LUO|liveupdate|memfd_luo|reserve_mem|kexec_handover)\b"
)
"""What a line mentions that is about the handover itself.

Not khod, khoctl and the units kho-NAME, as in `Comm: khod`, nor the release of a kernel, as in `7.3.4-kho #1`.
"""
CORRUPTION = re.compile(
    r"BUG: Bad (page|rss-counter)|\bBad (page|swap file|rss)\b|Corrupted (low memory|page table)|Memory failure"
    r"|\b(memory|list|list_(add|del)|slab|stack) corrupt|\b([Ff]ree(list|chain|pointer)|[Oo]bject|[Ss]lab page) corrupt"
    r"|Memory corruption|memory-corruption|Isolate corrupted|page dumped because: corrupt"
    r"|Poison overwritten|(Redzone|Padding) overwritten|Object already free|KASAN|KFENCE|unable to handle page fault"
)
"""What a line says where memory does not hold what it should: mm/page_alloc.c, mm/slub.c, lib/list_debug.c.

Not every `corrupt`: file systems and displays say it of a disk and of an EDID. After a jump without a shutdown
fs/fat/inode.c says of an EFI system partition that `Some data may be corrupt`.
"""

HARMLESS = re.compile(
    r"\btaint(s|ing) kernel\b|^Kernel command line: |^Modules linked in: "
    r"|^(\w+-fs|XFS|BTRFS|F2FS|JBD2|bcachefs)\b"
)
"""What says nothing of the handover where it names it: a module of that name is loaded (kernel/module/main.c).

Nor does a file system's word of its disk: after an immediate jump each FAT says `Some data may be corrupt`.
"""
PROCESS = re.compile(r"\bComm: \S+|\b(khod|khoctl)\b")
"""The name of a process, which says who ran when the kernel complained, and not of what."""


@dataclass(frozen=True)
class BootLog:
    """The complaints of this boot's log, each as one line, at most MAX_COMPLAINTS of them; `count` is how many.

    With a `gap` the log is not complete, for this reason, and cannot be called clean.
    """

    complaints: tuple[str, ...] = ()
    count: int = 0
    records: int = 0
    gap: str = ""


def read_boot_log(calls: Calls) -> BootLog:
    """Read the kernel log from its beginning; OSError if it cannot be opened."""
    with closing(calls.open_log(whole=True)) as log:
        return examine_log(log)


def examine_log(log: Log) -> BootLog:
    """Look for complaints in a log that was opened at its beginning."""
    complaints: dict[str, None] = {}
    count, records, gap = 0, 0, ""
    for record in _join_fragments(_read_records(log)):
        if record is None:
            gap = gap or "records were overwritten before they could be read"
            continue
        if not records and record.sequence:
            gap = f"its first {record.sequence} records were overwritten"
        records += 1
        if is_complaint(record):
            count += 1
            if len(complaints) < MAX_COMPLAINTS:
                complaints[shorten(printable(record.text.strip()), MAX_COMPLAINT_CHARACTERS)] = None
    if not records:
        gap = gap or "it is empty"
    if records >= MAX_BOOT_RECORDS:
        gap = gap or f"it has more than {MAX_BOOT_RECORDS} records"
    return BootLog(tuple(complaints), count, records, gap)


def is_complaint(record: LogRecord) -> bool:
    """Whether the kernel itself complains of something that concerns a handover."""
    if record.facility != LOG_KERN or record.level > LOGLEVEL_WARNING:
        return False
    if HARMLESS.search(record.text):
        return False
    return bool(HANDOVER.search(PROCESS.sub("", record.text)) or CORRUPTION.search(record.text))


def _read_records(log: Log) -> Iterator[LogRecord | None]:
    """Yield every record, None for each gap in the middle."""
    for _ in range(MAX_BOOT_RECORDS):
        try:
            raw = log.read(RECORD_BYTES)
        except BrokenPipeError:  # overwritten; the next read gives the oldest that is left
            yield None
            continue
        if not raw:
            return
        if (record := parse_record(raw)) is not None:
            yield record


def _join_fragments(records: Iterator[LogRecord | None]) -> Iterator[LogRecord | None]:
    """Yield records with those that continue them."""
    held: LogRecord | None = None
    for record in records:
        if record is not None and record.fragment and held is not None:
            held = replace(held, text=held.text + record.text)
            continue
        if held is not None:
            yield held
        held = record
        if record is None:
            yield None
    if held is not None:
        yield held
