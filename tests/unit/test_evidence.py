# SPDX-License-Identifier: LGPL-2.1-or-later
"""The steps of the verification: what is a finding, what is only not known, and what it says."""

import struct

import libfdt
import pytest

from khod.handover import evidence
from khod.handover.record import Record
from khod.kernel.boot_log import BootLog
from khod.kernel.protocol import Tree
from khod.model import Begun, CheckResult, Finding, FindingSource, Observed, Verdict

PASSED, FAILED, UNKNOWN = CheckResult.passed, CheckResult.fail, CheckResult.skipped
BANNER = "Linux version 7.3.4 (b@h) #1 SMP"
RUN = "0123456789ab"


def booted(release: str = "7.3.4", *, run: str = RUN, arrived: bool = True) -> Observed:
    return Observed("boot", release, None, loaded=False, arrived=arrived, cmdline=f"root=/dev/vda khod.run={run}")


def left(release: str = "7.3.4", banner: str = BANNER) -> Record:
    return Record(arrived_run=RUN, previous_release="7.3.4", begun=Begun(kernel_release=release, kernel_banner=banner))


def metadata(release: str, count: int, version: int = 1) -> Tree:
    return Tree(b"", {"kexec-metadata": struct.pack("=I65sI", version, release.encode(), count)})


def memblock(**regions: tuple[int, int]) -> Tree:
    fdt = libfdt.FdtSw()
    fdt.finish_reservemap()
    fdt.begin_node("")
    fdt.property_string("compatible", "memblock-v1")
    for name, (start, size) in regions.items():
        fdt.begin_node(name)
        fdt.property_string("compatible", "reserve-mem-v1")
        fdt.property("start", struct.pack("=Q", start))
        fdt.property("size", struct.pack("=Q", size))
        fdt.end_node()
    fdt.end_node()
    return Tree(b"", {"memblock": bytes(fdt.as_fdt().as_bytearray())})


def test_the_expected_kernel_is_named_with_its_build() -> None:
    found = evidence.check_kernel(left(), booted(), BANNER)
    assert (found.check.result, found.findings) == (PASSED, ())
    assert "the same build" in found.check.evidence


@pytest.mark.parametrize(
    ("record", "observed", "banner", "named"),
    [
        (left("7.2.12"), booted(), BANNER, ("7.2.12", "7.3.4")),
        (left(banner=f"{BANNER} other"), booted(), BANNER, (f"{BANNER} other", f"`{BANNER}`")),
    ],
)
def test_another_kernel_is_a_finding_that_names_both(
    record: Record, observed: Observed, banner: str, named: tuple[str, str]
) -> None:
    found = evidence.check_kernel(record, observed, banner)
    assert found.check.result is FAILED
    (finding,) = found.findings
    assert finding.source is FindingSource.boot
    assert all(name in finding.text for name in named)


@pytest.mark.parametrize(
    ("record", "observed", "banner"),
    [
        (left("", ""), booted(), BANNER),
        (left(), booted(run="another"), BANNER),
    ],
    ids=["the image showed no release", "no mark"],
)
def test_what_is_not_known_of_the_kernel_is_no_finding(record: Record, observed: Observed, banner: str) -> None:
    found = evidence.check_kernel(record, observed, banner)
    assert (found.check.result, found.findings) == (UNKNOWN, ())


@pytest.mark.parametrize(("banner", "shown"), [("", BANNER), (BANNER, "")])
def test_a_build_that_one_side_does_not_show_is_not_compared(banner: str, shown: str) -> None:
    found = evidence.check_kernel(left(banner=banner), booted(), shown)
    assert (found.check.result, found.findings) == (PASSED, ())
    assert "not known" in found.check.evidence


def test_the_kernel_s_own_account_agrees_with_what_was_left() -> None:
    """As 7.3.4 does it: the blob that arrives is the one that left."""
    found = evidence.check_metadata(left(), metadata("7.3.4", 2), metadata("7.3.4", 2))
    assert found is not None
    assert (found.check.result, found.findings) == (PASSED, ())
    assert "7.3.4" in found.check.evidence


def test_another_previous_release_is_a_finding() -> None:
    found = evidence.check_metadata(left(), metadata("7.3.4", 2), metadata("7.2.12", 2))
    assert found is not None
    assert found.check.result is FAILED
    assert "7.2.12" in found.findings[0].text
    assert "7.3.4" in found.findings[0].text


@pytest.mark.parametrize(
    "came", [metadata("7.3.4", 9), metadata("7.3.4", 2, version=2), Tree(b"", {"kexec-metadata": b""})]
)
def test_an_account_that_cannot_be_read_or_counts_otherwise_is_not_known(came: Tree) -> None:
    found = evidence.check_metadata(left(), metadata("7.3.4", 2), came)
    assert found is not None
    assert (found.check.result, found.findings) == (UNKNOWN, ())


def test_a_kernel_without_such_an_account_has_no_check() -> None:
    assert evidence.check_metadata(left(), metadata("7.3.4", 2), Tree(b"")) is None
    assert evidence.check_memblock(Tree(b""), Tree(b"")) is None


def test_regions_are_where_they_were_and_shown() -> None:
    tree = memblock(trace=(0x1000_0000, 12 << 20))
    found = evidence.check_memblock(tree, tree)
    assert found is not None
    assert found.check.result is PASSED
    assert "trace 12 MiB at 0x10000000" in found.check.evidence


@pytest.mark.parametrize("came", [memblock(trace=(0x2000_0000, 12 << 20)), memblock(), Tree(b"", {"memblock": b"?"})])
def test_a_region_that_moved_or_is_gone_fails(came: Tree) -> None:
    found = evidence.check_memblock(memblock(trace=(0x1000_0000, 12 << 20)), came)
    assert found is not None
    assert found.check.result is FAILED
    assert "trace" in found.check.evidence


def test_a_complaint_is_a_finding_and_a_log_that_wrapped_is_not_clean() -> None:
    complained = evidence.check_log(BootLog(("KHO: disabling KHO revival",), 3, 10))
    assert complained.check.result is FAILED
    assert "and 2 more" in complained.findings[0].text
    assert complained.findings[0].source is FindingSource.log
    assert evidence.check_log(BootLog((), 0, 10, "wrapped")).check.result is UNKNOWN
    assert evidence.check_log(BootLog((), 0, 10, "wrapped")).findings == ()
    assert evidence.check_log(BootLog((), 0, 10)).check.result is PASSED


def test_a_required_producer_without_its_state_is_named() -> None:
    verdict = Verdict(arrived=["a"]).with_findings([Finding.of_producer("db", "no answer within 120 s")])
    found = evidence.check_required(("a", "db"), ["a", "db"], verdict, 120)
    assert found is not None
    assert found.check.result is FAILED
    assert "db" in found.check.evidence
    fine = evidence.check_required(("a", "idle"), ["a", "db"], Verdict(arrived=["a"]), 120)
    assert fine is not None
    assert fine.check.result is PASSED
    assert evidence.check_required((), ["a"], Verdict(), 120) is None


def test_a_later_check_replaces_the_one_of_its_name_and_adds_no_finding_twice() -> None:
    wrong = evidence.check_log(BootLog(("KHO: x",), 1, 1))
    verdict = evidence.add_evidence(Verdict(), [wrong])
    again = evidence.add_evidence(verdict, [wrong, evidence.Evidence.passed("kho", "fine")])
    assert again.findings == verdict.findings
    assert [check.name for check in again.checks] == ["log", "kho"]
    assert again.reason == verdict.reason != ""
