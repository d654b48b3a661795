# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel log of a boot: what counts as a complaint, and when a log proves nothing."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from khod.kernel.boot_log import MAX_COMPLAINTS, BootLog, examine_log, read_boot_log
from khod.simulated.kernel import LOG, SimulatedKernel

BANNER = "Linux version 7.3.4 (b@h) #1"


class Records:
    """A log: each record is bytes as in /dev/kmsg, or None where the reader was overtaken."""

    def __init__(self, records: Sequence[bytes | None]) -> None:
        self._records = list(records)

    def read(self, _size: int, /) -> bytes:
        if not self._records:
            return b""
        if (record := self._records.pop(0)) is None:
            raise BrokenPipeError
        return record

    def close(self) -> None:
        """Nothing is open."""


def examine(*lines: tuple[int, str], first: int = 0) -> BootLog:
    """Examine a log of these lines, each with its priority."""
    records = [f"{priority},{first + n},{n},-;{text}\n".encode() for n, (priority, text) in enumerate(lines)]
    return examine_log(Records(records))


# Lines as 7.3.4 has printed them in the lab.
COMPLAINTS = [
    "KHO: setup: handover FDT (0x5d6f9000) is incompatible with 'kho-v4'",
    "KHO: disabling KHO revival",
    "luo: No registered handler for compatible 'memfd-v2'",
    "BUG: Bad page state in process khod  pfn:12345",
    "list_del corruption. next->prev should be ffff, but was 0",
    "BUG kmalloc-64 (Not tainted): Poison overwritten",
    "BUG kmalloc-64 (Not tainted): Freechain corrupt",
    "pagealloc: memory corruption",
    "list_add corruption. next is NULL.",
    "WARNING: CPU: 0 PID: 321 at kernel/liveupdate/luo_session.c:99 luo_session_release+0x1/0x2",
    "RIP: 0010:kho_restore_folio+0x12/0x80",
    "khod: Corrupted page table at address 7f0000000000",
]


@pytest.mark.parametrize("text", COMPLAINTS)
def test_a_warning_about_the_handover_or_memory_is_a_complaint(text: str) -> None:
    found = examine((5, BANNER), (4, text))
    assert (found.complaints, found.count, found.gap) == ((text,), 1, "")


@pytest.mark.parametrize(
    ("priority", "text"),
    [
        (6, "KHO: found kexec handover data."),
        (6, "Revived memory reservation 'khotest' from KHO"),
        (6, "luo: Retrieved live update data, liveupdate number: 1"),
        (6, "KHO: exec from: 7.3.4-kho (count 1)"),
        (5, "Unknown kernel command line parameters kho=on"),
        (4, "ACPI: something else that the kernel warns of"),
        (4, "kho_v3: loading out-of-tree module taints kernel."),
        (4, "Modules linked in: kho_v3(OE) virtio_net"),
        (4, "CPU: 0 UID: 0 PID: 812 Comm: khod Not tainted 7.3.4 #1"),
        (4, "CPU: 1 UID: 0 PID: 813 Comm: kho-verify-web Not tainted 7.3.4 #1"),
        (3, "Out of memory: Killed process 812 (khod) total-vm:1kB, anon-rss:1kB"),
        (4, "FAT-fs (vda1): Volume was not properly unmounted. Some data may be corrupt. Please run fsck."),
        (3, "XFS (sda1): Metadata corruption detected at xfs_agf_read_verify, xfs_agf block 0x1"),
        (4, "FAT-fs (vda15): Volume was not properly unmounted. Some data may be corrupt. Please run fsck."),
        (4, "EDID block 0 (tag 0x00) is corrupt"),
        (4, "CPU: 1 UID: 0 PID: 321 Comm: khod Not tainted 7.3.4 #1 PREEMPT"),
        (4, "CPU: 1 UID: 0 PID: 45 Comm: modprobe Not tainted 7.3.4-kho #1 PREEMPT"),
        (4, "khod[321]: memfd_create() called without MFD_EXEC or MFD_NOEXEC_SEAL set"),
        (3, "Memory cgroup out of memory: Killed process 77 (kho-verify-db)"),
        (8 + 5, "khod: a call to the kernel failed, KHO"),
        (3 * 8 + 3, "systemd-shutdown[1]: Failed to preserve LUO fd 17"),
    ],
)
def test_what_is_harmless_or_not_the_kernel_s_does_not_count(priority: int, text: str) -> None:
    found = examine((5, BANNER), (priority, text))
    assert (found.complaints, found.count, found.records, found.gap) == ((), 0, 2, "")


def test_a_log_that_wrapped_is_not_clean() -> None:
    found = examine((6, "late"), first=700)
    assert found.complaints == ()
    assert "700" in found.gap


def test_a_log_that_was_overtaken_in_the_middle_is_not_clean() -> None:
    found = examine_log(Records([b"6,0,0,-;Linux version\n", None, b"6,9,9,-;later\n"]))
    assert found.gap


def test_an_empty_log_is_not_clean() -> None:
    assert examine_log(Records([])).gap


def test_a_complaint_in_two_parts_is_one() -> None:
    found = examine_log(Records([b"4,0,0,c;KHO: setup \n", b"4,1,0,c;failed\n"]))
    assert found.complaints == ("KHO: setup failed",)


def test_a_flood_is_counted_and_not_kept() -> None:
    found = examine(*((4, f"KHO: complaint {number}") for number in range(1000)))
    assert (len(found.complaints), found.count) == (MAX_COMPLAINTS, 1000)


def test_the_log_of_the_boot_before_does_not_count(tmp_path: Path) -> None:
    kernel = SimulatedKernel(tmp_path)
    with kernel.host_path(LOG).open("a") as log:
        log.write("\x014KHO: of this boot\n<4>khod: KHO, a process's\n")
    assert read_boot_log(kernel).complaints == ("KHO: of this boot",)
    kernel._boot_kernel("root=/dev/sim")
    found = read_boot_log(kernel)
    assert (found.complaints, found.gap) == ((), "")
