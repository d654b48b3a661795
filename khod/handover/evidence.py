# SPDX-License-Identifier: LGPL-2.1-or-later
"""After the jump: what each step of the verification found, as a check with its evidence and as findings.

Pure comparisons of what was recorded before the jump with what this kernel shows. What cannot be known is a skipped
check, never a finding: a finding makes the handover degraded.
"""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import replace

from khod.abi import fdt
from khod.abi.kexec_metadata import parse_metadata
from khod.dataclass import dataclass
from khod.errors import MalformedTree
from khod.handover.record import Record
from khod.kernel.boot_log import BootLog
from khod.kernel.mark import is_marked
from khod.kernel.protocol import Tree
from khod.model import Check, CheckResult, Finding, FindingSeverity, FindingSource, Observed, Verdict
from khod.text import format_size, join_names, printable

METADATA_BLOB = "kexec-metadata"
MEMBLOCK_BLOB = "memblock"
U64 = struct.Struct("=Q")
LOG_REMEDY = "Look at the kernel log of this boot: journalctl -kb -p warning"
MAX_REGIONS_NAMED = 8


@dataclass(frozen=True)
class Evidence:
    """The outcome of one step of the verification."""

    check: Check
    findings: tuple[Finding, ...] = ()

    @classmethod
    def passed(cls, name: str, evidence: str) -> "Evidence":
        """Return that the step found what it should."""
        return cls(Check(name, CheckResult.passed, printable(evidence), ""))

    @classmethod
    def unknown(cls, name: str, why: str) -> "Evidence":
        """Return that the step could not be made, or proves nothing."""
        return cls(Check(name, CheckResult.skipped, printable(why), ""))

    @classmethod
    def failed(cls, name: str, evidence: str, remedy: str, findings: Iterable[Finding] = ()) -> "Evidence":
        """Return that something is wrong; without findings another step has found the same."""
        return cls(Check(name, CheckResult.fail, printable(evidence), remedy), tuple(findings))


def add_evidence(verdict: Verdict, steps: Iterable[Evidence]) -> Verdict:
    """Return the verdict with the checks and findings of these steps; a check replaces an earlier one of its name."""
    findings, checks = list(verdict.findings), {check.name: check for check in verdict.checks}
    for step in steps:
        checks[step.check.name] = step.check
        findings += [finding for finding in step.findings if finding not in findings]
    return replace(verdict, checks=list(checks.values())).with_findings(findings)


def check_arrival(observed: Observed) -> Evidence:
    """Whether this kernel was booted through KHO; a tree that is missing is a finding of the comparison of trees."""
    if observed.arrived:
        return Evidence.passed("kho", "this kernel was given a state tree by the one before")
    return Evidence.failed("kho", "this kernel was given no state tree", "journalctl -kb -g KHO")


def check_kernel(record: Record, observed: Observed, banner: str) -> Evidence:
    """Whether the kernel that was booted is the one of the image: release, build banner, mark of the command line.

    `banner` is /proc/version of this kernel, "" if it does not show it.
    """
    begun, name, other = record.begun, "kernel", ""
    if begun.kernel_release and begun.kernel_release != observed.release:
        other = f"{observed.release} was booted, and the image was {begun.kernel_release}"
    elif begun.kernel_banner and banner and begun.kernel_banner != banner:
        other = f"this kernel is `{banner}`, and the image was `{begun.kernel_banner}`"
    if other:
        text = printable(f"another kernel than expected: {other}")
        finding = Finding("", text, FindingSource.boot, observed.release, FindingSeverity.unknown)
        return Evidence.failed(name, text, "Look what else loads an image: systemctl cat kexec.target", [finding])
    if not is_marked(observed.cmdline, record.arrived_run):
        # A command line that is built into the image replaces the one with the mark.
        return Evidence.unknown(name, f"{observed.release}; its command line has no mark of this handover")
    if not begun.kernel_release:
        return Evidence.unknown(name, f"{observed.release}, marked; the image showed no release to compare with")
    build = "the same build" if begun.kernel_banner and banner else "its build is not known"
    return Evidence.passed(name, f"{observed.release}, {build}, marked by this handover")


def check_tree(verdict: Verdict, snapshot: Tree | None) -> Evidence:
    """Return the outcome of the comparison of trees, whose findings are in the verdict."""
    wrong = [*verdict.missing, *verdict.changed]
    if verdict.findings:
        said = f"missing or changed: {join_names(wrong)}" if wrong else verdict.findings[0].text
        if snapshot is None and not wrong:
            return Evidence.unknown("tree", said)
        return Evidence.failed("tree", said, "khoctl dt diff shows what differs")
    return Evidence.passed("tree", f"as it left: {join_names(verdict.arrived) or 'no blobs'}")


