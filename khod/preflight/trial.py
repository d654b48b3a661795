# SPDX-License-Identifier: LGPL-2.1-or-later
"""An image is on trial until a handover into it was verified; after failures it is barred until an acknowledgement.

What is counted is the pair that boots: the kernel as it is loaded (of a unified kernel image, the kernel in it) and all
initrds as one. An initrd that is broken so bars this kernel with this initrd, and not the kernel with another one. The
command line is no part of it. systemd's boot counters are not used: they know no kexec.
"""

import time

from khod.history.model import ImageFacts
from khod.history.trial import ImageTrial
from khod.images.sealed import Sealed
from khod.preflight.facts import CheckFinding, Facts
from khod.target.target import Target

ON_TRIAL = "No handover into this kernel and initrd was verified yet"


def list_image_facts(target: Target) -> list[ImageFacts]:
    """Return the files of the next kernel as they are loaded; to hash them takes a while."""
    initrd = [] if target.initrd is None else [_describe_file("initrd", target.initrd)]
    return [_describe_file("kernel", target.kernel), *initrd]


def _describe_file(role: str, file: Sealed) -> ImageFacts:
    return ImageFacts(role, file.name, file.sha256, file.size)


def check_trial(facts: Facts) -> CheckFinding | None:
    """The handovers into this kernel and initrd have not failed `trial.failures` times."""
    found, bound = facts.past, facts.config.trial.failures
    if found is None:
        return None
    if found.past is None:
        return CheckFinding.skip_with(f"What handovers into this image came to is not known: {found.unknown}")
    trial = found.past.trial
    if not trial.failures:
        return CheckFinding.pass_with("The last handover into it was verified" if trial.verified else ON_TRIAL)
    evidence = _describe_failures(trial)
    if trial.failures < bound:
        return CheckFinding.warn_with(f"{evidence}. After {bound} failures it is refused", "Find out why it failed.")
    return CheckFinding.fail_with(
        evidence,
        f"Repair the cause or choose another image. To let it be tried again: khoctl history ack {trial.run}",
    )


def _describe_failures(trial: ImageTrial) -> str:
    often = "failed" if trial.failures == 1 else f"failed {trial.failures} times in a row"
    at = time.strftime("%Y-%m-%d %H:%M", time.localtime(trial.at))
    return f"A handover into this kernel and initrd {often}, last in run {trial.run} at {at}: {trial.reason}"
