# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel log's own line about a failed call: records as Documentation/ABI/testing/dev-kmsg has them."""

import errno
import io
import os
from collections.abc import Iterable

import pytest

from khod.kernel.log import ABOUT, LUO, MAX_RECORDS, LogRecord, parse_record, records_since, relevant_lines
from khod.model import Step


class Fake:
    """A /dev/kmsg at its end: records come one a read, an OSError where the device gives one, then EAGAIN."""

    def __init__(self, answers: Iterable[bytes | OSError]) -> None:
        self._answers = iter(answers)
        self.reads = 0

    def read(self, size: int, /) -> bytes | None:
        self.reads += 1
        answer = next(self._answers, None)
        if isinstance(answer, OSError):
            raise answer
        assert answer is None or len(answer) <= size, "the device answers EINVAL"
        return answer

    def close(self) -> None:
        """Nothing is held."""


OVERWRITTEN = BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

# The document's own example
DOCUMENTED = [
    (
        b"7,160,424069,-;pci_root PNP0A03:00: host bridge window [io  0x0000-0x0cf7] (ignored)\n"
        b" SUBSYSTEM=acpi\n DEVICE=+acpi:PNP0A03:00\n",
        LogRecord(7, 0, "pci_root PNP0A03:00: host bridge window [io  0x0000-0x0cf7] (ignored)"),
    ),
    (b"6,339,5140900,-;NET: Registered protocol family 10\n", LogRecord(6, 0, "NET: Registered protocol family 10")),
    (b"30,340,5690716,-;udevd[80]: starting version 181\n", LogRecord(6, 3, "udevd[80]: starting version 181")),
]


@pytest.mark.parametrize(("raw", "record"), DOCUMENTED)
def test_the_document_s_records(raw: bytes, record: LogRecord) -> None:
    assert parse_record(raw) == record


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"4,1,2,-;a \\x5c and \\x0a and \\x1b[31m\n", "a \\ and \n and \x1b[31m"),
        (b"4,1,2,-;\\xc3\\xbc\n", "\N{LATIN SMALL LETTER U WITH DIAERESIS}"),
        (b"4,1,2,-;\\xff\n", "\N{REPLACEMENT CHARACTER}"),
        (b"4,1,2,-;\\x5cx41\n", "\\x41"),
        (b"4,1,2,-,caller=T1,what=comes next;later fields\n", "later fields"),
        (b"4,1,2,-;a;b,c\n", "a;b,c"),
        (b"4,1,2,-;no newline", "no newline"),
    ],
)
def test_what_stands_in_a_record(raw: bytes, text: str) -> None:
    record = parse_record(raw)
    assert record is not None
    assert record.text == text
    assert record.level == 4


@pytest.mark.parametrize("raw", [b"", b"\n", b"no header", b"x,1,2,-;text\n", b" SUBSYSTEM=acpi\n", b"4,1;text\n"])
def test_what_is_no_record(raw: bytes) -> None:
    assert parse_record(raw) is None


def test_records_are_read_until_there_are_no_more() -> None:
    log = Fake([raw for raw, _ in DOCUMENTED])
    assert records_since(log) == [record for _, record in DOCUMENTED]
    assert log.reads == len(DOCUMENTED) + 1
    assert records_since(Fake([])) == []
    assert records_since(io.BytesIO()) == [], "what stands for a log that may not be read"


def test_overwritten_records_are_passed_over() -> None:
    log = Fake([OVERWRITTEN, b"3,9,1,-;left\n", OVERWRITTEN, b"3,12,2,-;right\n"])
    assert [record.text for record in records_since(log)] == ["left", "right"]


def test_what_is_no_record_is_passed_over() -> None:
    assert [record.text for record in records_since(Fake([b"what?", b"3,9,1,-;left\n"]))] == ["left"]


def test_fragments_are_put_together() -> None:
    log = Fake([b"3,1,1,-;kho failed to \n", b"3,2,1,c;serialize state: -12\n", b"3,3,2,-;another\n"])
    assert [record.text for record in records_since(log)] == ["kho failed to serialize state: -12", "another"]
    assert [record.text for record in records_since(Fake([b"3,2,1,c;its beginning is lost\n"]))] == [
        "its beginning is lost"
    ]


@pytest.mark.parametrize("flood", [b"3,1,1,-;flood\n", OVERWRITTEN, b"what?"])
def test_a_log_that_never_ends_is_left(flood: bytes | OSError) -> None:
    log = Fake(iter(lambda: flood, None))
    assert len(records_since(log)) <= MAX_RECORDS
    assert log.reads == MAX_RECORDS


def test_any_other_error_is_the_caller_s() -> None:
    with pytest.raises(PermissionError):
        records_since(Fake([PermissionError(errno.EPERM, "dmesg_restrict")]))