def check_memblock(left: Tree | None, came: Tree | None) -> Evidence | None:
    """Compare the regions of reserve_mem=; None where there are none. A difference of the blobs has its finding."""
    before = read_regions(left)
    if not before:
        return None
    after = read_regions(came)
    differing = sorted(name for name in before if after.get(name) != before[name])
    if differing:
        texts = [f"{name} {_region_text(before[name])} became {_region_text(after.get(name))}" for name in differing]
        return Evidence.failed("memblock", f"reserved regions differ: {join_names(texts)}", LOG_REMEDY)
    shown = [f"{name} {_region_text(region)}" for name, region in sorted(before.items())]
    return Evidence.passed("memblock", f"reserved where they were: {join_names(shown, MAX_REGIONS_NAMED)}")


def read_regions(tree: Tree | None) -> dict[str, tuple[int, int]]:
    """Return start and size of each reserve_mem= region in bytes, by name; those that cannot be read are left out."""
    blob = tree.blobs.get(MEMBLOCK_BLOB) if tree else None
    if blob is None:
        return {}
    found = {}
    try:
        for node in fdt.parse_tree(blob).children:
            start, size = node.properties.get("start", b""), node.properties.get("size", b"")
            if len(start) == len(size) == U64.size:
                found[node.name] = (U64.unpack(start)[0], U64.unpack(size)[0])
    except MalformedTree:
        return {}
    return found


def _region_text(region: tuple[int, int] | None) -> str:
    return f"{format_size(region[1])} at {region[0]:#x}" if region else "nothing"


def check_metadata(record: Record, left: Tree | None, came: Tree | None) -> Evidence | None:
    """Compare the kernel's own account of the kexec (Linux 7.0 and later); None where there is none."""
    name, blob = METADATA_BLOB, came.blobs.get(METADATA_BLOB) if came else None
    if blob is None:
        return None
    now = parse_metadata(blob)
    if now is None:
        return Evidence.unknown(name, "its version is not known")
    shown = f"exec from {now.previous_release} (count {now.kexec_count})"
    if record.previous_release and now.previous_release != record.previous_release:
        text = f"this kernel was reached from {now.previous_release}, and the handover began in "
        finding = Finding(
            "", f"{text}{record.previous_release}", FindingSource.boot, name, severity=FindingSeverity.unknown
        )
        return Evidence.failed(
            name, finding.text, "Look which kernel ran in between: the journal lists the boots", [finding]
        )
    before = parse_metadata(left.blobs.get(METADATA_BLOB, b"")) if left else None
    if before is not None and now.kexec_count not in (before.kexec_count, before.kexec_count + 1):
        return Evidence.unknown(name, f"{shown}, and the kernel before had written count {before.kexec_count}")
    return Evidence.passed(name, shown)


def check_log(log: BootLog) -> Evidence:
    """Return what this boot's kernel log says; a log that is not complete is not called clean."""
    if log.complaints:
        more = f" and {log.count - len(log.complaints)} more" if log.count > len(log.complaints) else ""
        text = f"the kernel complains: {'; '.join(log.complaints)}{more}"
        finding = Finding("", text, FindingSource.log, severity=FindingSeverity.unknown)
        return Evidence.failed("log", text, LOG_REMEDY, [finding])
    if log.gap:
        return Evidence.unknown("log", f"nothing is wrong in what is left of the kernel log, but {log.gap}")
    return Evidence.passed("log", f"no complaint of KHO, LUO or memory in {log.records} records")


def check_required(required: Sequence[str], left: Sequence[str], verdict: Verdict, seconds: float) -> Evidence | None:
    """Whether each required producer that left something has it again; one that has not is a finding already."""
    if not required:
        return None
    failed = sorted({*required} & {finding.producer for finding in verdict.findings} | {*required} & {*verdict.missing})
    if failed:
        return Evidence.failed(
            "required",
            f"required, and without its state within {seconds:g} s: {join_names(failed)}",
            "khoctl producers says why. Repair it, then: khoctl producers retry NAME",
        )
    back = sorted({*required} & {*left})
    others = sorted({*required} - {*left})
    said = [f"have their state: {join_names(back)}"] if back else []
    said += [f"left nothing: {join_names(others)}"] if others else []
    return Evidence.passed("required", "; ".join(said))


def check_sessions(files: int, arrived: int, sessions: int) -> Evidence | None:
    """Count the files of the producers' LUO sessions; None without any. A producer whose files did not come vetoes."""
    if not files:
        return None
    counted = f"{arrived} of {files} files in {sessions} LUO session{'' if sessions == 1 else 's'} arrived"
    if arrived < files:
        return Evidence.failed("luo", counted, "khoctl producers says why, and whom khod still waits for")
    return Evidence.passed("luo", counted)
