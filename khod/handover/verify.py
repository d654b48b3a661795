# SPDX-License-Identifier: LGPL-2.1-or-later
"""After the jump: compare what arrived with the snapshot taken before it.

Only what the kernel handed over through KHO counts. Memory that merely still holds its old bytes does not: from 6.19.11
to 7.3.4 the text of a trace buffer stayed by chance while KHO was refused.
"""

from collections.abc import Sequence

from khod.errors import Refused
from khod.kernel.protocol import Tree
from khod.kernel.traits import kernel_producers, traits_of
from khod.model import Finding, FindingSeverity, Generation, Verdict

# Blobs the kernel itself rewrites between snapshot and jump, or on arrival.
VOLATILE = frozenset({"kexec-metadata", "LUO"})

WALL_CLOCK_SECONDS = 1.0
"""The precision of the wall clock over a kexec: the next kernel sets it from the hardware clock, in whole seconds."""


def compare_trees(before: Tree | None, arrived: Tree | None, was: Generation, now: Generation) -> Verdict:
    """Compare each producer of the snapshot: arrived, missing or changed. `reason` is "" if nothing is wrong."""
    if arrived is None:
        missing = sorted(kernel_producers(before, was)) if before else []
        nothing = (
            "the new kernel was reached by the kexec and KHO handed it nothing: "
            "look for `KHO:` in its log (kho=on missing, or it reads another KHO format)"
        )
        return Verdict(missing=missing).with_findings([Finding("", nothing)])
    if before is None:
        uncompared = Finding("", "there is no snapshot to compare with", severity=FindingSeverity.unknown)
        return Verdict(arrived=sorted(kernel_producers(arrived, now))).with_findings([uncompared])
    left, came = kernel_producers(before, was), kernel_producers(arrived, now)
    missing = sorted(left.keys() - came.keys())
    changed = sorted(name for name in left.keys() & came.keys() if left[name] != came[name] and name not in VOLATILE)
    if traits_of(was).one_tree and before.root != arrived.root and not missing and not changed:
        changed = ["/"]
    findings = [Finding("", "did not arrive", subject=name) for name in missing]
    findings += [Finding("", "arrived changed", subject=name, severity=FindingSeverity.changed) for name in changed]
    # The formats they write count, not how userspace drives them: 6.18.15 and 6.19.11 hand over to each other, both
    # ways.
    if traits_of(was).one_tree is not traits_of(now).one_tree:
        how = f"the kernel before offered KHO as {was.value}, this one as {now.value}"
        findings.append(Finding("", how, severity=FindingSeverity.changed))
    verdict = Verdict(sorted(came.keys() - set(changed)), missing, changed)
    return verdict.with_findings(findings)


def blackout_seconds(began: float, ended: float, uptime: float | None) -> float | None:
    """Return the seconds from the first `freeze` to the last `finish` by the wall clock; None if that is not reliable.

    `began` is 0 if no khod recorded it. This kernel was booted within the blackout. If the blackout seems shorter than
    its `uptime` (CLOCK_BOOTTIME, which cannot be set), the wall clock was set back.
    """
    seconds = ended - began
    if not began or seconds < 0 or (uptime is not None and seconds + WALL_CLOCK_SECONDS < uptime):
        return None
    return seconds


def missing_state_error(missing: Sequence[str]) -> Refused:
    """Return the refusal of a handover that would not include these required kernel producers."""
    return Refused(
        f"Required state would not be handed over: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} "
        "not in the kernel's tree",
        where="producers.require_kernel",
        remedy="khoctl dt show lists what is there; look whether the driver is loaded and its memory reserved.",
    )