def lines(*texts: str, level: int = 4, facility: int = 0) -> list[LogRecord]:
    return [LogRecord(level, facility, text) for text in texts]


# Step, what the kernel logs (the format strings of its sources), what is quoted
TELLING = [
    # Seen on 7.3.4-signed
    (
        Step.load,
        ["PEFILE: Digest mismatch", "kexec_file: Enforced kernel signature verification failed (-129)."],
        "PEFILE: Digest mismatch",
    ),
    (
        Step.load,
        ["PEFILE: Unsigned PE binary", "kexec_file: Enforced kernel signature verification failed (-61)."],
        "PEFILE: Unsigned PE binary",
    ),
    # ENOKEY: the trust check logs nothing of its own
    (
        Step.load,
        ["kexec_file: Enforced kernel signature verification failed (-126)."],
        "kexec_file: Enforced kernel signature verification failed (-126).",
    ),
    (Step.load, ["kexec-bzImage64: Not a bzImage"], "kexec-bzImage64: Not a bzImage"),
    (
        Step.load,
        ["kexec_file(Image): Could not find any suitable kernel location!", "eth0: link becomes ready"],
        "kexec_file(Image): Could not find any suitable kernel location!",
    ),
    (
        Step.load,
        ["Lockdown: khod: kexec of unsigned images is restricted; see man kernel_lockdown.7"],
        "Lockdown: khod: kexec of unsigned images is restricted; see man kernel_lockdown.7",
    ),
    (
        Step.load,
        [
            'audit: type=1800 audit(1.2:3): pid=7 uid=0 op=appraise_data cause=IMA-signature-required comm="khod" '
            'name="vmlinuz" dev="vda" ino=12 res=0 errno=0'
        ],
        'audit: type=1800 audit(1.2:3): pid=7 uid=0 op=appraise_data cause=IMA-signature-required comm="khod" '
        'name="vmlinuz" dev="vda" ino=12 res=0 errno=0',
    ),
    (
        Step.activate,
        ["kexec_kho_out: kho failed to serialize state: -12"],
        "kexec_kho_out: kho failed to serialize state: -12",
    ),
    (Step.activate, ["KHO: Failed to convert KHO state tree: -3"], "KHO: Failed to convert KHO state tree: -3"),
    (
        Step.activate,
        ["Lockdown: khod: debugfs access is restricted; see man kernel_lockdown.7"],
        "Lockdown: khod: debugfs access is restricted; see man kernel_lockdown.7",
    ),
    (
        Step.execute,
        ["luo_file: Freeze failed for token[0x7] handler[memfd-v2] err[-EINVAL]", "EXT4-fs (vda): re-mounted"],
        "luo_file: Freeze failed for token[0x7] handler[memfd-v2] err[-EINVAL]",
    ),
    (Step.execute, ["luo_core: kho_finalize failed -12"], "luo_core: kho_finalize failed -12"),
    (Step.load, ["EXT4-fs (vda): error", "systemd-journald: kept"], ""),
    (Step.load, [], ""),
]


@pytest.mark.parametrize(("step", "logged", "quoted"), TELLING)
def test_the_telling_line_is_quoted(step: Step, logged: list[str], quoted: str) -> None:
    assert relevant_lines(lines("usb 1-1: new device", *logged), ABOUT[step]) == quoted


@pytest.mark.parametrize(
    "line",
    [
        "memfd_luo: failed to pin folios: -16",
        "luo_session: Failed to insert session [kv] -EEXIST",
        "luo_file: No registered handler for compatible 'memfd-v1'",
    ],
)
def test_luo_s_lines(line: str) -> None:
    assert relevant_lines(lines("memory: low", line), LUO) == line


def test_at_most_the_last_two_are_quoted_and_each_once() -> None:
    said = ["KHO: one", "KHO: two", "KHO: three", "KHO: three"]
    assert relevant_lines(lines(*said), ABOUT[Step.activate]) == "KHO: two; KHO: three"


def test_only_the_kernel_s_own_lines_are_quoted_and_none_that_merely_inform() -> None:
    about = ABOUT[Step.activate]
    assert relevant_lines(lines("khod: KHO: entering", facility=1), about) == "", "khod's announcement is no cause"
    assert relevant_lines(lines("KHO: exec from: 7.3.4", level=6), about) == ""
    assert relevant_lines(lines("KHO: a notice", level=5), about) == "KHO: a notice"


def test_what_is_quoted_is_safe_on_a_terminal_and_short() -> None:
    shown = relevant_lines(lines("KHO: \x1b[31m\n\x00\x9b" + "x" * 300), ABOUT[Step.activate])
    assert shown.startswith("KHO: \\x1b[31m\\n\\x00\\x9bxxx")
    assert shown.endswith("x…")
    assert len(shown) == 200
    exactly = "KHO: " + "x" * 195
    assert relevant_lines(lines(exactly), ABOUT[Step.activate]) == exactly
