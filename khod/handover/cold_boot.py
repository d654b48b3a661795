# SPDX-License-Identifier: LGPL-2.1-or-later
"""Why a handover ended as a cold boot: one sentence from what pstore, the journal and the watchdog's device tell."""

import math
import re
import time
from dataclasses import field, replace

from khod.dataclass import dataclass
from khod.handover.record import Record
from khod.kernel.pstore import PANIC
from khod.model import ColdBoot, Phase
from khod.systemd.boots import BootEnd
from khod.systemd.shutdown import KEXEC_TARGET
from khod.text import one_line

# printk of the trace: "Comm: swapper/0 Not tainted 7.2.12-luo6 #1" (dump_stack_print_info() of 7.3.4).
DEAD_RELEASE = re.compile(r"(?:Not tainted|Tainted: [A-Z ]+?)\s+(?P<release>\d\S*) #")
SECONDS = re.compile(r"\[ *(?P<seconds>\d+\.\d+)\] Kernel panic")  # printk.time, as CLOCK_MONOTONIC
KEXEC_ASKED = re.compile(r"Rebooting with kexec")  # systemd-shutdown of 262
FIRMWARE_ASKED = re.compile(r"Rebooting\.|reboot: Restarting system")
JUMPED = re.compile(r"kexec_core: Starting new kernel")


@dataclass(frozen=True)
class ColdBootEvidence:
    """What was found of the boots before this one.

    `ends` are those boots, the last one first. `problems` has a sentence for each thing that could not be read.
    `watchdog` is None if the kernel does not tell whether one reset the host.
    """

    ends: list[BootEnd] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    watchdog: bool | None = None
    problems: list[str] = field(default_factory=list)


def explain_cold_boot(record: Record, evidence: ColdBootEvidence) -> ColdBoot:
    """Return what is known of the cold boot of a record, with the evidence and the reason that it gives.

    A handover that did not come to the jump keeps its reason.
    """
    known = record.cold_boot or ColdBoot(record.last_error)
    cause = _Cause(known.reason, known.is_image_suspect)
    if known.last_phase is Phase.verifying:
        cause = _died_verifying(evidence, known.boot_id, record.previous_release)
    elif known.last_phase is Phase.executing:
        cause = _died_jumping(record, known.boot_id, evidence) or cause
    return replace(
        known,
        reason=cause.reason,
        is_image_suspect=cause.is_image_suspect,
        journal_end=_describe_ends(evidence, known.boot_id),
        last_words=evidence.words,
        watchdog=evidence.watchdog,
    )


@dataclass(frozen=True)
class _Cause:
    """Why the host booted cold. The image is no suspect only where it is certain that it was not the cause."""

    reason: str
    is_image_suspect: bool = True


def _died_verifying(evidence: ColdBootEvidence, boot_id: str, release: str) -> _Cause:
    kernel = f"the next kernel ({release})"
    if cause := _panic(evidence.words):
        return _Cause(f"{kernel} panicked while the handover was verified: {cause}")
    if evidence.watchdog:
        return _Cause(f"{kernel} hung while the handover was verified, and a watchdog reset the host")
    end = _find_end(evidence, boot_id)
    if end is not None and end.in_order:
        target = f" into {end.target}" if end.target else ""
        return _Cause(f"{kernel} was shut down in order{target} before the handover was verified", False)
    return _Cause(f"{kernel} ended without a shutdown while the handover was verified")


def _died_jumping(record: Record, boot_id: str, evidence: ColdBootEvidence) -> _Cause | None:
    """Return the most certain cause; None if nothing is known. `boot_id` is the boot before the jump."""
    before = _find_end(evidence, boot_id)
    reached = next((end for end in evidence.ends if end.run == record.run), None)
    if cause := _panic(evidence.words):
        return _Cause(f"{_name_dead(record, evidence.words, reached)} panicked: {cause}")
    if evidence.watchdog:
        return _Cause(f"{_name_next(reached)} did not come up in time, or the jump hung: a watchdog reset the host")
    if reached is not None:
        return _Cause(f"{_name_next(reached)} started, and ended without a shutdown before khod ran in it")
    if _rebooted_after_kexec(evidence.words):
        return _Cause(
            "reboot(2) did not jump at the end of the shutdown, and systemd rebooted through the firmware", False
        )
    if any(JUMPED.search(line) for line in evidence.words):
        return _Cause("the host was reset in the jump, or the next kernel died before its first message")
    if before is None:
        return None
    if record.at_once:
        return _Cause("the host was reset in the jump, or the next kernel died before it left a trace")
    if not before.in_order:
        return _Cause("the shutdown before the jump was cut off: by a reset, a loss of power or a hang")
    if before.target in ("", KEXEC_TARGET):
        return _Cause(
            "the host shut down in order and did not come up in the next kernel: the jump failed, or that kernel died "
            "before it left a trace"
        )
    return _Cause(f"the host shut down in order, but into {before.target} instead of the jump", False)


def _find_end(evidence: ColdBootEvidence, boot_id: str) -> BootEnd | None:
    return next((end for end in evidence.ends if end.boot_id == boot_id.replace("-", "")), None)


def _panic(words: list[str]) -> str:
    return next((one_line(found["cause"]) for line in words if (found := PANIC.search(line))), "")


def _name_dead(record: Record, words: list[str], reached: BootEnd | None) -> str:
    """Name the kernel that panicked, as the next one where that is certain.

    It is where the panic came earlier after a boot than the kernel before had begun its last step.
    """
    dead = next((found["release"] for line in words if (found := DEAD_RELEASE.search(line))), "")
    died_at = next((float(found["seconds"]) for line in words if (found := SECONDS.search(line))), math.inf)
    began = max((timing.began_monotonic for timing in record.timings), default=0.0)
    if reached is not None or (dead and dead != record.previous_release) or died_at < began:
        return f"the next kernel ({dead})" if dead else _name_next(reached)
    return f"a kernel {dead}".rstrip()


def _name_next(reached: BootEnd | None) -> str:
    return f"the next kernel ({reached.release})" if reached is not None and reached.release else "the next kernel"


def _rebooted_after_kexec(words: list[str]) -> bool:
    asked = next((at for at, line in enumerate(words) if KEXEC_ASKED.search(line)), None)
    return asked is not None and any(FIRMWARE_ASKED.search(line) for line in words[asked + 1 :])


def _describe_ends(evidence: ColdBootEvidence, known: str) -> str:
    """Describe how each boot's journal ends; never empty, so that a later khod sees that it was looked at."""
    said = [_describe_end(end, known) for end in evidence.ends] or ["the journal has nothing of the boots before"]
    return "; ".join([*said, *evidence.problems])


def _describe_end(end: BootEnd, known: str) -> str:
    kernel = f" ({end.release})" if end.release else ""
    which = "the boot of the last phase" if end.boot_id == known.replace("-", "") else f"boot {end.boot_id[:12]}"
    target = f", into {end.target}" if end.target else ""
    how = f"in order{target}" if end.in_order else "cut off"
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(end.last_at))
    return f"{which}{kernel} ends {how} at {at} with {end.last_message!r}"
